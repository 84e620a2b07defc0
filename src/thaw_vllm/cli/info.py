"""``thaw info``: what a snapshot is and every tensor or prefix in it, without reading its weights or pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..format.limits import MAX_BYTES
from . import prefixes
from .output import Json, document, pairs, plain, size, table

if TYPE_CHECKING:
    from ..weights.open import Opened

EXAMPLES = """
thaw info weights.thaw
thaw info weights.thaw --no-tensors
thaw info weights.thaw --json | jq .content
thaw info prompt.thawkv --show-text --tokenizer Llama-3-8B/
"""


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .thaw or .thawkv file; the manifest of a set names its ranks.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Of KV blocks: the prompts; needs --tokenizer.")
    ] = False,
    show_tokens: Annotated[bool, typer.Option("--show-tokens", help="Of KV blocks: token ids and salts.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="The model's directory, for --show-text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a snapshot holds and which model it is.

    Reads all but its weights or pages, so it takes milliseconds for 100 GB too; thaw verify reads the rest. Tokens and
    text are somebody's prompt and are shown only when asked for.
    """
    from ..weights.open import open_snapshot

    if show_text != (tokenizer is not None):
        raise UsageError("--show-text and --tokenizer DIR belong together: text needs the model's tokenizer")
    with open_snapshot(file, whole=False) as opened:
        found = describe(opened)
        if opened.snapshot.header.kv is not None:
            decode = prefixes.decoder(tokenizer) if tokenizer is not None else None
            found |= prefixes.describe(opened, ids=show_tokens, decode=decode)
        elif show_text or show_tokens:
            raise UsageError(f"{str(file)!r} holds weights, which have no tokens and no text")
    if not tensors:
        del found["tensors"]
    if as_json:
        document(found)
    else:
        _show(found)


def describe(opened: Opened) -> dict[str, Any]:
    """Everything the header and the index say, as plain values."""
    snapshot = opened.snapshot
    header, index = snapshot.header, snapshot.index
    owners = {other: name for name, others in index.ties.items() for other in others}
    by_dtype: dict[str, dict[str, int]] = {}
    stored, kept, elsewhere = [0] * len(index.storages), dict[str, int](), snapshot.elsewhere
    for entry in index.kept:
        kept[str(entry.rank)] = kept.get(str(entry.rank), 0) + index.storages[entry.storage]
    for chunk in snapshot.chunks:
        stored[chunk.storage] += chunk.stored
    for tensor in index.tensors:
        counts = by_dtype.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0, "stored": 0})
        counts["tensors"] += 1
        counts["bytes"] += 0 if tensor.name in owners else tensor.bytes
        if tensor.storage is not None and tensor.name not in owners:
            counts["stored"] += (
                index.storages[tensor.storage] if tensor.storage in elsewhere else stored[tensor.storage]
            )
    return {
        "path": opened.source.name,
        "file_size": opened.source.size,
        "bytes": snapshot.bytes,
        "stored": sum(stored),
        "kept": kept,
        "model": header.identity.model,
        "content": header.content,
        "identity": header.identity.to_json(),
        "writer": header.writer,
        "set": header.to_json().get("set"),
        "by_dtype": by_dtype,
        "ties": {name: list(others) for name, others in index.ties.items()},
        "files": [
            {"name": f.name, "bytes": index.storages[f.storage] if f.storage is not None else 0} for f in index.files
        ],
        "source": header.source,
        "attributes": header.attributes,
        "metadata": header.metadata,
        "tensors": [
            {
                "name": t.name,
                "kind": t.kind,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "stride": list(t.stride),
                "bytes": t.bytes,
                "tied_to": owners.get(t.name),
            }
            for t in index.tensors
        ],
    }


def _show(found: dict[str, Any]) -> None:
    identity = found["identity"]
    engine = " ".join(str(part) for part in (identity["engine"], identity["engine_version"]) if part)
    rows = [
        ("file", f"{found['path']} ({size(found['file_size'])})"),
        ("model", found["model"] or "unknown"),
        ("content", found["content"]),
        ("stage", identity["stage"] + (f" of {engine}" if engine else "")),
        ("architecture", identity["architecture"] or "unknown"),
        ("dtype", identity["dtype"] or "unknown"),
        ("quantization", identity["quantization"] or "none"),
        ("parallel", _parallel(identity["parallel"]) if identity["engine"] else "does not apply"),
        *[("experts", f"placed {e['placement']}, map {e['map']}") for e in [identity.get("experts")] if e],
        ("config", identity["config"] or "unknown"),
        ("written by", found["writer"] or "unknown"),
    ]
    rows += prefixes.rows(found) if "kv" in found else _counts(found["by_dtype"])
    rows += [("tied", f"{', '.join(map(plain, others))} to {plain(name)}") for name, others in found["ties"].items()]
    rows += [("kept by", f"rank {rank}: {size(count)}") for rank, count in found["kept"].items()]
    rows += [("carries", f"{f['name']} ({size(f['bytes'])})") for f in found["files"]]
    rows += [("source", line) for line in _source(found["source"])]
    for rank, member in enumerate((found["set"] or {}).get("members", []), 1):
        told = f"{member['name']} ({size(member['size'])}), {_parallel(identity['parallel'], rank)}"
        rows.append(("rank file", f"{told}, content {member['content']}"))
    rows += [("sets", f"{key.replace('|', '.')} = {value!r}") for key, value in found["attributes"].items()]
    rows += [(f"note {key}", value) for key, value in found["metadata"].items()]
    pairs([(plain(name), plain(value)) for name, value in rows])
    if found.get("prefixes"):
        print()
        prefixes.show(found["prefixes"])
    if found.get("tensors"):
        print()
        lines: list[tuple[str, ...]] = [("NAME", "KIND", "DTYPE", "SHAPE", "BYTES", "TIED TO")]
        for tensor in found["tensors"]:
            shape = "×".join(map(str, tensor["shape"])) or "scalar"
            tie = plain(tensor["tied_to"] or "")
            lines.append((plain(tensor["name"]), tensor["kind"], tensor["dtype"], shape, str(tensor["bytes"]), tie))
        table(lines, right=frozenset({4}))


def _counts(by_dtype: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    found = sorted(by_dtype.items(), key=lambda item: -item[1]["bytes"])
    rows = [("tensors", f"{counts['tensors']} {dtype}, {_sizes(counts)}") for dtype, counts in found]
    return rows or [("tensors", "none")]


def _sizes(counts: dict[str, int]) -> str:
    if counts["stored"] >= counts["bytes"]:
        return size(counts["bytes"])
    return f"{size(counts['bytes'])}, compressed to {size(counts['stored'])} ({counts['stored'] / counts['bytes']:.3f})"


def _parallel(sizes: dict[str, int], rank: int | None = None) -> str:
    """Coordinates of this rank, or of another one of its set."""
    from ..format.identity import Parallel

    own = Parallel(**sizes)
    return str(own if rank is None else own.at(rank))


def _source(source: dict[str, Any]) -> list[str]:
    """The source's files; free text that a file may spell in any way."""
    files = source.get("files")
    lines = []
    for entry in files if isinstance(files, list) else []:
        if isinstance(entry, dict):
            count = entry.get("size")
            known = size(count) if isinstance(count, int) and 0 <= count <= MAX_BYTES else "unknown size"
            lines.append(f"{entry.get('name')} ({known})")
    if "revision" in source:
        lines.append(f"revision {source['revision']}")
    return lines
