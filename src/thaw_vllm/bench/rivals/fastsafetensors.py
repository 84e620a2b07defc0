"""fastsafetensors (IBM): all files into device buffers, tensors as views of them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..llama import Model
from ..systems import Restored, System

GDS = Path("/proc/driver/nvidia-fs/version")
"""There when the kernel has GPUDirect Storage; without it the library's own advice is ``nogds=True``."""


class Fastsafetensors(System):
    """``SafeTensorsFileLoader``, 16 threads and 16 MiB bounce buffers (its defaults); the tensors own their storage."""

    name = package = "fastsafetensors"

    def prepare(self, device: torch.device) -> None:
        """Import."""
        self._library: Any = import_module("fastsafetensors")

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """One batch of all files."""
        direct = device.type == "cuda" and GDS.exists()
        loader = self._library.SafeTensorsFileLoader(None, str(device), nogds=not direct)
        buffers = None
        try:
            loader.add_filenames({0: [str(path) for path in paths]})
            buffers = loader.copy_files_to_device()
            tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        finally:
            if buffers is not None:
                buffers.close()
            loader.close()
        return Restored(tensors, "gds" if direct else "nogds")


SYSTEM = Fastsafetensors()
