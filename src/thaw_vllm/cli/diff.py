"""``thaw diff``: two sessions, where they part and what they share."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Json, document, pairs, size
from .sessions import SHOWN, ShowText, StoreOption, Tokenizer, decoder, opened, print_text

EXAMPLES = """
thaw diff 3f2a91c0 9b1e77d2
thaw diff plan-a plan-b --show-text
"""
BEFORE = 40
"""Tokens that are shown before the first that differs."""


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A session, as for thaw show.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    show_text: ShowText = False,
    tokenizer: Tokenizer = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Show where two sessions part and what they share.

    The exit code is 0 whether they differ or not.
    """
    from ..sessions.diff import difference

    place = opened(store)
    ids = [place.find(word) for word in (first, second)]
    a, b = (place.read(id_) for id_ in ids)
    found = difference(place, a, b)
    texts: dict[str, str] = {}
    if show_text:
        text = decoder(tokenizer, a.head, b.head)
        begin = max(0, found.common - BEFORE)
        texts["common_text"] = text(a.tokens[begin : found.common].tolist())
        texts |= {name: text(one.tokens[found.common :].tolist()) for name, one in (("a_text", a), ("b_text", b))}
    if as_json:
        document(found.shown(*ids) | texts)
        return
    differs = found.first is not None
    names = [id_[:SHOWN] for id_ in ids]
    parts = f"after {found.common} tokens" if differs else "nowhere: the same tokens"
    if differs and found.common == min(found.tokens):
        parts += f": {names[found.tokens.index(found.common)]} is the beginning of the other"
    rows = [("part", parts)]
    for name, count, blocks, bytes_ in zip(names, found.tokens, found.own_blocks, found.own_bytes, strict=True):
        own = f"{count - found.common} of its own; {blocks} blocks of its own, {size(bytes_)}"
        rows.append((name, f"{count} tokens, {own}"))
    rows.append(("shared", f"{found.shared_blocks} blocks, {size(found.shared_bytes)}"))
    if not found.comparable:
        rows.append(("blocks", "were made by other weights, runtimes or salts, and cannot be shared"))
    if found.other:
        words = {"prompt": "how many tokens were given"}
        rows.append(("differ in", ", ".join(words.get(name, name) for name in found.other)))
    pairs(rows)
    if texts:
        shown = [("both", "…" * (found.common > BEFORE) + texts["common_text"])]
        shown += [(names[0], texts["a_text"]), (names[1], texts["b_text"])]
        for name, part in shown:
            print_text(name, part)
