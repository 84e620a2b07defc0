"""thaw-native: the compiled core (Rust and CUDA) of the other project named thaw, CPython 3.12 only."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..llama import Model
from ..systems import NATIVE, Restored, System


class Native(System):
    """Its pipelined functions. They take addresses on the device: the tensors exist before the clock, like thaw's."""

    name = package = "thaw-native"
    files = NATIVE
    devices = ("cuda",)
    in_place = freezes = pins = True

    def prepare(self, device: torch.device) -> None:
        """Import."""
        self._library: Any = import_module("thaw")

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """``restore_from_file_pipelined``: direct I/O, which it leaves by itself where there is none."""
        assert target is not None
        self._library.restore_from_file_pipelined(str(paths[0]), self._regions(target))
        return Restored(target.tensors, "restore_from_file_pipelined")

    @contextlib.contextmanager
    def pinned(self, paths: list[Path], device: torch.device) -> Iterator[Callable[[Model, bool], Restored]]:
        """``PinnedMmap`` over a mapping of the file."""
        # Shared and writable: CUDA registers no read-only mapping unless told, and a private one would be copied.
        with paths[0].open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
        held = [self._library.PinnedMmap(mapping)]  # dropping the object is the only way to unpin

        def restore(model: Model, verify: bool) -> Restored:
            self._library.restore_from_pinned_mmap(held[0], self._regions(model))
            return Restored(model.tensors, "restore_from_pinned_mmap")

        try:
            yield restore
        finally:
            held.clear()

    def freeze(self, model: Model, path: Path) -> Mapping[str, Any]:
        """``freeze_to_file_pipelined``."""
        self._library.freeze_to_file_pipelined(str(path), self._regions(model))
        return {"route": "freeze_to_file_pipelined"}

    @staticmethod
    def _regions(model: Model) -> list[tuple[str, int, int, int]]:
        """Kind, number, address, bytes."""
        return [("weights", i, t.data_ptr(), t.nbytes) for i, t in enumerate(model.tensors.values())]


SYSTEM = Native()
