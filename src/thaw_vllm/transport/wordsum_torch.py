"""The word sum of bytes on any device, in torch's own operations: slower than the kernel, and works anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checksum import LANES, lane_weights, weight

if TYPE_CHECKING:
    import torch

ROWS = 32
"""Rows of LANES words taken at once: 4 MiB of data, 8 MiB of scratch memory."""
_MASK = (1 << 64) - 1


def wordsum(view: torch.Tensor) -> int:
    """``checksum.wordsum`` of a contiguous uint8 tensor of shape ``(bytes,)``, where it lies.

    Returns:
        The sum, 0 to 2**64 - 1. Waits for the device.
    """
    import torch

    with torch.inference_mode():
        lanes = torch.from_numpy(lane_weights().view("int64")).to(view.device)
        size, total = view.numel(), 0
        step = ROWS * LANES * 4
        for at in range(0, size, step):
            part = view[at : at + step]
            if part.data_ptr() % 4 or part.storage_offset() % 4 or part.numel() % (LANES * 4):
                padded = torch.zeros(-(-part.numel() // (LANES * 4)) * LANES * 4, dtype=torch.uint8, device=view.device)
                padded[: part.numel()] = part
                part = padded
            # int64 of a negative word is the word less 2**32; the mask takes that back.
            words = part.view(torch.int32).to(torch.int64).bitwise_and_((1 << 32) - 1).view(-1, LANES)
            sums = words.mul_(lanes).sum(1).tolist()
            first = at // (LANES * 4)
            total += sum(value * weight(LANES + first + row) for row, value in enumerate(sums))
        return total & _MASK
