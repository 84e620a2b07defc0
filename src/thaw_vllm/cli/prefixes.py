"""What ``thaw info`` says of a file of KV blocks: their layout and every prefix, its tokens only when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, UsageError
from .output import pairs, plain, size, stdout_to_stderr, table

if TYPE_CHECKING:
    from ..format.kv import Layout
    from ..weights.open import Opened

Decode = Callable[[list[int]], str]

SHOWN = 16
"""Digits of an address that a table shows."""


def describe(opened: Opened, *, ids: bool = False, decode: Decode | None = None) -> dict[str, Any]:
    """The layout and the prefixes, as plain values.

    Args:
        opened: chunks included, for the table is read and verified.
        ids: with every token id, and the salt.
        decode: with the text of every prefix.

    Raises:
        UsageError: ``ids`` or ``decode`` for a file that has no table.
        FormatError, CorruptionError: the table or the page tensors are not sound.
    """
    from ..kv.read import count_slots, read_table
    from ..kv.table import NONE, addresses, root

    header = opened.snapshot.header
    layout = header.kv
    assert layout is not None
    slots = count_slots(opened)
    found: dict[str, Any] = {"holds": "kv", "kv": layout.to_json(), "pages": _pages(layout, slots)}
    if header.identity.parallel.rank:
        if ids or decode:
            raise UsageError(f"{opened.source.name!r} has pages only; prefixes are in the manifest, rank 0's file")
        return found | {"blocks": None, "prefixes": None}
    blocks = read_table(opened)
    names, depths = addresses(blocks, root(header.identity, layout)), blocks.depths()
    first: list[int] = []  # block of each one's prefix, which has the salt
    for number, block in enumerate(blocks.blocks):
        first.append(number if block.parent == NONE else first[block.parent])
    prefixes = []
    for leaf in blocks.leaves():
        salt = blocks.blocks[first[leaf]].salt
        prefix: dict[str, Any] = {
            "address": names[leaf].hex(),
            "tokens": depths[leaf] * layout.block_size,
            "blocks": depths[leaf],
            "salted": salt is not None,
        }
        if ids:
            prefix |= {"salt": salt, "token_ids": blocks.tokens(leaf)}
        if decode:
            prefix["text"] = decode(blocks.tokens(leaf))
        prefixes.append(prefix)
    return found | {"blocks": len(blocks.blocks), "prefixes": prefixes}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what ``describe`` found, but for the prefixes themselves."""
    layout, pages, prefixes = found["kv"], found["pages"], found["prefixes"]
    shown = [("block size", f"{layout['block_size']} tokens"), ("cache dtype", layout["cache_dtype"])]
    for group in layout["groups"]:
        window = f", window of {group['window']} tokens" if group["window"] is not None else ""
        count = len(group["layers"])
        shown.append(("group", f"{group['kind']}, {count} layer{'s' if count != 1 else ''}{window}"))
    shown.append(("regions", f"{len(layout['regions'])}, {size(pages['block'])} a block"))
    shown.append(("pages", f"{pages['slots']} in each region, {size(pages['bytes'])}"))
    if prefixes is None:
        shown.append(("blocks", "listed in the manifest, rank 0's file"))
    else:
        longest = f", the longest of {prefixes[0]['tokens']} tokens" if prefixes else ""
        shown += [("blocks", str(found["blocks"])), ("prefixes", f"{len(prefixes)}{longest}")]
    return shown


def show(prefixes: list[dict[str, Any]]) -> None:
    """A table of prefixes, and below it what else was asked for."""
    lines: list[tuple[str, ...]] = [("PREFIX", "TOKENS", "BLOCKS", "SALTED")]
    for prefix in prefixes:
        salted = "yes" if prefix["salted"] else "no"
        lines.append((prefix["address"][:SHOWN], str(prefix["tokens"]), str(prefix["blocks"]), salted))
    table(lines, right=frozenset({1, 2}))
    for prefix in prefixes:
        told = [("prefix", prefix["address"][:SHOWN])]
        if prefix.get("salt") is not None:
            told.append(("salt", plain(prefix["salt"])))
        if "token_ids" in prefix:
            told.append(("token ids", " ".join(map(str, prefix["token_ids"]))))
        if "text" in prefix:
            told.append(("text", plain(prefix["text"])))
        if len(told) > 1:
            print()
            pairs(told)


def decoder(directory: Path) -> Decode:
    """Token ids to text, with a model directory's own tokenizer; nothing is downloaded and none of its code is run.

    Raises:
        UsageError: there is no tokenizer.
        MissingDependencyError: transformers is not installed.
    """
    name = str(directory)
    if not directory.is_dir():
        raise UsageError(f"{name!r} is not a directory; --tokenizer takes the model's, with its tokenizer files")
    with stdout_to_stderr():
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                f"--show-text needs transformers ({error}); pip install transformers, or use --show-tokens"
            ) from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise UsageError(f"{name!r} has no tokenizer that transformers can load: {_one_line(error)}") from None

    def decode(ids: list[int]) -> str:
        try:
            return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        except Exception as error:
            raise UsageError(f"the tokenizer in {name!r} does not know these tokens: {_one_line(error)}") from None

    return decode


def _pages(layout: Layout, slots: int) -> dict[str, int]:
    block = sum(region.page for region in layout.regions)
    return {"slots": slots, "block": block, "bytes": block * slots}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
