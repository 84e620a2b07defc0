"""Telling whether tensors hold the same bytes, computed where they lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch

WORDS = 1 << 22
"""64-bit words summed at a time: 32 MiB, and three times that in scratch."""
_STEP = -7046029254386353131
"""2^64 divided by the golden ratio, odd, as a signed word: neighbouring weights differ in every bit position."""


def digest(tensor: torch.Tensor) -> str:
    """A 64-bit sum of the tensor's words, each weighted by its position, with dtype and shape; on the tensor's device.

    Row-major order, whatever the strides. Finds what goes wrong in copying (missing, swapped, shifted, repeated or
    altered pieces); against an adversary it proves nothing.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for at in range(0, flat.numel(), 8 * WORDS):
        part = flat[at : at + 8 * WORDS]
        if part.numel() % 8:
            part = torch.nn.functional.pad(part, (0, 8 - part.numel() % 8))
        elif part.data_ptr() % 8 or part.storage_offset() % 8:  # a view into somebody's buffer
            part = part.clone()
        words = part.view(torch.int64)
        weights = torch.arange(at // 8, at // 8 + words.numel(), dtype=torch.int64, device=flat.device)
        total += weights.mul_(_STEP).bitwise_or_(1).mul_(words).sum()
    return f"{tensor.dtype} {list(tensor.shape)} {int(total) & (1 << 64) - 1:016x}".removeprefix("torch.")


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of every tensor, by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def first_difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """The first name that is missing, unknown or of other bytes; None when all are equal."""
    return next((name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)), None)
