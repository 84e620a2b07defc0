"""Who the engine is: the identity a snapshot must agree with, from vLLM's configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ...errors import MismatchError, UnsupportedError
from ...format.document import canonical
from ...format.identity import Experts, Identity, Parallel
from ...weights.checkpoint import CONFIG_FILES, config_hash, has_weights, read_config
from .versions import cpu_group, expert_maps, met_by_variables, parallel_groups, run_apart, vllm_version

if TYPE_CHECKING:
    import torch
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


def require_ranks(vllm_config: VllmConfig) -> Parallel:
    """This worker's coordinates in an engine whose ranks a set of files can stand for; all ranks are told the same.

    Replicas of a dense model are engines of their own, each with the same coordinates. In a mixture of experts all of
    them divide the experts, and an expert-parallel rank is a tensor-parallel one of a replica.

    Raises:
        UnsupportedError: experts move among ranks, or several processes would share the coordinates.
    """
    config, moe = vllm_config.parallel_config, is_moe(vllm_config)
    if moe and (config.enable_eplb or getattr(config, "enable_elastic_ep", False)):
        raise UnsupportedError(
            "experts that move among ranks while the engine runs (EPLB, elastic expert parallelism) are not supported: "
            "a file could not say which of them a rank will hold; set enable_eplb=False, enable_elastic_ep=False"
        )
    groups = parallel_groups()
    expert = groups["ep"] if moe and config.enable_expert_parallel else (0, 1)
    found, (_, world) = Parallel(*groups["tp"], *groups["pp"], *expert, *groups["dp"]), cpu_group()
    if world != found.world:
        raise UnsupportedError(
            f"{world} processes hold this model together, where {' and '.join(found.options()) or 'one rank'} "
            f"makes {found.world}; prefill-context-parallel engines, and launchers that run several engines as one "
            "world, are not supported in this version: set prefill_context_parallel_size=1"
        )
    if found.dp_size > 1 and not moe:
        raise UnsupportedError(
            "replicas of a dense model are engines of their own, all from the same snapshot; run each with "
            "data_parallel_size=1"
        )
    return found


def is_moe(vllm_config: VllmConfig) -> bool:
    """Whether the model is a mixture of experts, which all replicas hold together."""
    return vllm_config.model_config is not None and bool(vllm_config.model_config.is_moe)


def replica(vllm_config: VllmConfig) -> int:
    """Which of several replicas of a dense model this is, all of whose weights are the same; 0 where there is one."""
    index = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
    return 0 if is_moe(vllm_config) else int(index)


def one_engine(vllm_config: VllmConfig) -> None:
    """Make a configuration of several replicas one that a single executor can load and freeze.

    Raises:
        UnsupportedError: the replicas hold the model together, and nothing says how they find each other.
    """
    config = vllm_config.parallel_config
    if config.data_parallel_size == 1:
        return
    if not is_moe(vllm_config):
        run_apart(config)
    elif not met_by_variables():
        raise UnsupportedError(
            f"the experts of this model are held by {config.data_parallel_size} data-parallel engines together, and "
            "this is one; freeze while they start: vllm serve MODEL --data-parallel-size "
            f"{config.data_parallel_size} --load-format thaw --model-loader-extra-config "
            """'{"snapshot": "weights.thaw", "mode": "freeze"}', or freeze in a process for each, with VLLM_DP_SIZE, """
            "VLLM_DP_RANK, VLLM_DP_MASTER_IP and VLLM_DP_MASTER_PORT set as for vLLM's own offline data parallelism"
        )


def held_experts(model: torch.nn.Module, parallel: Parallel) -> Experts | None:
    """Which experts a rank holds; None where they are not divided among ranks."""
    if parallel.ep_size == 1:
        return None
    maps = expert_maps(model)
    rules = sorted({rule for rule, _ in maps.values()})
    layers = sorted([name, places] for name, (_, places) in maps.items())
    return Experts(" and ".join(rules) or "in no layer", blake3(canonical(layers)).hexdigest())


def check_asked(path: str, held: Identity, asked: dict[str, Any]) -> None:
    """Refuse an engine whose options cannot lead to parallel sizes by which it can thaw a snapshot.

    A dense model's options may name data- and expert-parallel sizes that its ranks do not have; of these the workers
    judge, and of how another number of tensor-parallel ranks would divide its parameters.

    Args:
        asked: vLLM's options.
    """
    sizes = held.parallel
    replicas = asked.get("data_parallel_size", _number(os.environ.get("VLLM_DP_SIZE")))
    expert = bool(asked.get("enable_expert_parallel"))
    divisible = held.quantization is None and sizes.rank == 0 and sizes.ep_size == 1
    for option, mine, given, binding in (
        ("tensor_parallel_size", sizes.tp_size, asked.get("tensor_parallel_size", 1), not divisible),
        ("pipeline_parallel_size", sizes.pp_size, asked.get("pipeline_parallel_size", 1), True),
        ("data_parallel_size", sizes.dp_size, replicas, sizes.dp_size > 1),
        ("enable_expert_parallel", sizes.ep_size > 1, expert, sizes.ep_size > 1),
    ):
        if binding and mine != given:
            raise MismatchError(
                f"{path!r} was frozen with {option}={mine}, the engine is asked to run {given}; pass {option}={mine} "
                "or freeze again"
            )


def _number(text: str | None) -> int:
    """As a variable of vLLM has it; of one that is none vLLM tells."""
    return int(text) if text and text.isdigit() else 1


def engine_identity(
    vllm_config: VllmConfig, model_config: ModelConfig, model: torch.nn.Module | None = None
) -> Identity:
    """The identity of this worker's share of the model, the model id left open.

    Args:
        model: whose weights it is about; None for KV blocks, which are the same wherever the experts are.
    """
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
        experts=None if model is None else held_experts(model, parallel),
    )
