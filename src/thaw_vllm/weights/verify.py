"""Holding a snapshot against its own checksums: no model, no accelerator, no torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import CorruptionError, ReplacedError
from ..format.chunks import Chunk
from ..format.snapshot import Snapshot
from ..transport import parallel
from ..transport.read import Piece, piece_of, read
from ..transport.source import Source
from .digest import block_digests, bytes_digest, content_id
from .open import Opened, open_rank, open_snapshot

SECTIONS = "sections"
"""Preamble, header, index and chunk table against their SHA-256, and against one another."""
CHUNKS = "chunks"
"""Every chunk against its XXH3-64."""
PADDING = "padding"
"""Every byte between sections and chunks is zero."""
CONTENT = "content"
"""The content id, computed again with BLAKE3 from every byte."""
SET = "set"
"""Every rank's file is there and is the one its manifest names: size, content id, set id, rank, parallel sizes."""

_GAPS = 256
"""Ranges of padding that one thread checks in turn; each is shorter than 4 KiB."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and found sound.

    Attributes:
        path: the file asked for.
        files: every file that was read, by rank; one unless it is the manifest of a set.
        bytes: of all of them.
        chunks: of all of them.
        content: the content id of the file at ``path``.
        model: its model id, when it has one; taken from the header, not computed.
        verified: which of SECTIONS, CHUNKS, PADDING, CONTENT, SET.
        seconds: everything counted.
    """

    path: str
    files: tuple[str, ...]
    bytes: int
    chunks: int
    content: str
    model: str | None
    verified: tuple[str, ...]
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes of file a second."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)


def verify(
    path: str | os.PathLike[str],
    *,
    ranks: bool = True,
    content: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read a whole snapshot and hold every byte of it against its checksums.

    Args:
        path: one file, or the manifest of a set.
        ranks: for a manifest, check every rank's file too.
        content: compute the content id as well (BLAKE3 of everything; a third to a half of the speed).
        workers: threads; None for what the machine bears.
        progress: called as (bytes done, bytes in all) from any thread.

    Raises:
        FormatError, VersionError: not a snapshot that this reader knows.
        CorruptionError: the first thing found damaged or missing; which tensor, and where in the file.
        ReplacedError: a file was written to, or the set was replaced, meanwhile.

    Notes:
        Memory is one MiB a thread, with ``content`` one chunk a thread; of compressed chunks more (``transport.read``).
    """
    start = time.perf_counter()
    workers = workers or parallel.default_workers()
    names: list[str] = []
    done = chunks = 0
    with open_snapshot(path, with_chunks=False) as opened:
        header, size = opened.snapshot.header, opened.source.size
    whole_set = ranks and header.ranks is not None and header.identity.parallel.rank == 0
    members = header.ranks.members if header.ranks is not None and whole_set else ()
    total = size + sum(member.size for member in members)
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    # A missing or foreign file is told before the first of them is read.
    for rank in range(1, len(members) + 1):
        with open_rank(path, rank, with_chunks=False):
            pass
    for rank in range(len(members) + 1):
        with open_rank(path, rank) if rank else open_snapshot(path) as opened:
            ours = opened.snapshot.header
            if ours != header if rank == 0 else ours.set_id != header.set_id:
                raise ReplacedError(f"{os.fspath(path)!r} was replaced while it was being verified; run it again")
            advance(opened.snapshot.preamble.payload_at)
            chunks += _check_chunks(opened, workers, content, advance)
            _check_padding(opened, workers)
            opened.source.check_unchanged()
            names.append(opened.source.name)
    verified = (SECTIONS, CHUNKS, PADDING) + ((CONTENT,) if content else ()) + ((SET,) if members else ())
    seconds = time.perf_counter() - start
    model = header.identity.model
    return VerifyReport(os.fspath(path), tuple(names), total, chunks, header.content, model, verified, seconds)


def _check_chunks(opened: Opened, workers: int, content: bool, advance: Callable[[int], None]) -> int:
    """Hold chunks against their checksums; returns how many are in the rank's own file.

    What is kept in another rank's file is read again for the content id only: that file is verified too.
    """
    snapshot = opened.snapshot
    elsewhere = snapshot.elsewhere
    own = [chunk for chunk in snapshot.chunks if chunk.storage not in elsewhere]
    owners = _owners(snapshot)
    base = snapshot.preamble.payload_at
    blocks: dict[tuple[int, int], list[bytes]] = {}

    def hashing(chunk: Chunk) -> Callable[[memoryview], None]:
        def deliver(data: memoryview) -> None:
            blocks[chunk.storage, chunk.at] = block_digests(data)

        return deliver

    def pieces(chunks: list[Chunk]) -> Iterator[Piece]:
        return (piece_of(c, base, owners[c.storage], deliver=hashing(c) if content else None) for c in chunks)

    read(opened.source, pieces(own), workers=workers, progress=advance)
    if not content:
        return len(own)
    read(opened.source, pieces([c for c in snapshot.chunks if c.storage in elsewhere]), workers=workers)
    storages: list[list[bytes]] = [[] for _ in snapshot.index.storages]
    for (storage, _), digests in sorted(blocks.items()):
        storages[storage] += digests
    found = content_id(snapshot.index, [bytes_digest(digests) for digests in storages])
    if found != snapshot.header.content:
        raise CorruptionError(
            f"{opened.source.name!r} says its content id is {snapshot.header.content}, its bytes give {found}; it was "
            "altered after it was frozen: get it again from where you trust it, or freeze again"
        )
    return len(own)


def _check_padding(opened: Opened, workers: int) -> None:
    gaps = (opened.alone or opened.snapshot).paddings()
    source: Source = opened.source

    def work(group: list[tuple[int, int]]) -> None:
        room = bytearray(max(length for _, length in group))
        zeros = bytes(len(room))
        for offset, length in group:
            view = memoryview(room)[:length]
            source.read_into(offset, view)
            if view != zeros[:length]:
                raise CorruptionError(
                    f"{source.name!r} is damaged: bytes {offset} to {offset + length} lie between its sections and "
                    "must be zero; copy the file again or freeze again"
                )

    groups = (gaps[at : at + _GAPS] for at in range(0, len(gaps), _GAPS))
    parallel.run(groups, work, min(workers, -(-len(gaps) // _GAPS)))


def _owners(snapshot: Snapshot) -> dict[int, str]:
    """What a message calls each storage: its first tensor, or the carried file."""
    found: dict[int, str] = {f.storage: f"the file {f.name!r}" for f in snapshot.index.files if f.storage is not None}
    for tensor in snapshot.index.tensors:
        if tensor.storage is not None:
            found.setdefault(tensor.storage, repr(tensor.name))
    return found
