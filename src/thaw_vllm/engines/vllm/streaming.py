"""A plain checkpoint through thaw's transport: vLLM's own ``load_weights`` gets tensors that are on the device already.

For whoever has no snapshot yet: nothing is converted and nothing written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from ...errors import FormatError, MismatchError, UsageError
from ...weights.checkpoint import Checkpoint, open_checkpoint
from ...weights.stream import StreamReport, stream

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger(f"vllm.{__name__}")

OWN_LOADERS = ("bitsandbytes", "gguf", "torchao")
"""Quantisations for which vLLM reads the files in a way of its own."""


def suited(model: torch.nn.Module, model_config: ModelConfig, directory: Path | None) -> Checkpoint | str:
    """The checkpoint, opened, or why it is left to vLLM's own loader."""
    if directory is None:
        return f"{model_config.model!r} is no local directory and not in the hub's cache"
    if model_config.quantization in OWN_LOADERS:
        return f"vLLM reads {model_config.quantization} checkpoints in a way of its own"
    if getattr(model, "secondary_weights", ()) or getattr(model, "allow_patterns_overrides", None):
        return "the model names further weight files itself"
    try:
        checkpoint = open_checkpoint(directory)
    except (UsageError, FormatError) as error:
        return str(error)
    if not checkpoint.headers:
        return "its weights are not safetensors files"
    if any(name.startswith("consolidated") for name in checkpoint.files):
        return "its weights are in Mistral's own format"
    strange = next((t for t in checkpoint.tensors if not hasattr(torch, t.dtype)), None)
    if strange is not None:
        return f"this torch has no {strange.dtype}, which {strange.name!r} is"
    return checkpoint


def load(
    model: torch.nn.Module,
    model_config: ModelConfig,
    checkpoint: Checkpoint,
    workers: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> StreamReport:
    """Give every tensor of the checkpoint to ``model.load_weights``.

    Args:
        progress: called as (bytes done, bytes in all), in a thread of its own.

    Raises:
        MismatchError: the checkpoint lacks a parameter of an unquantised model, as vLLM's own loader has it.
        StorageError, ReplacedError, CorruptionError, DeviceError: see ``stream``.
    """
    start = time.perf_counter()
    report = StreamReport()
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    wanted = {name for name, _ in model.named_parameters()}
    total, done = sum(tensor.end - tensor.begin for tensor in checkpoint.tensors), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    into: Any = model
    loaded = into.load_weights(stream(checkpoint, device, workers=workers, report=report, progress=advance))
    missing = sorted(wanted - set(loaded)) if loaded is not None and model_config.quantization is None else []
    if missing:
        raise MismatchError(
            f"{str(checkpoint.directory)!r} lacks weights of the model ({', '.join(missing[:5])}); give all of it"
        )
    seconds = time.perf_counter() - start
    report.seconds = {"total": seconds}
    logger.info(
        "streamed %d tensors, %.2f GB in %.2f s (%.2f GB/s) from %s: %s (%s)",
        report.tensors,
        report.bytes / 1e9,
        seconds,
        report.bytes / 1e9 / max(seconds, 1e-9),
        checkpoint.directory,
        report.route,
        report.why,
    )
    return report
