"""Opening a snapshot by path: the file of one rank, found through its set's manifest and checked against it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CorruptionError, MismatchError, ReplacedError, StorageError, ThawError
from ..format.chunks import KEPT, Chunk
from ..format.header import Header
from ..format.snapshot import Snapshot, read
from ..transport.files import Joined
from ..transport.source import FileSource, MemorySource, Source, read_bytes


@dataclass(frozen=True)
class Opened:
    """A snapshot's checked sections and its open source; both end with the ``with`` that gave it.

    Where bytes are kept in other ranks' files the source is these files together, and the snapshot's chunks, in order
    of their place in it, say where in it each lies and by which codec.

    Attributes:
        alone: the sections as they are in the rank's own file, where they differ.
    """

    source: Source
    snapshot: Snapshot
    alone: Snapshot | None = None


@contextlib.contextmanager
def open_snapshot(path: str | os.PathLike[str], *, with_chunks: bool = True, whole: bool = True) -> Iterator[Opened]:
    """Open one file and check everything before its payload.

    Args:
        with_chunks: False leaves the chunk table unread: nothing of the payload is wanted.
        whole: with the chunk table, refuse a file that has part of its bytes in others. False is for who looks at the
            sections only.

    Raises:
        StorageError: it cannot be opened or read.
        FormatError, VersionError, CorruptionError: it is not a sound snapshot; the message names the file.
        MismatchError: it is one rank of a set, and keeps bytes in the files of others.
    """
    with contextlib.closing(FileSource(path)) as source:
        yield Opened(source, sections(source, with_chunks=with_chunks, whole=whole))


@contextlib.contextmanager
def open_memory(data: bytes | bytearray | memoryview) -> Iterator[Opened]:
    """Open a snapshot that is in memory already; the buffer is borrowed."""
    source = MemorySource(data)
    try:
        yield Opened(source, sections(source))
    finally:
        source.close()


@contextlib.contextmanager
def open_rank(path: str | os.PathLike[str], rank: int, *, with_chunks: bool = True) -> Iterator[Opened]:
    """Open the file of ``rank`` of the set whose manifest is at ``path``.

    Raises:
        MismatchError: the set has no such rank.
        CorruptionError: the rank's file is missing or is not the one the manifest names.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_snapshot(path, with_chunks=with_chunks and rank == 0))
        header = opened.snapshot.header
        parallel = header.identity.parallel
        if rank == parallel.rank:
            if rank and with_chunks:
                opened = stack.enter_context(open_snapshot(path))
            yield opened
            return
        if parallel.rank != 0 or header.ranks is None or not 0 < rank < parallel.world:
            raise MismatchError(
                f"{os.fspath(path)!r} holds {parallel}, this engine process is rank {rank}; give the manifest's path "
                f"(rank 0's file) of a snapshot frozen with the engine's parallel sizes; this one is for "
                f"{' and '.join(parallel.options()) or 'a single rank'}"
            )
        own = stack.enter_context(_member(path, header, rank, with_chunks))
        if not (with_chunks and own.snapshot.index.kept):
            yield own
            return
        keepers = {0: Opened(opened.source, sections(opened.source))}
        for other in sorted({kept.rank for kept in own.snapshot.index.kept} - {0}):
            keepers[other] = stack.enter_context(_member(path, header, other, with_chunks))
        joined = _joined(own, keepers)
        with contextlib.closing(joined.source):
            yield joined


def require_one_set(opened: Iterable[Opened], path: str | os.PathLike[str]) -> None:
    """Refuse files that were opened one after the other, each by its manifest, while that was replaced.

    Raises:
        ReplacedError: they are of several sets.
    """
    if len({one.snapshot.header.set_id for one in opened}) > 1:
        raise ReplacedError(f"{os.fspath(path)!r} was replaced by another set while it was opened; start again")


@contextlib.contextmanager
def _member(path: str | os.PathLike[str], manifest: Header, rank: int, with_chunks: bool) -> Iterator[Opened]:
    """The file of a rank above 0, held against the manifest at ``path``."""
    assert manifest.ranks is not None
    member = manifest.ranks.members[rank - 1]
    place = Path(path).with_name(member.name)
    with contextlib.ExitStack() as stack:
        try:
            other = stack.enter_context(open_snapshot(place, with_chunks=with_chunks, whole=False))
        except StorageError as error:
            raise CorruptionError(
                f"rank {rank} of {os.fspath(path)!r} is missing: {error}; copy every file of the set, or freeze again"
            ) from None
        header = other.snapshot.header
        said = (
            other.source.size,
            header.content,
            header.ranks.id if header.ranks else "",
            header.identity.parallel.rank,
            header.identity.parallel.sizes,
        )
        if said != (member.size, member.content, manifest.ranks.id, rank, manifest.identity.parallel.sizes):
            raise CorruptionError(
                f"{str(place)!r} is not the file that {os.fspath(path)!r} names as its rank {rank}; the set is mixed "
                "up, copy all of it again or freeze again"
            )
        yield other


def _joined(own: Opened, keepers: dict[int, Opened]) -> Opened:
    """A rank's file and those that keep bytes of it, by rank, as one source, which is the caller's to close.

    Raises:
        CorruptionError: what is there is not what the rank's file says.
    """
    used = sorted({kept.rank for kept in own.snapshot.index.kept})
    files = [opened.source for opened in [own, *(keepers[rank] for rank in used)]]
    source = Joined([file for file in files if isinstance(file, FileSource)])
    begins = {rank: source.stride * number - own.snapshot.preamble.payload_at for number, rank in enumerate(used, 1)}
    held: dict[tuple[int, int, int], Chunk] = {}
    for rank in used:
        held |= {(rank, chunk.storage, chunk.at): chunk for chunk in keepers[rank].snapshot.chunks}
    elsewhere, chunks = own.snapshot.elsewhere, list[Chunk]()
    for chunk in own.snapshot.chunks:
        kept = elsewhere.get(chunk.storage)
        if kept is None:
            chunks.append(chunk)
            continue
        found = held.get((kept.rank, kept.there, chunk.at))
        lengths = own.snapshot.index.storages, keepers[kept.rank].snapshot.index.storages
        if (
            found is None
            or found.codec == KEPT
            or lengths[0][chunk.storage] != lengths[1][kept.there]
            or (found.length, found.xxh3, found.wordsum) != (chunk.length, chunk.xxh3, chunk.wordsum)
        ):
            raise CorruptionError(
                f"{keepers[kept.rank].source.name!r} does not have, as its storage {kept.there}, the bytes that "
                f"{own.source.name!r} keeps there; the set is mixed up, copy all of it again or freeze again"
            )
        place = begins[kept.rank] + keepers[kept.rank].snapshot.preamble.payload_at + found.stored_at
        chunks.append(replace(chunk, stored_at=place, stored=found.stored, codec=found.codec))
    chunks.sort(key=lambda chunk: chunk.stored_at)
    return Opened(source, replace(own.snapshot, chunks=tuple(chunks)), own.snapshot)


def sections(source: Source, *, with_chunks: bool = True, whole: bool = True) -> Snapshot:
    """Everything before the payload, read and checked; arguments and errors as for ``open_snapshot``."""
    try:
        found = read(lambda offset, length: read_bytes(source, offset, length), source.size, with_chunks=with_chunks)
    except ThawError as error:
        if repr(source.name) in str(error):
            raise
        raise type(error)(f"{source.name!r}: {error}") from None
    if found.index.kept and with_chunks and whole:
        raise MismatchError(
            f"{source.name!r} is rank {found.header.identity.parallel.rank} of a set and has part of its bytes in the "
            "files of other ranks; give the manifest's path (rank 0's file)"
        )
    return found
