"""A plugin of vLLM that has the CPU build leave weights as they were loaded, as on CUDA, in every process of an engine.

Stands in for a GPU: the engine, its processes and its scheduler are real; only packing of weights is left out. On CUDA
it leaves everything as it is. On both, workers can be asked for a digest of every tensor.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch


def register() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.thaw_test_digests = digests  # type: ignore[attr-defined]
    WorkerBase.thaw_test_weights = weights  # type: ignore[attr-defined]
    WorkerBase.thaw_test_pid = lambda worker: os.getpid()  # type: ignore[attr-defined]
    WorkerBase.thaw_test_hang = hang  # type: ignore[attr-defined]
    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers import utils

    from thaw_vllm.engines.vllm import versions

    def unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = unpacked
    versions.identity_processing = lambda model: None  # type: ignore[assignment]
    if os.environ.get("THAW_TEST_COMPILED"):
        _compile(type(current_platform))


def _compile(platform: Any) -> None:
    """Have the CPU build compile as on CUDA, piece by piece and ahead of time; it would be done by Dynamo's own way."""
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        from vllm.config import CompilationMode

        original(cls, config)
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        config.compilation_config.backend, config.compilation_config.compile_sizes = "inductor", []

    platform.check_and_update_config = classmethod(check_and_update_config)


def hang(worker: Any, flag: str) -> None:
    """From now on a fill stands still once the bytes are there, before it is noted, and has written a file then. It
    goes on where the process that has started this one ends."""
    from thaw_vllm.engines.vllm.swap import fill

    original = fill.restore

    def restore(*args: Any, **options: Any) -> Any:
        report = original(*args, **options)
        parent = os.getppid()
        Path(flag).touch()
        while os.getppid() == parent:
            time.sleep(0.05)
        return report

    fill.restore = restore


def digests(worker: Any) -> dict[str, list[Any]]:
    """By where it hangs: address and SHA-256 of every tensor that can be reached from the model, but the KV cache, what
    CUDA graphs write, and inputs of a call."""
    from torch._subclasses.fake_tensor import FakeTensor

    from thaw_vllm.engines.vllm import versions
    from thaw_vllm.engines.vllm.swap.reach import tensors

    model = worker.get_model()
    passing = {id(tensor) for layer in versions.kv_tensors(worker).values() for tensor in layer}
    passing |= set(map(id, versions.call_inputs(model)))
    found = {}
    for path, tensor in tensors(model, versions.graph_entries()):
        if id(tensor) not in passing and not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
            found[path] = [tensor.data_ptr(), digest(tensor)]
    return found


def weights(worker: Any) -> dict[str, list[Any]]:
    """The same of parameters and buffers, by their names."""
    model = worker.get_model()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: [tensor.data_ptr(), digest(tensor)] for name, tensor in named}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
