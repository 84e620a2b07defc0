"""Who the engine is: the identity a snapshot must agree with, from vLLM's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UnsupportedError
from ...format.identity import Identity, Parallel
from ...weights.checkpoint import CONFIG_FILES, config_hash, has_weights, read_config
from .versions import cpu_group, parallel_groups, vllm_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def model_directory(model_config: ModelConfig, download_dir: str | None = None) -> Path | None:
    """The local directory of the model's files, or None when there is none (a hub name that is not cached).

    Args:
        download_dir: vLLM's option; weights of a hub model lie there, its config in the hub's own cache.
    """
    return local_directory(str(model_config.model), model_config.revision, download_dir)


def local_directory(name: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """The same, by a model's name or path."""
    cached = _cached(name, revision, download_dir) if download_dir else None
    if cached is not None and has_weights(cached):
        return cached
    return _cached(name, revision)


def config_directory(model_config: ModelConfig) -> Path | None:
    """The local directory whose config.json vLLM reads: ``hf_config_path`` or the model's own."""
    named = getattr(model_config, "hf_config_path", None)
    return _cached(str(named), None) if named else model_directory(model_config)


def tokenizer_directory(model_config: ModelConfig) -> Path | None:
    """The local directory of the tokenizer that vLLM uses for this model; None when there is none."""
    named = str(getattr(model_config, "tokenizer", None) or model_config.model)
    if named == str(model_config.model):
        return model_directory(model_config)
    return _cached(named, getattr(model_config, "tokenizer_revision", None))


def _cached(name: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # a path that is no directory
        return None
    return Path(found).parent if isinstance(found, str) else None


def canonical_config(model_config: ModelConfig) -> str | None:
    """The hash of the configuration files that vLLM reads for this model, or None where they are not here.

    Raises:
        UnsupportedError: vLLM reads Mistral's own format.
    """
    directory = config_directory(model_config)
    if directory is None:
        return None
    own = getattr(model_config, "config_format", "auto")
    consolidated = any(directory.glob("consolidated*.safetensors"))
    if own == "mistral" or (own == "auto" and consolidated and (directory / "params.json").is_file()):
        raise UnsupportedError(
            f"vLLM reads {str(directory)!r} in Mistral's own format (params.json), which is not supported in this "
            "version; let it read the other files there: config_format='hf', load_format='hf'"
        )
    first, *others = CONFIG_FILES
    config = read_config(directory, first)
    # vLLM reads how a model is quantised from the others, where the first does not say.
    config |= {name: read_config(directory, name) for name in others if (directory / name).is_file()}
    return config_hash(config, model_config.hf_overrides)


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


def require_ranks(vllm_config: VllmConfig) -> Parallel:
    """``this_rank``, of an engine whose ranks a set of files can stand for; all of its ranks are told the same.

    Raises:
        UnsupportedError: it is not such an engine.
    """
    if vllm_config.parallel_config.enable_expert_parallel:
        raise UnsupportedError("expert parallelism is not supported in this version; set enable_expert_parallel=False")
    return this_rank()


def engine_identity(vllm_config: VllmConfig, model_config: ModelConfig) -> Identity:
    """The identity of this worker's share of the model, the model id left open."""
    parallel = require_ranks(vllm_config)
    architectures = getattr(model_config.hf_config, "architectures", None) or [None]
    return Identity(
        stage="raw",
        engine="vllm",
        engine_version=vllm_version(),
        architecture=architectures[0],
        config=canonical_config(model_config),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization) if model_config.quantization else None,
        parallel=parallel,
    )
