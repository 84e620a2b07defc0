"""Sets of rank files: rank 0's is the manifest, published last, so that a crash leaves the old set or the new one.

For ``weights.thaw`` frozen at tensor-parallel size 2 the directory holds::

    weights.thaw                            rank 0, the manifest: names, sizes and content ids of the others
    weights.5f0c31d2a7be.rank1.thaw         rank 1, under the set's own name
    weights.rank1.thaw                      a link to the file above, for people and older tools; never read by thaw
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import StorageError, ThawError
from ..format.header import Header, Member, RankSet
from ..transport.writer import check_target, remove_stale, sync_directory
from .capture import Captured
from .freeze import FreezeOptions, FreezeReport, SnapshotWriter
from .open import open_snapshot

Exchange = Callable[[bytes], list[bytes]]
"""All ranks call it with a message of at most MAX_MESSAGE bytes; each gets everybody's, by rank."""

MAX_MESSAGE = 4096


def alone(message: bytes) -> list[bytes]:
    """The exchange of a single rank."""
    return [message]


def member_name(target: Path, set_id: str, rank: int) -> str:
    """Under which name the set's rank is stored beside its manifest."""
    return f"{target.stem}.{set_id[:12]}.rank{rank}{target.suffix}"


def link_name(target: Path, rank: int) -> str:
    """The name people expect a rank's file under."""
    return f"{target.stem}.rank{rank}{target.suffix}"


def freeze_rank(
    target: str | Path,
    header: Header,
    captured: Captured,
    options: FreezeOptions,
    exchange: Exchange,
    model_id: Callable[[], str | None],
) -> FreezeReport:
    """Write this rank's file of a set (or the only file) and publish the set once every rank has written.

    Every rank of the set calls it. When one fails, all of them raise, nothing of the new set stays and the old
    snapshot is untouched.

    Args:
        target: the manifest's path, the same for every rank.
        header: this rank's, ids unsealed.
        captured: this rank's tensors.
        options: as for a single file.
        exchange: an all-gather among the ranks.
        model_id: called on rank 0 once its payload is written; its answer goes into every rank's header.

    Raises:
        ThawError: this rank's own failure, or StorageError naming the rank that failed.
    """
    target = Path(target)
    rank, world = header.identity.parallel.rank, header.identity.parallel.world
    ranks = _Ranks(exchange, rank)

    def prepare() -> dict[str, Any]:
        if rank:
            return {}
        check_target(target, options.force)
        return {"set": secrets.token_hex(16)}

    set_id = ranks.step(prepare)[0]["set"]
    path = target if rank == 0 else target.with_name(member_name(target, set_id, rank))
    if world > 1:
        header = dataclasses.replace(header, ranks=RankSet(set_id))
    with contextlib.ExitStack() as stack:

        def write() -> dict[str, Any]:
            if rank:
                remove_stale(path)
            own = dataclasses.replace(options, force=options.force and rank == 0)
            members = world - 1 if rank == 0 else 0
            writer = stack.enter_context(SnapshotWriter(path, header, captured, own, members))
            content = writer.write_payload()
            written.append(writer)
            return {
                "name": path.name,
                "size": writer.size,
                "content": content,
                "model": model_id() if rank == 0 else None,
            }

        written: list[SnapshotWriter] = []
        answers = ranks.step(write)
        identity = dataclasses.replace(header.identity, model=answers[0]["model"])
        sealed = dataclasses.replace(header, identity=identity)
        reports: list[FreezeReport] = []

        def publish_member() -> dict[str, Any]:
            if rank:
                reports.append(written[0].seal(sealed))
            return {}

        def publish_manifest() -> dict[str, Any]:
            if rank:
                return {}
            old = _members_of(target)
            if world > 1:
                members = tuple(Member(a["name"], a["size"], a["content"]) for a in answers[1:])
                manifest = dataclasses.replace(sealed, ranks=RankSet(set_id, members))
            else:
                manifest = sealed
            reports.append(written[0].seal(manifest))
            _relink(target, [a["name"] for a in answers[1:]])
            _remove(target.parent, [name for name in old if name not in {a["name"] for a in answers}])
            return {}

        try:
            ranks.step(publish_member)
            ranks.step(publish_manifest)
        except BaseException:
            if rank and reports and set_id not in _current_set(target):
                _remove(target.parent, [path.name])
            raise
        return reports[0]


class _Ranks:
    """Steps that every rank takes together and that fail together."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange, self._rank = exchange, rank

    def step(self, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        failure: BaseException | None = None
        try:
            answer = work()
        except Exception as error:
            failure, answer = error, {"error": f"{type(error).__name__}: {error}"[: MAX_MESSAGE // 4]}
        answers = [json.loads(message) for message in self._exchange(json.dumps(answer).encode())]
        if failure is not None:
            raise failure
        for rank, said in enumerate(answers):
            if "error" in said:
                raise StorageError(f"rank {rank} could not freeze: {said['error']}; nothing was published")
        return answers


def _members_of(target: Path) -> list[str]:
    """Names of the other ranks' files that the manifest at ``target`` speaks of, and those of abandoned sets."""
    names: set[str] = set()
    with contextlib.suppress(ThawError, OSError), open_snapshot(target, with_chunks=False) as opened:
        if opened.snapshot.header.ranks is not None:
            names.update(m.name for m in opened.snapshot.header.ranks.members)
    pattern = re.compile(re.escape(target.stem) + r"\.[0-9a-f]{12}\.rank[0-9]+" + re.escape(target.suffix))
    names.update(entry.name for entry in os.scandir(target.parent) if pattern.fullmatch(entry.name))
    return sorted(names)


def _current_set(target: Path) -> str:
    with contextlib.suppress(ThawError, OSError), open_snapshot(target, with_chunks=False) as opened:
        if opened.snapshot.header.ranks is not None:
            return opened.snapshot.header.ranks.id
    return ""


def _relink(target: Path, names: list[str]) -> None:
    """Point ``weights.rank1.thaw`` … to the current set; skipped where the file system has no links."""
    for rank, name in enumerate(names, 1):
        link = target.with_name(link_name(target, rank))
        staged = link.with_name(f".{link.name}.{secrets.token_hex(4)}.thaw-part")
        with contextlib.suppress(OSError):
            os.symlink(name, staged)
            os.rename(staged, link)
    pattern = re.compile(re.escape(target.stem) + r"\.rank([0-9]+)" + re.escape(target.suffix))
    for entry in list(os.scandir(target.parent)):
        found = pattern.fullmatch(entry.name)
        if found and int(found[1]) > len(names) and entry.is_symlink():
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    sync_directory(target.parent)


def _remove(directory: Path, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(directory / name)
