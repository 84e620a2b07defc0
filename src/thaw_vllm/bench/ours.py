"""thaw, as the benchmarks run it: the public functions and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import thaw_vllm

from ..errors import UnsupportedError
from .llama import Model
from .systems import COMPRESSED, THAW, Restored, System


class Thaw(System):
    """restore_model, freeze_model and pin; restore_model chooses the route."""

    name, package, files = "thaw", "thaw-vllm", THAW
    in_place = freezes = pins = True
    options: Mapping[str, Any] = {}

    def installed(self) -> str | None:
        """This very code, also where it was not installed as a distribution."""
        return thaw_vllm.__version__

    def prepare(self, device: torch.device) -> None:
        """The names resolve lazily."""
        thaw_vllm.restore_model, thaw_vllm.freeze_model  # noqa: B018

    def restore(self, paths: list[Path], device: torch.device, target: Model | None, verify: bool) -> Restored:
        """restore_model."""
        assert target is not None
        return self._restored(target, thaw_vllm.restore_model(target, paths[0], verify=verify))

    @contextlib.contextmanager
    def pinned(self, paths: list[Path], device: torch.device) -> Iterator[Callable[[Model, bool], Restored]]:
        """pin and its restore."""
        pin: Any = getattr(thaw_vllm, "pin", None)
        if pin is None:
            raise UnsupportedError("this version of thaw has no pin()")
        with pin(paths[0], device=device) as held:
            yield lambda model, verify: self._restored(model, held.restore(model, verify=verify))

    def freeze(self, model: Model, path: Path) -> Mapping[str, Any]:
        """freeze_model."""
        report: Any = thaw_vllm.freeze_model(model, path, force=True, **self.options)
        return {"phases": dict(report.seconds), "file_size": report.file_size} | {
            key: getattr(report, key) for key in ("route", "why") if getattr(report, key, "")
        }

    @staticmethod
    def _restored(model: Model, report: Any) -> Restored:
        route = getattr(report, "route", "") or "restore_model"
        stored = getattr(report, "stored", 0)
        moved = stored if stored < report.bytes else None
        return Restored(model.tensors, route, getattr(report, "why", ""), dict(report.seconds), moved)


class Compressed(Thaw):
    """The same, of a snapshot that is compressed."""

    name, files = "thaw-compressed", COMPRESSED
    options: Mapping[str, Any] = {"compress": True}


class Expected(Thaw):
    """In a process that has called expect_restore before it made the model, as vLLM's loader does."""

    name, devices = "thaw-expected", ("cuda",)
    freezes = pins = False

    def prepare(self, device: torch.device) -> None:
        """All of it comes up while the target is made."""
        super().prepare(device)
        thaw_vllm.expect_restore(device)


class CompressedExpected(Expected):
    """Both."""

    name, files = "thaw-compressed-expected", COMPRESSED


SYSTEMS = (Thaw, Compressed, Expected, CompressedExpected)
