"""Sets of rank files: rank 0's is the manifest, published last, so that a crash leaves the old set or the new one.

For ``weights.thaw`` frozen at tensor-parallel size 2 the directory holds::

    weights.thaw                            rank 0, the manifest: names, sizes and content ids of the others
    weights.5f0c31d2a7be.rank1.thaw         rank 1, under the set's own name
    weights.rank1.thaw                      a link to the file above, for people and older tools; never read by thaw

Other names are in ``rank_names``; for reading, those in the manifest count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FormatError, StorageError, ThawError, UsageError
from ..format.header import Header, Member, RankSet, plain_member_name
from ..format.preamble import MAGIC
from ..transport.source import FileSource, read_bytes
from ..transport.writer import check_target, remove_stale, staged, sync_directory
from . import once
from .capture import Captured
from .freeze import FreezeOptions, FreezeReport, SnapshotWriter
from .open import open_snapshot
from .rank_names import LABEL, link_name, member_name

Done = TypeVar("Done")
Exchange = Callable[[bytes], list[bytes]]
"""All ranks call it with a message of at most MAX_MESSAGE bytes; each gets everybody's, by rank."""

MAX_MESSAGE = 4096


def alone(message: bytes) -> list[bytes]:
    """The exchange of a single rank."""
    return [message]


def freeze_rank(
    target: str | Path,
    header: Header,
    captured: Captured,
    options: FreezeOptions,
    exchange: Exchange,
    model_id: Callable[[], str | None],
    check: Callable[[str], None] | None = None,
    mark: Callable[[Captured, int], bytes] = once.sampled,
) -> FreezeReport:
    """Write this rank's file of a set (or the only file) and publish the set once every rank has written.

    Every rank of the set calls it. When one fails, all of them raise, nothing of the new set stays and the old
    snapshot is untouched. When one is killed, or the ranks lose each other, what they leave behind is read by nobody
    and the next freeze of the same target removes it.

    Args:
        target: the manifest's path, the same for every rank.
        header: this rank's, ids unsealed.
        captured: this rank's tensors.
        options: as for a single file.
        exchange: an all-gather among the ranks.
        model_id: called on rank 0 once its payload is written; its answer goes into every rank's header.
        check: called on every rank with its content id, before anything is published; may raise.
        mark: of a storage, something that is equal where the bytes are, for less than reading all of them.

    Raises:
        ThawError: this rank's own failure, or StorageError naming the rank that failed.
    """
    target = Path(target).absolute()  # the process may change its directory meanwhile
    parallel = header.identity.parallel
    rank, world = parallel.rank, parallel.world
    ranks = _Ranks(exchange, rank)

    def prepare() -> dict[str, Any]:
        place = {"rank": rank, "sizes": parallel.sizes}
        if rank:
            return place
        check_target(target, options.force)
        set_id = secrets.token_hex(16)
        if world > 1:
            if not plain_member_name(member_name(target, set_id, parallel.at(world - 1))):
                raise UsageError(f"{target.name!r} cannot name a set of ranks; choose a plain name that is not hidden")
            for pattern in _any_member(target):
                remove_stale(target.parent, pattern)
        return place | {"set": set_id}

    places = ranks.step(prepare)
    if [(said["rank"], tuple(said["sizes"])) for said in places] != [(n, parallel.sizes) for n in range(world)]:
        raise StorageError(
            f"the processes that freeze {target.name!r} together are ranks {', '.join(str(p['rank']) for p in places)} "
            f"of sets of their own sizes, not the {world} of {parallel}, each once and in order; nothing was published"
        )
    set_id = places[0]["set"]
    path = target if rank == 0 else target.with_name(member_name(target, set_id, parallel))
    if world > 1:
        header = dataclasses.replace(header, ranks=RankSet(set_id))
    hopes: Sequence[once.Hopes] = [{} for _ in range(world)]
    if options.once and world > 1:
        marks: list[bytes] = []

        def look() -> dict[str, Any]:
            marks.append(once.marks(captured, options.chunk_size, mark))
            return {}

        ranks.step(look)
        hopes = once.hopes(ranks.tell(marks[0]))
    with contextlib.ExitStack() as stack:
        written: list[SnapshotWriter] = []

        def payload(kept: once.Hopes) -> dict[str, Any]:
            own = dataclasses.replace(options, force=options.force and rank == 0)
            others = world - 1 if rank == 0 else 0
            writer = stack.enter_context(SnapshotWriter(path, header, captured, own, others, kept))
            writer.write_payload()
            written[:] = [writer]
            return {}

        def settle() -> dict[str, Any]:
            if agreed != hopes[rank]:
                written[0].discard()
                payload(agreed)
            if check is not None:
                check(written[0].content)
            return {
                "name": path.name,
                "size": written[0].size,
                "content": written[0].content,
                "model": model_id() if rank == 0 else None,
            }

        agreed = hopes[rank]
        if any(hopes):
            ranks.step(lambda: payload(agreed))
            told = ranks.tell(once.digests(hopes, rank, written[0].digests))
            agreed = once.confirmed(hopes, rank, told)
            answers = ranks.step(settle)
        else:
            answers = ranks.step(lambda: payload(agreed) | settle())
        identity = dataclasses.replace(header.identity, model=answers[0]["model"])
        sealed = dataclasses.replace(header, identity=identity)
        reports: list[FreezeReport] = []
        members = [a["name"] for a in answers[1:]]

        def publish_member() -> dict[str, Any]:
            if rank:
                reports.append(written[0].seal(sealed))
            return {}

        def publish_manifest() -> dict[str, Any]:
            if rank:
                return {}
            _require_seen(target, answers)
            old = _superseded(target, written[0].staging)
            if world > 1:
                others = tuple(Member(a["name"], a["size"], a["content"]) for a in answers[1:])
                manifest = dataclasses.replace(sealed, ranks=RankSet(set_id, others))
            else:
                manifest = sealed
            reports.append(written[0].seal(manifest))
            with contextlib.suppress(OSError):  # the set is published; these are for tidiness
                _relink(target, {link_name(target, parallel.at(n)): name for n, name in enumerate(members, 1)})
            _remove(target.parent, [name for name in old if name not in members])
            return {}

        try:
            ranks.step(publish_member)
            ranks.step(publish_manifest, "the old snapshot or the new one is in place, whole")
        except BaseException:
            # Rank 0 knows whether it published. Another rank may remove its file only when it has rank 0's word that
            # the set failed: when it merely lost the others, rank 0 may be about to publish.
            if _current_set(target) != set_id:
                if rank == 0:
                    _remove(target.parent, members)
                elif ranks.agreed and reports:
                    _remove(target.parent, [path.name])
            raise
        return reports[0]


def in_step(exchange: Exchange, rank: int, work: Callable[[], Done]) -> Done:
    """What a rank's work gives, once every rank has done its own; raises in all of them where one failed."""
    done: list[Done] = []

    def step() -> dict[str, Any]:
        done.append(work())
        return {}

    _Ranks(exchange, rank).step(step)
    return done[0]


class _Ranks:
    """Steps that every rank takes together and that fail together.

    Attributes:
        agreed: the last step's answers arrived, so all ranks that have them go on or fail alike.
    """

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange, self._rank = exchange, rank
        self.agreed = False

    def tell(self, data: bytes) -> list[bytes]:
        """What every rank tells, of any length: in as many messages as the longest of all needs."""
        sizes = [int.from_bytes(size, "little") for size in self._exchange(len(data).to_bytes(8, "little"))]
        parts: list[list[bytes]] = [[] for _ in sizes]
        for at in range(0, max(sizes), MAX_MESSAGE):
            for found, part in zip(parts, self._exchange(data[at : at + MAX_MESSAGE]), strict=True):
                found.append(part)
        return [b"".join(found) for found in parts]

    def step(self, work: Callable[[], dict[str, Any]], outcome: str = "nothing was published") -> list[dict[str, Any]]:
        """Every rank's answer; raises where one failed, saying the outcome."""
        failure: BaseException | None = None
        self.agreed = False
        try:
            answer = work()
        except BaseException as error:  # Ctrl-C too: the others wait for this rank's answer
            failure, answer = error, {"error": f"{type(error).__name__}: {error}"}
        answers = [json.loads(message) for message in self._exchange(_message(answer))]
        self.agreed = True
        if failure is not None:
            raise failure
        for rank, said in enumerate(answers):
            if "error" in said:
                raise StorageError(f"rank {rank} could not freeze: {said['error']}; {outcome}")
        return answers


def _message(answer: dict[str, Any]) -> bytes:
    while len(message := json.dumps(answer).encode()) > MAX_MESSAGE and answer.get("error"):
        answer = {"error": answer["error"][: len(answer["error"]) // 2]}
    return message


def _require_seen(target: Path, answers: Sequence[dict[str, Any]]) -> None:
    """Refuse to name files that are not beside the manifest: ranks of other machines may have other disks.

    Raises:
        StorageError: one is not there.
    """
    for rank, said in enumerate(answers[1:], 1):
        try:
            size = os.stat(target.with_name(said["name"])).st_size
        except OSError:
            size = None
        if size != said["size"]:
            raise StorageError(
                f"what rank {rank} wrote is not in {str(target.parent)!r} as rank 0 sees it; give a directory that all "
                "ranks share"
            )


def _superseded(target: Path, own: Path) -> list[str]:
    """Names of rank files, of the set at ``target`` or of abandoned ones, that a new set there leaves without a use.

    Judged by their names alone, never by what a manifest claims: a hostile one could name any file. A file that another
    snapshot in the directory names (a manifest that was copied or renamed) stays, and while another writer of the same
    target lives, so does everything that might be its own.

    Args:
        own: this writer's hidden file.
    """
    pattern = re.compile(rf"{re.escape(target.stem)}\.[0-9a-f]{{12}}\.{LABEL}{re.escape(target.suffix)}")
    found: set[str] = set()
    named: set[str] = set()
    current: set[str] = set()
    try:
        for entry in os.scandir(target.parent):
            if pattern.fullmatch(entry.name):
                found.add(entry.name)
            elif entry.is_file():
                names = _members(Path(entry.path))
                (current if entry.name == target.name else named).update(names)
    except (StorageError, OSError):
        return []
    alone = staged(target.parent, glob.escape(target.name)) == [own]
    return sorted((found if alone else found & current) - named)


def _members(path: Path) -> set[str]:
    """Names of the other ranks' files that a manifest speaks of; none for any other file.

    Raises:
        StorageError: a snapshot that cannot be read, of a later version or not all there yet: it could name any file.
    """
    with FileSource(path) as source:
        if source.size < len(MAGIC) or read_bytes(source, 0, len(MAGIC)) != MAGIC:
            return set()
    try:
        with open_snapshot(path, with_chunks=False) as opened:
            ranks = opened.snapshot.header.ranks
    except FormatError as error:
        raise StorageError(str(error)) from None
    return set() if ranks is None else {m.name for m in ranks.members}


def _any_member(target: Path) -> list[str]:
    """Patterns of the names that a set's ranks are stored under."""
    start = f"{glob.escape(target.stem)}.{'[0-9a-f]' * 12}"
    return [f"{start}.{kind}[0-9]*{glob.escape(target.suffix)}" for kind in ("rank", "pp", "dp")]


def _current_set(target: Path) -> str:
    with contextlib.suppress(ThawError, OSError), open_snapshot(target, with_chunks=False) as opened:
        if opened.snapshot.header.ranks is not None:
            return opened.snapshot.header.ranks.id
    return ""


def _relink(target: Path, links: dict[str, str]) -> None:
    """Point ``weights.rank1.thaw`` … to the current set; skipped where the file system has no links.

    A file of that name that is no link, or a link to anything but a set's file, is not ours and stays.
    """
    stem, suffix = re.escape(target.stem), re.escape(target.suffix)
    member = re.compile(rf"{stem}\.[0-9a-f]{{12}}\.{LABEL}{suffix}")

    def ours(link: str | os.PathLike[str]) -> bool:
        return os.path.islink(link) and member.fullmatch(os.readlink(link)) is not None

    for name, file in links.items():
        link = target.with_name(name)
        if os.path.lexists(link) and not ours(link):
            continue
        new = link.with_name(f".{name}.{secrets.token_hex(4)}.thaw-part")
        with contextlib.suppress(OSError):
            os.symlink(file, new)
            os.rename(new, link)
    named = re.compile(rf"{stem}\.{LABEL}{suffix}")
    hidden = re.compile(rf"\.{stem}\.{LABEL}{suffix}\.[0-9a-f]{{8}}\.thaw-part")
    for entry in list(os.scandir(target.parent)):
        # The hidden ones are links of a writer that was killed before it could rename them.
        left = named.fullmatch(entry.name) and entry.name not in links and ours(entry.path)
        if entry.is_symlink() and (left or hidden.fullmatch(entry.name)):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    sync_directory(target.parent)


def _remove(directory: Path, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(directory / name)
