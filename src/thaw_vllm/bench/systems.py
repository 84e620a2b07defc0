"""What every compared system does: restore files into tensors, and where it can, write them and keep them pinned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from .llama import Model

SAFETENSORS, THAW, COMPRESSED, NATIVE = "safetensors", "thaw", "thaw-compressed", "native"
"""Whose files a system reads; see ``files``."""


@dataclass(frozen=True)
class Restored:
    """What a run gave.

    Attributes:
        tensors: by name, on the device.
        route: how the bytes moved, in the system's words.
        why: why that way.
        phases: seconds by phase where the system tells.
        stored: bytes that moved, where they are not those of the tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    route: str
    why: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    stored: int | None = None


class System(ABC):
    """One system; made in the process that runs it. ``prepare`` comes first and is outside the clock.

    Attributes:
        name: in records and tables.
        package: distribution, for its version and the install line.
        files: whose files it reads.
        devices: where it can restore to.
        in_place: it fills tensors that exist already; the others allocate inside the clock, as part of their call.
        freezes: it can write.
        pins: it can keep a snapshot in registered memory.
    """

    name: str
    package: str
    files: str = SAFETENSORS
    devices: tuple[str, ...] = ("cuda", "cpu")
    in_place: bool = False
    freezes: bool = False
    pins: bool = False

    def installed(self) -> str | None:
        """Version; None when it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Import everything; start what a process starts once."""

    @abstractmethod
    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """Restore all files.

        Args:
            paths: the system's own files, in order.
            device: where to.
            target: the module to fill when ``in_place``, else None.
            verify: hold the bytes against checksums; asked of thaw only.
        """

    def pinned(
        self, paths: list[Path], device: torch.device
    ) -> AbstractContextManager[Callable[[Model, bool], Restored]]:
        """Keep the files in registered memory meanwhile; gives a function that restores from there. Where ``pins``."""
        raise UsageError(f"{self.name} keeps nothing pinned")

    def freeze(self, model: Model, path: Path) -> Mapping[str, Any]:
        """Write the model to ``path``; returns the record's extra fields. The caller syncs. Where ``freezes``."""
        raise UsageError(f"{self.name} writes nothing")
