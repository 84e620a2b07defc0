"""Codec 1 (``codecs.planes``) undone by torch's operations, for devices that torch knows and NVIDIA's driver does not.

All blocks of a plane go on at once, a symbol of each coder a step, as in ``planes.decoded``: some 6,000 operations a
chunk, so a device needs to be much faster than its host's processors for this to be worth more than the bytes that are
not moved. ``tests`` hold it against ``planes``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..codecs.planes import BITS, BLOCK, HEAD, LANES, ROW, START, TOTAL, Frame, Plane, checked, gaps, layout
from ..errors import CorruptionError, FormatError
from .coded_link import SCRATCH
from .links import Place, TorchLink

_ROWS = BLOCK // ROW


def decode(stored: torch.Tensor, out: torch.Tensor) -> None:
    """A chunk's original bytes.

    Args:
        stored: the frame, uint8 of shape ``(bytes,)`` on any device.
        out: on the same device, uint8, of as many bytes as there were.

    Raises:
        FormatError: what docs/format.md does not allow. Checksums tell whether the bytes are the original ones.
    """
    frame = layout(stored[:HEAD].cpu().numpy().tobytes(), len(out), len(stored))
    parts = [_plane(stored, frame, number, place) for number, place in enumerate(frame.planes)]
    for low, high in gaps(frame):
        if bool(stored[low:high].any()):
            raise FormatError(f"bytes {low} to {high} of a frame lie between its parts and must be zero")
    whole = frame.elements * frame.width
    _merge(parts, frame.turn, out[:whole].view(frame.elements, frame.width))
    out[whole:] = stored[frame.tail :]


def _plane(stored: torch.Tensor, frame: Frame, number: int, place: Plane) -> torch.Tensor:
    if not place.coded:
        return stored[place.at : place.at + frame.elements]
    # Everything before the words is short, and looked at where the rules are.
    head = np.zeros(frame.size, np.uint8)
    head[place.at : place.words] = stored[place.at : place.words].cpu().numpy()
    table, ends, states, _ = checked(head, frame, place)
    device = stored.device
    frequency = torch.from_numpy(table.astype(np.int64))
    symbol = torch.repeat_interleave(torch.arange(256), frequency)
    share = frequency[symbol]
    first = torch.arange(TOTAL) - (frequency.cumsum(0) - frequency)[symbol]
    symbol, share, first = symbol.to(torch.uint8).to(device), share.to(device), first.to(device)
    own = torch.from_numpy(states.astype(np.int64)).to(device)
    last = torch.from_numpy(ends.astype(np.int64)).to(device)[:, None]
    at = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
    words = stored[place.words : place.words + 2 * place.count].clone().view(torch.int16).to(torch.int64) & 0xFFFF
    words = torch.cat([words, torch.zeros_like(at[0])])
    blocks, rows = frame.blocks, frame.elements // ROW
    steps = torch.zeros((blocks, _ROWS, LANES, 4), dtype=torch.uint8, device=device)
    for row in range(min(rows, _ROWS)):
        there = blocks if row < rows - (blocks - 1) * _ROWS else blocks - 1  # the last block may have fewer
        state, next_ = own[:there], at[:there]
        for k in range(4):
            slot = state & (TOTAL - 1)
            steps[:there, row, :, k] = symbol[slot]
            state = share[slot] * (state >> BITS) + first[slot]
            low = state < START
            taken = low.to(torch.int64).cumsum(1)
            word = words[(next_ + taken - 1).clamp(0, place.count)]
            state = torch.where(low, state << 16 | word, state)
            next_ = next_ + taken[:, -1:]
        own[:there], at[:there] = state, next_
    if not bool((own == START).all() and (at == last).all()):
        raise FormatError(f"the words of plane {number} do not end where they have to")
    return steps.reshape(-1)[: frame.elements]


def _merge(parts: list[torch.Tensor], turn: int, out: torch.Tensor) -> None:
    """Planes to elements, turned back: the lowest bit of the lowest byte is the highest of the highest one then."""
    carry = parts[0] << 7
    for number in range(len(parts) - 1, -1, -1):
        part = parts[number]
        out[:, number] = part >> 1 | carry if turn else part
        carry = part << 7


class CodedTorchLink(TorchLink):
    """A TorchLink whose compressed ranges land in memory of their own on the device, and are decoded from there."""

    def __init__(
        self,
        places: Sequence[Place],
        device: str,
        stored: Sequence[int],
        damage: Callable[[int], CorruptionError],
    ) -> None:
        """
        Args:
            places: of the original bytes of each range.
            device: see TorchLink.
            stored: of each range the bytes that are compressed; 0 where it is as it is.
            damage: what to raise for a range, by its number.
        """
        self._into = list(places)
        super().__init__(self._into, device)
        self._finals, self._stored, self._damage = places, stored, damage
        self._lock, self._taken = threading.Lock(), 0

    def admits(self, number: int) -> bool:
        """See Link."""
        size = self._stored[number]
        if size:
            with self._lock:
                if self._taken and self._taken + size > SCRATCH:
                    return False
                self._taken += size
            room = torch.empty(size, dtype=torch.uint8, device=self._finals[number].view.device)
            self._into[number] = Place(room, 0, size)
        return True

    def landed(self, number: int) -> None:
        """See Link.

        Raises:
            CorruptionError: it is no frame.
        """
        size = self._stored[number]
        if not size:
            return
        try:
            with torch.inference_mode():  # see ``restore._scatter``
                decode(self._into[number].bytes(), self._finals[number].bytes())
        except FormatError as error:
            raise self._damage(number) from error
        self._into[number] = self._finals[number]
        with self._lock:
            self._taken -= size
