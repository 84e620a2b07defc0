"""vLLM's ``load_weights`` of one large checkpoint by each loader, in turn in one process, every tensor compared.

    python tests/gpu/load_weights.py MODEL_DIRECTORY SNAPSHOT

Freezes MODEL_DIRECTORY to SNAPSHOT on the way. Appends records of the work ``vllm-load-weights`` to
benchmarks/results: seconds of ``load_weights`` until the GPU is idle, warm. Tensors are compared by their word sums on
the GPU, before post-processing, with those after vLLM's default loader.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

THAW, DEFAULT, STREAM, FREEZE = "snapshot", "default-loader", "checkpoint", "freeze"
"""Routes, as in ``thaw bench cold-start``; ``checkpoint`` is thaw without a snapshot."""
OTHERS = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai_model_streamer": "runai_streamer",
}
"""vLLM's formats that need a package, by its module; those that are not installed are left out."""
FORMATS = tuple(name for module, name in OTHERS.items() if find_spec(module))
ORDER = (DEFAULT, FREEZE, THAW, STREAM, *FORMATS, THAW, STREAM, *FORMATS, DEFAULT, THAW)


def sums(model: torch.nn.Module) -> list[int]:
    """The word sum of every tensor that is on the GPU."""
    from thaw_vllm.transport.cuda import Context
    from thaw_vllm.transport.wordsum_cuda import CudaSums

    torch.cuda.synchronize()
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_cuda and t.numel()]
    with Context(tensors[0].device.index) as context, CudaSums(context, len(tensors)) as found:
        found.add([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors])
        return found.results()


def timed(real: Callable[..., None], note: Callable[[float], None], inside: list[bool]) -> Callable[..., None]:
    """``load_weights`` with its seconds noted; one that runs within another is part of it."""

    def load_weights(self: Any, *args: Any) -> None:
        if inside:
            return real(self, *args)
        inside.append(True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            real(self, *args)
            torch.cuda.synchronize()
            note(time.perf_counter() - start)
        finally:
            inside.clear()

    return load_weights


def main(model: str, snapshot: str) -> None:
    """See the module's docstring; ends the process, since NCCL may hang when the interpreter does."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader
    from vllm.plugins import load_general_plugins

    from thaw_vllm.bench.record import Record, append
    from thaw_vllm.engines.vllm.loader import ThawModelLoader

    load_general_plugins()
    torch.zeros(1, device="cuda")
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "nccl")
        ensure_model_parallel_initialized(1, 1)
    route, size, inside = "", 0, list[bool]()
    seconds: dict[str, list[float]] = {route: [] for route in ORDER}
    raw: dict[str, list[list[int]]] = {route: [] for route in ORDER}
    for loader in (DefaultModelLoader, ThawModelLoader, RunaiModelStreamerLoader):
        loader.load_weights = timed(loader.load_weights, lambda taken: seconds[route].append(taken), inside)
    process = base_loader.process_weights_after_loading

    def processed(module: torch.nn.Module, *args: Any) -> None:
        raw[route].append(sums(module))
        process(module, *args)

    base_loader.process_weights_after_loading = processed
    extra = {THAW: {"snapshot": snapshot}, FREEZE: {"snapshot": snapshot, "mode": "freeze", "force": True}, STREAM: {}}
    for route in ORDER:
        options: dict[str, Any] = {"load_format": route} if route in FORMATS else {}
        if route in extra:
            options = {"load_format": "thaw", "model_loader_extra_config": extra[route]}
        arguments = EngineArgs(model=model, enforce_eager=True, max_model_len=2048, **options)
        config = arguments.create_engine_config()
        try:
            with set_current_vllm_config(config):
                module = get_model(vllm_config=config)
        except Exception as error:
            if route not in FORMATS:
                raise
            print(f"{route}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        print(f"{route}: {seconds[route][-1]:.3f} s, equal: {raw[route][-1] == raw[DEFAULT][0]}", flush=True)
        del module
        gc.collect()
        torch.cuda.empty_cache()
    wrong = [route for route, found in raw.items() if any(one != raw[DEFAULT][0] for one in found)]
    append(
        Record(
            "vllm-load-weights",
            "thaw" if route in extra else "vllm",
            route,
            size,
            seconds[route],
            "warm",
            route == THAW,
            route not in wrong,
        )
        for route in (DEFAULT, THAW, STREAM, *FORMATS)
        if seconds[route]
    )
    os._exit(1 if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
