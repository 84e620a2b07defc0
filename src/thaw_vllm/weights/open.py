"""Opening a snapshot by path: the file of one rank, found through its set's manifest and checked against it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptionError, MismatchError, StorageError, ThawError
from ..format.snapshot import Snapshot, read
from ..transport.source import FileSource, MemorySource, Source, read_bytes


@dataclass(frozen=True)
class Opened:
    """A snapshot's checked sections and its open source; both end with the ``with`` that gave it."""

    source: Source
    snapshot: Snapshot


@contextlib.contextmanager
def open_snapshot(path: str | os.PathLike[str], *, with_chunks: bool = True) -> Iterator[Opened]:
    """Open one file and check everything before its payload.

    Raises:
        StorageError: it cannot be opened or read.
        FormatError, VersionError, CorruptionError: it is not a sound snapshot; the message names the file.
    """
    source = FileSource(path)
    try:
        yield Opened(source, sections(source, with_chunks=with_chunks))
    finally:
        source.close()


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
        parallel, ranks = opened.snapshot.header.identity.parallel, opened.snapshot.header.ranks
        if rank == parallel.rank:
            if rank and with_chunks:
                opened = stack.enter_context(open_snapshot(path))
            yield opened
            return
        if parallel.rank != 0 or ranks is None or not 0 < rank < parallel.world:
            raise MismatchError(
                f"{os.fspath(path)!r} holds {parallel}, this engine process is rank {rank}; give the manifest's path "
                f"(rank 0's file) of a snapshot frozen with the engine's parallel sizes; this one is for "
                f"{' and '.join(parallel.options()) or 'a single rank'}"
            )
        member = ranks.members[rank - 1]
        place = Path(path).with_name(member.name)
        try:
            other = stack.enter_context(open_snapshot(place, with_chunks=with_chunks))
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
        if said != (member.size, member.content, ranks.id, rank, parallel.sizes):
            raise CorruptionError(
                f"{str(place)!r} is not the file that {os.fspath(path)!r} names as its rank {rank}; the set is mixed "
                "up, copy all of it again or freeze again"
            )
        yield other


def sections(source: Source, *, with_chunks: bool = True) -> Snapshot:
    """Everything before the payload, read and checked; errors as for ``open_snapshot``."""
    try:
        return read(lambda offset, length: read_bytes(source, offset, length), source.size, with_chunks=with_chunks)
    except ThawError as error:
        if repr(source.name) in str(error):
            raise
        raise type(error)(f"{source.name!r}: {error}") from None
