"""Writing one rank's file: chunks hashed and written in parallel, the sections before them last."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..codecs import encode
from ..errors import FormatError, UnsupportedError, UsageError
from ..format.chunks import KEPT, PLANES, RAW, Chunk
from ..format.document import dump
from ..format.dtypes import ITEM_SIZE
from ..format.header import Header
from ..format.identity import Identity
from ..format.index import Index, Kept, from_json
from ..format.limits import DEFAULT_CHUNK, HASH_BLOCK, MAX_CHUNK
from ..format.preamble import align
from ..format.snapshot import front, lay_out, read
from ..transport import parallel
from ..transport.checksum import wordsum, xxh3
from ..transport.drain import Drain, DrainLane, Run
from ..transport.writer import StagedFile
from .capture import Captured
from .digest import block_digests, bytes_digest, content_id, model_id
from .layout import byte_view, host_bytes, integers
from .waterfall import waterfall

STAGING = 256 << 20
"""Most bytes of slots, one a thread and a chunk long: where they would be more, a freeze takes fewer threads."""

_SEAL_ROOM = 512
"""Bytes a header may grow by when the ids are filled in, beside its set's members."""
_MEMBER_ROOM = 640
"""A member's entry: a name of 255 bytes, each escaped in JSON, its digest and size."""


@dataclass(frozen=True)
class FreezeOptions:
    """How a snapshot is written.

    Attributes:
        force: replace an existing file.
        mode: permission bits of the file, 0 to 0o777.
        chunk_size: bytes, a multiple of 4 MiB up to 64 MiB.
        compress: store chunks by codec 1 that a sample of them says become shorter. Takes the room of the original
            bytes while it writes.
        workers: threads; None for what the machine bears.
        progress: called as (original bytes done, bytes in all) from any thread.
        once: of several ranks, leave to the lowest of them what they hold alike, to the last bit (``weights.once``).
        encoder: a GPU that compresses what is in host memory, as torch counts; None for processors. What is in a GPU's
            memory is compressed by that GPU.
    """

    force: bool = False
    mode: int = 0o600
    chunk_size: int = DEFAULT_CHUNK
    compress: bool = False
    workers: int | None = None
    progress: Callable[[int, int], None] | None = None
    encoder: int | None = None
    once: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size % HASH_BLOCK or not 0 < self.chunk_size <= MAX_CHUNK:
            raise UsageError(f"chunk_size must be a multiple of {HASH_BLOCK} up to {MAX_CHUNK}, not {self.chunk_size}")
        if not 0 <= self.mode <= 0o777:
            raise UsageError(f"mode must be permission bits up to 0o777, not {self.mode:#o}")
        if not isinstance(self.compress, bool):
            raise UsageError(f"compress must be True or False, not {self.compress!r}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, not {self.workers}")


@dataclass(frozen=True)
class FreezeReport:
    """What was written and how long it took.

    Attributes:
        path: the published file.
        bytes: original bytes of all storages.
        file_size: bytes of the file.
        tensors: names in the index.
        content: the content id.
        model: the model id, when it is known.
        seconds: by phase (``payload``, ``publish``, ``total``).
        route: how the bytes were written.
        why: why that way.
        kept: of ``bytes``, those that another rank's file has.
    """

    path: str
    bytes: int
    file_size: int
    tensors: int
    content: str
    model: str | None
    seconds: dict[str, float]
    route: str = ""
    why: str = ""
    kept: int = 0

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes of original bytes a second, everything counted."""
        return self.bytes / 1e9 / max(self.seconds["total"], 1e-9)

    def waterfall(self) -> str:
        """The phases as lines of text with bars."""
        return waterfall(self.seconds)


class SnapshotWriter:
    """One file on its way: ``write_payload``, then ``seal`` with the ids that only then are known.

    Two steps, because the ranks of a set tell each other their content ids in between. A context manager: leaving it
    unsealed removes what was written.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        header: Header,
        captured: Captured,
        options: FreezeOptions,
        members: int = 0,
        kept: Mapping[int, Kept] | None = None,
    ) -> None:
        """Reserve the file.

        Args:
            header: with its ids unsealed.
            members: how many the set will name in it.
            kept: storages that are hashed and not written, by number: another rank's file will have their bytes.

        Raises:
            UnsupportedError: a name, a view or a value that the format has no place for.
            ExistsError, SpaceError, StorageError, UsageError: see StagedFile.
        """
        self._start = time.perf_counter()
        try:  # what a reader would refuse
            Identity.from_json(header.identity.to_json())
            self._index = dataclasses.replace(captured.index, kept=tuple(kept[n] for n in sorted(kept)) if kept else ())
            from_json(self._index.to_json())
            self._header_size = len(dump(header.to_json())) + _SEAL_ROOM + members * _MEMBER_ROOM
            self._chunks = lay_out(captured.index.storages, options.chunk_size, kept or ())
            _, preamble = front(header, self._index, self._chunks, self._header_size)
        except FormatError as error:
            raise UnsupportedError(f"a snapshot cannot hold this: {error}") from None
        self._header, self._captured, self._options = header, captured, options
        self._payload_at = preamble.payload_at
        self.size = preamble.file_size
        self.content = ""
        self.digests: list[str] = []
        self.seconds: dict[str, float] = {}
        self._file = StagedFile(target, self.size, force=options.force, mode=options.mode)

    def write_payload(self) -> str:
        """Write and checksum every chunk; returns the content id.

        Each thread takes a chunk, brings it from the device into its slot, hashes it while it is hot, and writes it,
        while other threads do the same with others.
        """
        options, storages, file = self._options, self._captured.storages, self._file
        total = sum(self._captured.index.storages)
        runs = {n: run for n, c in enumerate(self._chunks) if (run := storages[c.storage].run(c.at, c.length))}
        longest = max((chunk.length for chunk in self._chunks), default=0)
        aligned = file.bulk.aligned
        encoder = options.encoder if options.compress else None
        staged = bool(runs) or aligned or encoder is not None
        workers = min(options.workers or parallel.default_workers(), max(1, len(self._chunks)))
        if staged and longest:
            workers = max(1, min(workers, STAGING // longest))
        blocks: dict[tuple[int, int], list[bytes]] = {}
        sums: dict[int, Chunk] = {}
        lock = threading.Lock()
        pending = parallel.Shared(enumerate(self._chunks))
        done = 0
        order, widths = _Order(), element_sizes(self._captured.index)

        def write(number: int, chunk: Chunk, lane: DrainLane | None) -> None:
            nonlocal done
            if number in runs and lane is not None:
                padded = lane.bring(runs[number])
            else:
                padded = storages[chunk.storage].read(chunk.at, chunk.length)
                if lane is not None and (aligned or lane.encodes(None)):
                    padded = lane.hold(padded)
            data = padded[: chunk.length]
            digests = block_digests(data)
            found = on_device[number] if number in on_device else wordsum(data)
            summed = dataclasses.replace(chunk, xxh3=xxh3(data), wordsum=found)
            if options.compress:
                codec, stored = KEPT, 0
                if chunk.codec != KEPT:
                    width = widths[chunk.storage]
                    codec, stored, padded = _shortened(runs.get(number), width, padded, chunk.length, lane)
                place = order.place(number, stored)
                if place is None:  # another thread has failed, and says why
                    return
                summed = dataclasses.replace(summed, codec=codec, stored=stored, stored_at=place)
            if summed.codec != KEPT:
                file.write_bulk(self._payload_at + summed.stored_at, padded)
            with lock:
                sums[number], blocks[chunk.storage, chunk.at] = summed, digests
                done += chunk.length
                if options.progress is not None:
                    options.progress(done, total)

        def body(stop: threading.Event) -> None:
            with drain.lane() if staged else contextlib.nullcontext() as lane:
                for number, chunk in pending:
                    if stop.is_set():
                        return order.abandon()
                    try:
                        write(number, chunk, lane)
                    except BaseException:
                        order.abandon()
                        raise

        devices = sorted({run.device for run in runs.values()})
        with Drain(workers if staged else 1, longest or 1, devices) as drain:
            on_device = dict(zip(runs, drain.sums(list(runs.values())), strict=True))
            if options.compress:
                drain.compress(encoder)
            parallel.crew(body, workers)
        self._chunks = tuple(sums[i] for i in range(len(self._chunks)))
        if options.compress:
            self.size = self._payload_at + order.end
            file.cut(self.size)
        by_storage: list[list[bytes]] = [[] for _ in storages]
        for (storage, _), digests in sorted(blocks.items()):
            by_storage[storage] += digests
        self.digests = [bytes_digest(found) for found in by_storage]
        self.content = content_id(self._captured.index, self.digests)
        self.seconds["payload"] = time.perf_counter() - self._start
        return self.content

    def seal(self, header: Header) -> FreezeReport:
        """Write the sections before the payload and give the file its name."""
        start = time.perf_counter()
        header = dataclasses.replace(header, content=self.content)
        head, preamble = front(header, self._index, self._chunks, self._header_size)
        if preamble.payload_at != self._payload_at:
            raise AssertionError("the sealed header outgrew the room reserved for it")
        read(lambda offset, length: head[offset : offset + length], preamble.file_size)  # as a reader will
        self._file.write(0, head)
        self._file.publish()
        self.seconds["publish"] = time.perf_counter() - start
        self.seconds["total"] = time.perf_counter() - self._start
        index = self._index
        return FreezeReport(
            str(self._file.target),
            sum(index.storages),
            preamble.file_size,
            len(index.tensors),
            self.content,
            header.identity.model,
            self.seconds,
            self._file.bulk.route,
            self._file.bulk.why,
            sum(index.storages[kept.storage] for kept in index.kept),
        )

    @property
    def staging(self) -> Path:
        """The hidden file that is being written."""
        return self._file.path

    def discard(self) -> None:
        """Remove what was written, unless it was sealed."""
        self._file.discard()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def _shortened(
    run: Run | None, width: int, padded: memoryview, length: int, lane: DrainLane | None
) -> tuple[int, int, memoryview]:
    """Codec of a chunk, stored bytes, and these themselves, filled up where its own are.

    Args:
        run: where it lies in a GPU's memory.
        width: of its elements; 0 where it is to stay as it is.
        padded: its bytes.
        length: of them.
        lane: holds them.
    """
    if lane is not None and width and lane.encodes(run):
        size = lane.encode(run, width) if run is not None else lane.encode_held(length, width)
        return (RAW, length, padded) if size is None else (PLANES, size, lane.padded(size))
    codec, stored = encode(padded[:length], width) if width else (RAW, padded)
    if codec == RAW:
        return RAW, length, padded
    return codec, len(stored), memoryview(stored) if lane is None else lane.hold(memoryview(stored))


class _Order:
    """Where chunks lie whose stored lengths are known one by one, in any order: one after another all the same.

    Attributes:
        end: of the last one that has its place, rounded up to ALIGNMENT.
    """

    def __init__(self) -> None:
        self.end, self._next = 0, 0
        self._changed = threading.Condition()

    def place(self, number: int, length: int) -> int | None:
        """The offset of a chunk in the payload; waits for those before it. None when one of them will have none."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number or self._next < 0)
            if self._next < 0:
                return None
            at, self.end = self.end, align(self.end + length)
            self._next += 1
            self._changed.notify_all()
            return at

    def abandon(self) -> None:
        """A chunk will get no place: nobody waits for it."""
        with self._changed:
            self._next = -1
            self._changed.notify_all()


def element_sizes(index: Index) -> list[int]:
    """Bytes of the elements of each storage, by its first tensor; 0 for a carried file, which stays as it is."""
    found = [0] * len(index.storages)
    for tensor in reversed(index.tensors):
        if tensor.storage is not None:
            found[tensor.storage] = ITEM_SIZE[tensor.dtype]
    return found


def write_snapshot(
    target: str | os.PathLike[str],
    header: Header,
    captured: Captured,
    options: FreezeOptions,
    identify: Callable[[Captured, list[str]], str] | None = None,
) -> FreezeReport:
    """Write one file that belongs to no set.

    Args:
        identify: gives the model id from what was captured and its storages' digests, once they are known.
    """
    with SnapshotWriter(target, header, captured, options) as writer:
        writer.write_payload()
        if identify is not None:
            identity = dataclasses.replace(header.identity, model=identify(captured, writer.digests))
            header = dataclasses.replace(header, identity=identity)
        return writer.seal(header)


def tensors_id(captured: Captured, digests: list[str]) -> str:
    """The model id of tensors that are their own source: each name, dtype, shape and elements in row-major order.

    Args:
        captured: the tensors.
        digests: of each storage's bytes; spares hashing again what lies row-major and whole in its storage.
    """
    entries = []
    for entry, tensor in zip(captured.index.tensors, captured.tensors, strict=True):
        whole = entry.storage is not None and captured.index.storages[entry.storage] == entry.bytes
        if whole and tensor.is_contiguous():
            digest = digests[entry.storage or 0]
        else:
            packed = integers(tensor).contiguous().cpu()
            digest = bytes_digest(block_digests(host_bytes(byte_view(packed)))) if entry.elements else bytes_digest([])
        entries.append((entry.name, entry.dtype, entry.shape, digest))
    return model_id(entries)
