"""A worker with a real model, as vLLM loads it, whose weights may be swapped: only post-processing is left out.

vLLM's CPU build packs weights after loading, so here the model is left as loaded, as it is on CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from thaw_vllm.engines.vllm import versions, worker
from thaw_vllm.engines.vllm.answers import raised
from thaw_vllm.engines.vllm.swap import front

TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "chat_template.jinja": "{{ messages }}"}


@dataclasses.dataclass
class Running:
    """A worker of an engine whose model is as loading left it."""

    model: torch.nn.Module
    vllm_config: Any
    rank: int = 0

    def get_model(self) -> torch.nn.Module:
        return self.model

    def ask(self, method: str, *args: Any) -> dict[str, Any]:
        """By the method of workers, as an engine core does."""
        return raised(getattr(worker, method)(self, *args))

    def check(self, path: Path, *, quick: bool = False) -> dict[str, Any]:
        return self.ask("thaw_swap_check", str(path), quick)

    def bytes_of(self) -> dict[str, torch.Tensor]:
        """Copies of parameters and buffers."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}


@pytest.fixture
def directory(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """Of a tiny dense model with a tokenizer's files."""
    copied = Path(shutil.copytree(checkpoints("untied"), tmp_path / "model"))
    for name, text in TOKENIZER.items():
        (copied / name).write_text(text)
    (copied / "generation_config.json").write_text('{"eos_token_id": 1}')
    return copied


@pytest.fixture
def freeze(load: Callable[..., Any], thaw_args: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """``freeze(directory, **engine_args)``: its snapshot."""

    def run(directory: Path, **engine_args: Any) -> Path:
        path = tmp_path / f"{directory.name}.thaw"
        load(directory, **thaw_args(path, mode="freeze"), **engine_args)
        return path

    return run


@pytest.fixture
def engine(
    load: Callable[..., Any], thaw_args: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Running]:
    """``engine(directory, snapshot)``: as if post-processing were the identity, and the front end started just now."""
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(versions, "identity_processing", lambda model: None)
    monkeypatch.setattr(front, "front_started", time.time)

    def run(directory: Path, snapshot: Path | None, **engine_args: Any) -> Running:
        args = {} if snapshot is None else thaw_args(snapshot)
        loaded = load(directory, **args, **engine_args)
        return Running(loaded.model, loaded.config)

    return run


@pytest.fixture
def fine_tune(directory: Path, freeze: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``fine_tune(change)``: the snapshot of other weights, and of what else ``change(directory)`` does."""

    def run(change: Callable[[Path], object] = lambda _: None, **engine_args: Any) -> Path:
        tuned = Path(shutil.copytree(directory, tmp_path / "tuned"))
        for file in tuned.glob("*.safetensors"):
            save_file({name: tensor + 0.25 for name, tensor in load_file(file).items()}, file)
        change(tuned)
        return freeze(tuned, **engine_args)

    return run


def changed_config(**changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> object:
        path = directory / "config.json"
        return path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written(name: str, text: str | None) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink() if text is None else (directory / name).write_text(text)
