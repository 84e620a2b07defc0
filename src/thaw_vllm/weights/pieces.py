"""A snapshot's bytes in pieces, as they go from tensors to a wire, and from it into tensors of the same names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import xxhash

from ..format.chunks import Chunk
from ..format.index import Tensor
from ..format.snapshot import Snapshot
from ..transport.checksum import damaged
from ..transport.cuda import Context
from ..transport.links import by_driver
from ..transport.wordsum_cuda import CudaSums
from ..transport.wordsum_torch import wordsum
from .layout import byte_view, dense, host_bytes, integers, ordered, runs
from .restore import same_strides

PIECE = 256 << 20
"""Bytes of a piece, about: large enough that what each costs beside its bytes does not count, and small enough that the
last one's way is short beside the reading of all."""
SMALL = 1 << 20
"""Bytes of a span below which it is sent together with others."""
_ALIGNED = 512


class Span(NamedTuple):
    """A run of a storage's bytes, of whole chunks."""

    storage: int
    at: int
    length: int
    chunks: tuple[Chunk, ...]


@dataclass
class Piece:
    """Spans that are sent one after the other: large ones each on its own, small ones together."""

    large: list[Span] = field(default_factory=list)
    small: list[Span] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """All of them."""
        return self.large + self.small

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(span.length for span in self.spans)


def pieces(snapshot: Snapshot, most: int = PIECE) -> list[Piece]:
    """What to send, in the order in which the file is read; the same for all who have the same chunk table.

    Args:
        most: bytes of a piece, but for one chunk.
    """
    wanted = {entry.storage for entry in snapshot.index.tensors}
    found: list[list[list[Chunk]]] = []  # pieces of spans of chunks
    room = 0
    for chunk in snapshot.chunks:
        if chunk.storage not in wanted:
            continue
        if room < chunk.length or not found:
            found.append([])
            room = most
        room -= chunk.length
        last = found[-1][-1][-1] if found[-1] else None
        if last is not None and (last.storage, last.at + last.length) == (chunk.storage, chunk.at):
            found[-1][-1].append(chunk)
        else:
            found[-1].append([chunk])
    made = []
    for several in found:
        spans = [Span(of[0].storage, of[0].at, sum(c.length for c in of), tuple(of)) for of in several]
        made.append(Piece([s for s in spans if s.length >= SMALL], [s for s in spans if s.length < SMALL]))
    return made


class Wire:
    """One rank's tensors as what is sent: uint8 tensors, the tensors' own memory where it lies as the file has it.

    What does not, and small spans, pass through scratch memory, as much as one piece needs at most.
    """

    def __init__(self, snapshot: Snapshot, targets: Mapping[str, torch.Tensor], planned: Sequence[Piece]) -> None:
        """
        Args:
            targets: as for ``restore``, matched; all on one device.
            planned: all pieces.
        """
        self._owners: dict[int, Tensor] = {}
        self._direct: dict[int, torch.Tensor] = {}
        self._targets = targets
        for entry in snapshot.index.tensors:
            if entry.storage is None or entry.storage in self._owners:
                continue
            self._owners[entry.storage], target = entry, targets[entry.name]
            if dense(target) and same_strides(target.stride(), entry):
                self._direct[entry.storage] = byte_view(target.detach())
        self.device = next(iter(targets.values())).device if targets else torch.device("cpu")
        self._at: dict[tuple[int, int], int] = {}
        need = 0
        for piece in planned:
            end = 0
            for span in self._through(piece):
                self._at[span.storage, span.at] = end
                end += _padded(span)
            need = max(need, end)
        self._scratch = torch.empty(need, dtype=torch.uint8, device=self.device)

    def views(self, piece: Piece) -> list[torch.Tensor]:
        """What is sent of a piece, in order."""
        end = sum(_padded(span) for span in piece.small)
        found = [self._scratch[:end]] if end else []
        return found + [self._place(span) for span in piece.large]

    @torch.inference_mode()
    def gather(self, piece: Piece) -> None:
        """Bring what passes through scratch memory there."""
        for span in self._through(piece):
            place = self._place(span)
            if span.storage in self._direct:
                place.copy_(self._direct[span.storage][span.at : span.at + span.length])
                continue
            for part, elements in self._elements(span, place):
                elements.copy_(part)

    @torch.inference_mode()
    def scatter(self, piece: Piece) -> None:
        """Bring it from there to where it belongs."""
        for span in self._through(piece):
            place = self._place(span)
            if span.storage in self._direct:
                self._direct[span.storage][span.at : span.at + span.length].copy_(place)
                continue
            for part, elements in self._elements(span, place):
                part.copy_(elements)

    def chunks(self, piece: Piece) -> Iterator[tuple[Chunk, torch.Tensor, str]]:
        """Each chunk, its bytes as they were sent, and what messages call it."""
        for span in piece.spans:
            place = self._place(span)
            for chunk in span.chunks:
                begin = chunk.at - span.at
                yield chunk, place[begin : begin + chunk.length], repr(self._owners[span.storage].name)

    def _through(self, piece: Piece) -> list[Span]:
        """Spans in scratch memory, in their order there: small ones first, since they are sent as one."""
        return piece.small + [span for span in piece.large if span.storage not in self._direct]

    def _place(self, span: Span) -> torch.Tensor:
        begin = self._at.get((span.storage, span.at))
        if begin is not None:
            return self._scratch[begin : begin + span.length]
        return self._direct[span.storage][span.at : span.at + span.length]

    def _elements(self, span: Span, place: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of a tensor that lies in another order, and the elements of the file's order that they are."""
        owner = self._owners[span.storage]
        seen = ordered(integers(self._targets[owner.name]), owner.stride)
        elements, item, position = place.view(seen.dtype), seen.element_size(), 0
        for part in runs(seen, span.at // item, (span.at + span.length) // item):
            yield part, elements[position : position + part.numel()].view(part.shape)
            position += part.numel()


def _padded(span: Span) -> int:
    return -(-span.length // _ALIGNED) * _ALIGNED


class Checks:
    """Chunks held against the table where they have arrived; one thread at a time, a context manager.

    Attributes:
        kind: by which checksum, as in reports.
    """

    def __init__(self, name: str, device: torch.device, payload_at: int, count: int) -> None:
        """
        Args:
            name: what messages call the file.
            payload_at: of the file.
            count: chunks at most.
        """
        self._name, self._device, self._first, self._count = name, device, payload_at, count
        self._sums: CudaSums | None = None
        self._context: Context | None = None
        self._stack = contextlib.ExitStack()
        self.kind = "xxh3" if device.type == "cpu" else "wordsum"

    def check(self, arrived: Sequence[tuple[Chunk, torch.Tensor, str]]) -> None:
        """
        Args:
            arrived: as of ``Wire.chunks``; on a GPU the calling thread has waited for them.

        Raises:
            CorruptionError: one does not agree.
        """
        if self._context is not None:
            with self._context.entered():
                found = self._summed([(view.data_ptr(), view.numel()) for _, view, _ in arrived])
        else:
            found = [self._computed(view) for _, view, _ in arrived]
        for (chunk, _, label), result in zip(arrived, found, strict=True):
            if result != (chunk.xxh3 if self.kind == "xxh3" else chunk.wordsum):
                raise damaged(self._name, label, self._first + chunk.stored_at, chunk.length)

    def _summed(self, places: list[tuple[int, int]]) -> list[int]:
        assert self._sums is not None
        self._sums.add(places)
        return self._sums.results()[-len(places) :] if places else []

    def _computed(self, view: torch.Tensor) -> int:
        return xxhash.xxh3_64_intdigest(host_bytes(view)) if self.kind == "xxh3" else wordsum(view)

    def __enter__(self) -> Checks:
        if by_driver(self._device):
            self._context = self._stack.enter_context(contextlib.closing(Context(self._device.index or 0)))
            with self._context.entered():
                self._sums = CudaSums(self._context, max(1, self._count))
            self._stack.callback(self._close)
        return self

    def _close(self) -> None:
        assert self._context is not None and self._sums is not None
        with self._context.entered():
            self._sums.close()

    def __exit__(self, *_: object) -> None:
        self._stack.close()
