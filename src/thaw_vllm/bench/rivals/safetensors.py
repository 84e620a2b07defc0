"""safetensors: ``load_file`` of every shard, ``save_file`` of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..llama import Model
from ..systems import Restored, System


class Safetensors(System):
    """On the host ``load_file`` gives mappings of the files, so each tensor is cloned to be memory like the others'."""

    name = package = "safetensors"
    freezes = True

    def prepare(self, device: torch.device) -> None:
        """Import."""
        import safetensors.torch  # noqa: F401

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """One file after the other, as the library's users do."""
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            found = load_file(path, device=str(device))
            tensors |= {name: t.clone() for name, t in found.items()} if device.type == "cpu" else found
        return Restored(tensors, "load_file" if device.type != "cpu" else "load_file, clone")

    def freeze(self, model: Model, path: Path) -> Mapping[str, Any]:
        """One file, as ``save_file`` writes it."""
        from safetensors.torch import save_file

        save_file(model.tensors, path)
        return {"route": "save_file"}


SYSTEM = Safetensors()
