"""Who the engine is: the identity a snapshot must agree with, from vLLM's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UnsupportedError
from ...format.identity import Identity, Parallel
from ...weights.checkpoint import config_hash, read_config
from .versions import cpu_group, parallel_groups, vllm_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def model_directory(model_config: ModelConfig) -> Path | None:
    """The local directory of the model's files, or None when there is none (a hub name that is not cached)."""
    directory = Path(model_config.model)
    if directory.is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(model_config.model), "config.json", revision=model_config.revision)
    return Path(found).parent if isinstance(found, str) else None


def this_rank() -> Parallel:
    """This worker's coordinates.

    Raises:
        UnsupportedError: data or context parallel, where several processes share one tensor and pipeline rank.
    """
    groups = parallel_groups()
    if groups["dp"][1] > 1:
        raise UnsupportedError(
            "data-parallel engines are not supported in this version; run one engine for each replica "
            "(data_parallel_size=1), all from the same snapshot"
        )
    found = Parallel(*groups["tp"], *groups["pp"])
    if cpu_group()[1] != found.world:
        raise UnsupportedError("context-parallel engines are not supported in this version")
    return found


def engine_identity(vllm_config: VllmConfig, model_config: ModelConfig) -> Identity:
    """The identity of this worker's share of the model, the model id left open."""
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        raise UnsupportedError("expert parallelism is not supported in this version; set enable_expert_parallel=False")
    directory = model_directory(model_config)
    config = config_hash(read_config(directory), model_config.hf_overrides) if directory else None
    architectures = getattr(model_config.hf_config, "architectures", None) or [None]
    return Identity(
        stage="raw",
        engine="vllm",
        engine_version=vllm_version(),
        architecture=architectures[0],
        config=config,
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization) if model_config.quantization else None,
        parallel=this_rank(),
    )
