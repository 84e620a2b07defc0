"""A snapshot's tensors in memory that several processes have in common."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ..errors import MismatchError, UnsupportedError
from ..format.index import Index
from ..transport.shared import Made
from .open import open_rank
from .reading import RestoreOptions
from .restore import RestoreReport, restore

ALIGNED = 512
"""Bytes to which every storage is aligned there, as by torch's allocator for GPUs."""


class Held:
    """A snapshot's weights, thawed into memory to share.

    Attributes:
        content: the file's content id.
        made: the memory.
        report: of thawing it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        Args:
            path: a snapshot of one rank.
            device: the host, or an NVIDIA GPU.
            progress: as of RestoreOptions.

        Raises:
            UnsupportedError: it is one of several ranks.
            As ``Made`` and ``restore``.
        """
        with open_rank(path, 0) as opened:
            header, index = opened.snapshot.header, opened.snapshot.index
            if header.identity.parallel.world != 1:
                raise UnsupportedError(f"{os.fspath(path)!r} is of {header.identity.parallel.world} ranks, not of one")
            self.content, self.made = header.content, Made(size(index), device)
            try:
                places = views(self.made.tensor, index)
                self.report: RestoreReport = restore(
                    opened.source, opened.snapshot, places, (), RestoreOptions(progress=progress)
                )
            except BaseException:
                places = {}
                self.made.close()
                raise


def size(index: Index) -> int:
    """Bytes that its tensors take there, at least 1."""
    return max(1, _places(index)[1])


def views(memory: torch.Tensor, index: Index) -> dict[str, torch.Tensor]:
    """Every tensor by name, where it lies in memory of ``size``; carried files are left out.

    Args:
        memory: uint8, shape ``(size(index),)``.

    Raises:
        MismatchError: the memory has another size.
    """
    at, total = _places(index)
    if memory.numel() != max(1, total):
        raise MismatchError(f"the weights to share have {memory.numel()} bytes, this snapshot's take {total}")
    found = {}
    for tensor in index.tensors:
        dtype = getattr(torch, tensor.dtype)
        if tensor.storage is None:
            found[tensor.name] = torch.empty_strided(tensor.shape, tensor.stride, dtype=dtype, device=memory.device)
            continue
        begin = at[tensor.storage] + tensor.offset
        own = memory[begin : begin + tensor.extent].view(dtype)
        found[tensor.name] = own.as_strided(tensor.shape, tensor.stride)
    return found


def _places(index: Index) -> tuple[dict[int, int], int]:
    """Where each storage of tensors begins, and the bytes of all."""
    found, end = {}, 0
    for storage in sorted({tensor.storage for tensor in index.tensors if tensor.storage is not None}):
        found[storage] = end
        end += -(-index.storages[storage] // ALIGNED) * ALIGNED
    return found, end
