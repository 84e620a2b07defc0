"""Run:ai Model Streamer (NVIDIA): many threads read into host memory, tensors follow to the device one by one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..llama import Model
from ..systems import Restored, System


class Runai(System):
    """``stream_files`` with the device as destination and its default concurrency (16 threads)."""

    name = package = "runai-model-streamer"

    def prepare(self, device: torch.device) -> None:
        """Import."""
        self._library: Any = import_module("runai_model_streamer")

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """Every tensor; those handed out are the caller's (``owned``, the default)."""
        with self._library.SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in paths], device=str(device))
            tensors = dict(streamer.get_tensors())
        return Restored(tensors, "stream_files")


SYSTEM = Runai()
