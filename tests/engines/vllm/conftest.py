"""vLLM's real model loading in this process, without an engine around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.vllm.models import KINDS

pytest.importorskip("vllm", reason="vLLM is not installed")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@dataclass
class Loaded:
    """A model as vLLM left it, its tensors' bytes before post-processing, and the configuration it was loaded with."""

    model: torch.nn.Module
    raw: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], bytes]] = field(default_factory=dict)
    config: Any = None

    def processed(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], bytes]]:
        return tensors_of(self.model)


def tensors_of(model: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], bytes]]:
    """Every parameter and buffer under every name: dtype, shape, stride, bytes."""
    found = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous()
        payload = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        found[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), payload)
    return found


Load = Callable[..., Loaded]


@pytest.fixture(scope="session")
def vllm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups of size one, made once."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    rendezvous = tmp_path_factory.mktemp("vllm") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend)
        ensure_model_parallel_initialized(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def load(vllm_process: None, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``load(directory, load_format=..., **engine_args)`` through vLLM's ``get_model``."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model

    def run(directory: Path | str, **engine_args: Any) -> Loaded:
        arguments = {"enforce_eager": True, "max_model_len": 256} | engine_args
        config = EngineArgs(model=str(directory), **arguments).create_engine_config()
        raw: dict[str, Any] = {}
        original = base_loader.process_weights_after_loading

        def recording(model: torch.nn.Module, *args: Any) -> None:
            raw.update(tensors_of(model))
            original(model, *args)

        with set_current_vllm_config(config), monkeypatch.context() as patch:
            if not torch.cuda.is_available():  # as vLLM's CPU runner does when it starts
                patch.setattr(torch.accelerator, "empty_cache", lambda: None)
            patch.setattr(base_loader, "process_weights_after_loading", recording)
            return Loaded(get_model(vllm_config=config), raw, config)

    return run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoints(kind)``: a tiny checkpoint of models.KINDS, made once a session."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture
def thaw_args() -> Callable[..., dict[str, Any]]:
    """Engine arguments that freeze to or thaw from a snapshot."""

    def make(snapshot: Path, **options: Any) -> dict[str, Any]:
        return {"load_format": "thaw", "model_loader_extra_config": {"snapshot": str(snapshot)} | options}

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model; made by ``make model``."""
    path = Path(os.environ.get("THAW_SMOLLM2", ".cache/models/SmolLM2-135M-Instruct"))
    if not path.is_dir():
        pytest.skip("the real model is not here: make model")
    return path
