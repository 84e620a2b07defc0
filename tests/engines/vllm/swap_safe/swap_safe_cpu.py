"""A plugin of vLLM that has the CPU build leave weights as they were loaded, as on CUDA, in every process of an engine.

Stands in for a GPU: the engine, its processes and its scheduler are real; only packing of weights is left out.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def register() -> None:
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.worker_base import WorkerBase

    from thaw_vllm.engines.vllm import versions

    def unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = unpacked
    versions.identity_processing = lambda model: None  # type: ignore[assignment]
    WorkerBase.tensor_digests = tensor_digests  # type: ignore[attr-defined]


def tensor_digests(worker: Any) -> dict[str, str]:
    """SHA-256 of every parameter and buffer."""
    model = worker.get_model()
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(data).hexdigest()
    return found
