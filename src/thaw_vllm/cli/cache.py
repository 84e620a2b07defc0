"""``thaw cache``: the snapshots that starts have kept, looked at and removed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import examples, plain_app
from .output import Json, document, pairs, plain, size, table

if TYPE_CHECKING:
    from pathlib import Path

    from ..weights.cache import Entry

EXAMPLES = """
thaw cache ls
thaw cache ls --cache-dir /var/cache/thaw --json
thaw cache rm 5f0c31d2
thaw cache rm --stale
thaw cache rm --all
"""
SHOWN = 12
"""Digits of a key that a table shows."""

app = plain_app(add_completion=False)
Directory = Annotated[
    str | None,
    typer.Option("--cache-dir", metavar="DIR", help="As of thaw serve. [default: $THAW_CACHE_DIR, else ~/.cache/thaw]"),
]


@app.callback(epilog=examples(EXAMPLES))
def cache() -> None:
    """Show and remove the snapshots that thaw serve keeps."""


@app.command(epilog=examples(EXAMPLES, "ls"))
def ls(cache_dir: Directory = None, as_json: Json = False) -> None:
    """List them, the one used last first: of which model, how large, and whether they are still its weights.

    One is stale when its model directory is gone, or the weight files in it have changed. Starts have another one, too,
    where the model's configuration, the options or vLLM's minor version are others.
    """
    from ..weights.cache import entries

    place = _place(cache_dir)
    found = [_described(entry) for entry in reversed(entries(place)) if entry.names]
    if as_json:
        document({"directory": str(place), "bytes": sum(one["bytes"] for one in found), "snapshots": found})
        return
    if not found:
        print(f"no snapshots in {plain(str(place))}")
        return
    rows: list[tuple[str, ...]] = [("KEY", "SIZE", "MADE", "LAST USED", "MODEL", "STATE")]
    for one in found:
        state = f"stale: {one['stale']}" if one["stale"] else "valid"
        shown = (one["key"][:SHOWN], size(one["bytes"]), _when(one["made"]), _when(one["used"]))
        rows.append((*shown, plain(one["model"] or "?"), plain(state) + (", in use" if one["in_use"] else "")))
    table(rows, right=frozenset({1}))
    pairs([("in all", size(sum(one["bytes"] for one in found))), ("directory", plain(str(place)))])


@app.command(epilog=examples(EXAMPLES, "rm"))
def rm(
    key: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Of thaw cache ls, or its beginning.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="All whose model is gone or has other weights.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    cache_dir: Directory = None,
    as_json: Json = False,
) -> None:
    """Remove some of them.

    One that an engine was filled from, or that is being frozen, is kept, and the exit code is 6: the engine may need it
    to wake up.
    """
    from ..errors import StorageError, UsageError
    from ..transport.writer import remove_stale
    from ..weights.cache import discard_unused, entries

    if bool(key) + stale + everything != 1:
        raise UsageError("give keys (thaw cache ls shows them), --stale, or --all")
    place = _place(cache_dir)
    found = [entry for entry in entries(place) if entry.names]
    if key:
        chosen = [_named(one, found) for one in dict.fromkeys(key)]
    else:
        chosen = [entry for entry in found if everything or _described(entry)["stale"]]
        remove_stale(place, "*")  # what freezes have left that were killed
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry in chosen:
        (removed if discard_unused(entry) else kept).append(entry)
    if as_json:
        document({"removed": [e.key for e in removed], "in_use": [e.key for e in kept]})
    else:
        freed = size(sum(entry.bytes for entry in removed))
        print(f"removed {len(removed)} snapshot{'' if len(removed) == 1 else 's'}, {freed}")
    sys.stdout.flush()
    if kept:
        keys = ", ".join(entry.key[:SHOWN] for entry in kept)
        raise StorageError(f"in use, and kept: {keys}; end the engines that were filled from there, and try again")


def _place(cache_dir: str | None) -> Path:
    from ..errors import StorageError
    from ..weights.cache import snapshots_directory

    try:
        return snapshots_directory(cache_dir)
    except RuntimeError as error:
        raise StorageError(f"there is no cache directory: {error}; --cache-dir names one") from None


def _described(entry: Entry) -> dict[str, Any]:
    """For people and programs."""
    from ..errors import ThawError
    from ..weights.cache import headers, in_use, origin_of, stale

    ((_, header),) = headers([entry])
    said: dict[str, Any]
    if isinstance(header, ThawError):
        said = {"model": None, "directory": None, "vllm": None, "stale": f"it cannot be read: {header}"}
    else:
        said = {
            "model": header.metadata.get("model"),
            "directory": origin_of(header).get("directory"),
            "vllm": header.identity.engine_version,
            "stale": stale(header),
        }
    own = {"key": entry.key, "path": str(entry.path), "bytes": entry.bytes, "made": entry.made, "used": entry.used}
    return own | said | {"in_use": in_use(entry)}


def _named(word: str, found: list[Entry]) -> Entry:
    from ..errors import UsageError

    meant = [entry for entry in found if word and entry.key.startswith(word)]
    if len(meant) != 1:
        many = f"{len(meant)} snapshots have keys that begin with" if meant else "there is no snapshot with the key"
        raise UsageError(f"{many} {word!r}; thaw cache ls --json shows whole keys")
    return meant[0]


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
