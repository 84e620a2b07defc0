"""A snapshot written again with another codec: the same header, tensors and ids, other stored bytes."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import CorruptionError, DeviceError, StorageError, UsageError
from ..format.chunks import Chunk
from ..format.limits import DEFAULT_CHUNK, HASH_BLOCK
from ..transport import parallel
from ..transport.cuda import Context
from ..transport.drain import Run
from ..transport.read import piece_of, read
from ..transport.writer import check_target
from .capture import Captured
from .freeze import FreezeOptions, FreezeReport
from .open import Opened, open_rank, open_snapshot, require_one_set
from .ranks import Exchange, freeze_rank

_GLANCE = 0.2
"""Seconds between two looks at whether others have failed."""


def rewrite(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    compress: bool = True,
    once: bool | None = None,
    force: bool = False,
    workers: int | None = None,
    encoder: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[FreezeReport]:
    """Write a snapshot anew, every chunk verified on its way, and the content id before it is published; ids stay.

    Args:
        source: one file, or the manifest of a set, of which every rank's file is written.
        target: where to; no file of ``source``.
        compress: by codec 1 what it makes shorter; False for nothing compressed.
        once: see FreezeOptions; None as it is in ``source``.
        force: replace what is there.
        workers: threads; None for what the machine bears.
        encoder: see FreezeOptions; where there is no such GPU, or too little of its memory is free, processors.
        progress: called as (original bytes done, bytes in all) from any thread.

    Returns:
        One report a rank.

    Raises:
        UsageError: another rank's file of a set than its manifest; a file of the source as target.
        FormatError, VersionError, CorruptionError, StorageError: the source is unsound or cannot be read.
        ExistsError, SpaceError: of the target.
        ReplacedError: the source was replaced while it was opened.
    """
    place = Path(target)
    check_target(place, force)
    with open_snapshot(source, with_chunks=False) as opened:
        identity, ranks = opened.snapshot.header.identity, opened.snapshot.header.ranks
        world = len(ranks.members) + 1 if ranks is not None else 1
        if ranks is not None and identity.parallel.rank:
            raise UsageError(f"{os.fspath(source)!r} is one rank of a set; give the manifest, rank 0's file")
    with contextlib.ExitStack() as stack:
        encoder = encoder if compress and encoder is not None and _held(encoder, stack) else None
        every = [stack.enter_context(open_rank(source, rank)) for rank in range(world)]
        require_one_set(every, source)
        for found in every:
            with contextlib.suppress(OSError):
                if os.path.samefile(found.source.name, place):
                    raise UsageError(
                        f"{str(place)!r} is read while it would be written; choose another name, then rename it"
                    )
        if once is None:
            once = any(found.snapshot.index.kept for found in every)
        total = sum(found.snapshot.bytes for found in every)
        share = max(1, (workers or parallel.default_workers()) // world)
        reports: dict[int, FreezeReport] = {}
        done, lock = [0] * world, threading.Lock()
        board, numbers = _Board(world), [*range(world)]

        def body(stop: threading.Event) -> None:
            rank = numbers.pop()
            opened = every[rank]
            header, index = opened.snapshot.header, opened.snapshot.index

            def advance(count: int, _: int) -> None:
                if stop.is_set():
                    raise StorageError("writing was broken off")
                with lock:
                    done[rank] = count
                    if progress is not None:
                        progress(sum(done), total)

            def check(content: str) -> None:
                opened.source.check_unchanged()
                if content != header.content:
                    raise CorruptionError(
                        f"{opened.source.name!r} says its content id is {header.content}, its bytes give {content}; it "
                        "was altered after it was frozen: get it again from where you trust it, or freeze again"
                    )

            options = FreezeOptions(force, 0o600, _chunk_size(opened), compress, share, advance, encoder, once)
            captured = Captured(dataclasses.replace(index, kept=()), _storages(opened), ())
            exchange, model = board.exchange(rank, stop), header.identity.model
            sums = _sums(opened)
            reports[rank] = freeze_rank(
                place, header, captured, options, exchange, lambda: model, check, lambda _, storage: sums[storage]
            )

        if world == 1:
            body(threading.Event())
        else:
            parallel.crew(body, world)
    return [reports[rank] for rank in range(world)]


def _held(gpu: int, stack: contextlib.ExitStack) -> bool:
    """Whether there is a GPU of this number, and a driver; its context, which takes long to make, stays meanwhile."""
    with contextlib.suppress(DeviceError):
        stack.enter_context(contextlib.closing(Context(gpu)))
        return True
    return False


def _chunk_size(opened: Opened) -> int:
    """The same chunks again, where they are all of one size."""
    return max(
        (chunk.length for chunk in opened.snapshot.chunks if not chunk.length % HASH_BLOCK), default=DEFAULT_CHUNK
    )


def _storages(opened: Opened) -> tuple[_Stored, ...]:
    chunks: list[list[Chunk]] = [[] for _ in opened.snapshot.index.storages]
    for chunk in opened.snapshot.chunks:
        chunks[chunk.storage].append(chunk)
    return tuple(_Stored(opened, number, found) for number, found in enumerate(chunks))


def _sums(opened: Opened) -> list[bytes]:
    """Of each storage, the checksums of its chunks: what is equal where the bytes are, without reading them."""
    found = [b""] * len(opened.snapshot.index.storages)
    for chunk in opened.snapshot.chunks:
        found[chunk.storage] += chunk.xxh3.to_bytes(8, "little") + chunk.wordsum.to_bytes(8, "little")
    return found


class _Stored:
    """A storage of a snapshot; see ``capture.Storage``. Every chunk is verified each time that some of it is read."""

    def __init__(self, opened: Opened, number: int, chunks: list[Chunk]) -> None:
        self.length, self._chunks = opened.snapshot.index.storages[number], chunks
        self._source, self._base = opened.source, opened.snapshot.preamble.payload_at
        self._label = f"storage {number}"

    def read(self, at: int, length: int) -> memoryview:
        """See Storage."""
        out = memoryview(bytearray(length))
        first = bisect.bisect_right(self._chunks, at, key=lambda chunk: chunk.at) - 1
        for chunk in self._chunks[first:]:
            if chunk.at >= at + length:
                break
            low, high = max(at, chunk.at), min(at + length, chunk.at + chunk.length)
            whole = high - low == chunk.length
            room = out[low - at : high - at] if whole else memoryview(bytearray(chunk.length))
            read(self._source, [piece_of(chunk, self._base, self._label, room)], workers=1)
            if not whole:
                out[low - at : high - at] = room[low - chunk.at : high - chunk.at]
        return out

    def run(self, at: int, length: int) -> Run | None:
        """They are in host memory."""
        return None


class _Board:
    """Where threads, one a rank, exchange messages; who waits looks whether the others are to stop."""

    def __init__(self, world: int) -> None:
        self._world, self._round = world, 0
        self._given: dict[int, bytes] = {}
        self._last: list[bytes] = []
        self._changed = threading.Condition()

    def exchange(self, rank: int, stop: threading.Event) -> Exchange:
        """For the thread of a rank.

        Args:
            stop: set when another thread has failed, or the caller was interrupted.
        """

        def exchanged(message: bytes) -> list[bytes]:
            with self._changed:
                now = self._round
                self._given[rank] = message
                if len(self._given) == self._world:
                    self._last, self._given = [self._given[n] for n in range(self._world)], {}
                    self._round += 1
                    self._changed.notify_all()
                while self._round == now:
                    if stop.is_set():
                        raise StorageError("writing was broken off")
                    self._changed.wait(_GLANCE)
                return self._last  # the next round cannot end before this rank has come back

        return exchanged
