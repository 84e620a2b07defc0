"""InstantTensor: all files together through its ring on the GPU, each tensor copied out of it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..llama import Model
from ..systems import Restored, System


class InstantTensor(System):
    """``safe_open`` with ``copy=True``, its default and what vLLM uses; it chooses the backend by the file system."""

    name = package = "instanttensor"
    devices = ("cuda",)

    def prepare(self, device: torch.device) -> None:
        """Import."""
        self._library: Any = import_module("instanttensor")

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """Every tensor."""
        names = [str(path) for path in paths]
        with self._library.safe_open(names, framework="pt", device=device.index or 0) as file:
            tensors = dict(file.tensors())
            backend = getattr(getattr(file, "backend", None), "name", "default")
        return Restored(tensors, f"safe_open, {backend.lower()}")


SYSTEM = InstantTensor()
