"""Python calls over vLLM: freeze a checkpoint or a running engine, thaw an engine in one line."""

from __future__ import annotations

import logging
import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MismatchError, MissingDependencyError, StorageError, UsageError
from ...weights.freeze import FreezeReport
from ...weights.open import open_snapshot
from . import versions
from .answers import all_raised
from .caches import bring, chosen_file
from .failures import reported
from .fast_start import FastStart, set_meanwhile
from .fast_start import fast_start as choose_fast_start
from .identity import check_asked, one_engine
from .snapshot_choice import AUTO, cached

if TYPE_CHECKING:
    from vllm import LLM


def load(
    model: str | None = None,
    snapshot: str | os.PathLike[str] | None = None,
    kv_snapshot: str | os.PathLike[str] | None = None,
    *,
    fast_start: bool = False,
    caches: str | os.PathLike[str] | None = None,
    trust_caches: str | None = None,
    **llm_kwargs: Any,
) -> LLM:
    """A ready ``vllm.LLM`` from a snapshot, with vLLM's own defaults.

    Args:
        model: model directory or hub name, for its config and tokenizer only; None uses the ones the snapshot carries.
        snapshot: the ``.thaw`` file (the manifest of a set); or ``auto``: what thaw's cache has for this model, as
            ``thaw serve`` finds it, else the checkpoint, which is then frozen into the cache.
        kv_snapshot: a ``.thawkv`` file made with the same weights and configuration; restored into the new engine.
        fast_start: few CUDA graphs, compiled code as one file, and memory as it was measured before
            (``fast_start.fast_start``); what that costs is logged.
        caches: a file of what vLLM has compiled elsewhere (``pack_caches``, ``thaw caches pack --offline``); where only
            ``trust_caches`` is given, the one beside the snapshot. What stands against it is logged, and compiled.
        trust_caches: ``own`` for a file that was packed here by this user, or its SHA-256: vLLM executes what is in it.
        llm_kwargs: passed to ``vllm.LLM`` as they are, ``model_loader_extra_config`` merged with ours.

    Raises:
        UsageError, StorageError, MismatchError, UnsupportedError: before the engine is started, where that can be told.
    """
    if snapshot is None:
        raise UsageError("load() needs a snapshot: thaw_vllm.load(model, 'weights.thaw')")
    if llm_kwargs.get("load_format", "thaw") != "thaw":
        raise UsageError("load() sets load_format='thaw' itself; leave load_format out")
    if "snapshot" in llm_kwargs.get("model_loader_extra_config", {}):
        raise UsageError("load() names the snapshot once; leave it out of model_loader_extra_config")
    versions.vllm_version()
    path = os.path.abspath(os.fspath(snapshot))
    file = chosen_file(caches, None if snapshot == AUTO else path, trust_caches)
    if model is not None:
        check_model(model)
    elif snapshot == AUTO:
        raise UsageError("load() needs a model where the snapshot is 'auto'; a file of that name is './auto'")
    if snapshot != AUTO:
        check_sizes(path, llm_kwargs)
    if kv_snapshot is not None and snapshot != AUTO:
        check_kv(os.fspath(kv_snapshot), path)
    if model is None:
        from .files import carried_directory

        model = str(carried_directory(path))
    vllm = require_vllm()
    named = cached() if snapshot == AUTO else {"snapshot": path}
    extra = {**named, **llm_kwargs.pop("model_loader_extra_config", {})}
    if kv_snapshot is not None:
        extra["expects_kv"] = True
    _check_options(extra)
    llm_kwargs["load_format"] = "thaw"
    preset = choose_fast_start(llm_kwargs, os.environ) if fast_start else FastStart({}, {}, [])
    for line in preset.said:
        logging.getLogger(f"vllm.{__name__}").info("fast start: %s", line)  # vLLM's log, as the loader's
    variables = dict(preset.environment)
    if file is not None:
        report = os.environ.get("THAW_START_REPORT")
        brought = bring(file, trust_caches, dict(os.environ) | variables, report=report)
        logging.getLogger(f"vllm.{__name__}").log(logging.INFO if brought.used else logging.WARNING, "%s", brought.said)
        variables |= brought.environment
    with reported() as folder, set_meanwhile(variables):
        extra |= {"failures": folder, "asked": time.time()}
        llm: LLM = vllm.LLM(model=model, model_loader_extra_config=extra, **llm_kwargs | preset.engine_args)
    if kv_snapshot is not None:
        from .kv.api import restore_kv_cache

        restore_kv_cache(llm, kv_snapshot)
    return llm


def freeze_model_tp(llm: LLM, path: str | os.PathLike[str], *, force: bool = False) -> list[FreezeReport]:
    """Freeze a running engine, each tensor-parallel rank its own file (``weights.thaw``, ``weights.rank1.thaw``, …).

    Args:
        llm: a ``vllm.LLM`` whose post-processing changed nothing (unquantised dense models on CUDA).
        path: the manifest's path, on a file system that all ranks share.
        force: replace an existing snapshot.

    Raises:
        UsageError: the engine is asleep.
        UnsupportedError: weights were changed after loading, or LoRA adapters are enabled; freeze while loading
            (``freeze_checkpoint``).
        StorageError: see FreezeOptions; nothing was published.
    """
    if llm.llm_engine.is_sleeping():
        raise UsageError("the engine is asleep and its weights are not in its memory; call llm.wake_up() first")
    answers = llm.collective_rpc("thaw_freeze", args=(os.path.abspath(os.fspath(path)), force))
    return [FreezeReport(**answer) for answer in all_raised(answers)]


def freeze_checkpoint(model: str, path: str | os.PathLike[str], **engine_args: Any) -> list[FreezeReport]:
    """Load a checkpoint through vLLM and freeze each rank's raw parameters; no engine stays and no KV cache is made.

    Args:
        model: model directory or hub name.
        path: the snapshot's path, the manifest's when there are several ranks.
        engine_args: vLLM's engine arguments (``tensor_parallel_size``, ``dtype``, ``quantization``, …), and
            ``force``, ``compress``, ``source_format``, ``workers`` of LoaderConfig. ``enforce_eager`` makes no
            difference here.

    Returns:
        One report a rank.
    """
    from ...transport.writer import check_target

    taken = sorted({"load_format", "model_loader_extra_config"} & engine_args.keys())
    if taken:
        raise UsageError(f"freezing sets {taken[0]} itself; leave it out (source_format names vLLM's load format)")
    path = os.path.abspath(os.fspath(path))
    extra: dict[str, Any] = {"snapshot": path, "mode": "freeze"}
    ours = ("force", "compress", "source_format", "workers")
    extra |= {name: engine_args.pop(name) for name in ours if name in engine_args}
    check_target(Path(path), bool(extra.get("force")))
    check_model(model)
    versions.vllm_version()
    require_vllm()
    _check_options(extra)
    with reported() as folder:
        return _freeze(model, extra | {"failures": folder}, engine_args)


def _freeze(model: str, extra: dict[str, Any], engine_args: dict[str, Any]) -> list[FreezeReport]:
    from vllm.engine.arg_utils import EngineArgs

    # Nothing is run, so nothing need be compiled.
    # Neither is a KV cache made, so there is no need for nine tenths of the memory to be free.
    engine_args.setdefault("gpu_memory_utilization", 0.1)
    options = engine_args | {"enforce_eager": True, "load_format": "thaw", "model_loader_extra_config": extra}
    try:
        config = EngineArgs(model=model, **options).create_engine_config()
    except OSError as error:
        raise UsageError(
            f"vLLM finds no model {model!r}: {textwrap.shorten(str(error), 160, placeholder=' …')}; give a model "
            "directory, or a name on the hub that is cached, or can be downloaded (HF_HUB_OFFLINE is not 1)"
        ) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"vLLM does not accept these engine arguments: {' '.join(str(error).split())}") from error
    one_engine(config)
    executor = None
    try:
        executor = versions.executor_class(config)(config)
        return [FreezeReport(**answer) for answer in executor.collective_rpc("thaw_report")]
    finally:
        if executor is not None:
            executor.shutdown()


def _check_options(extra: dict[str, Any]) -> None:
    """What the loader will check in a worker, checked here first, where the error reaches the caller as it is."""
    from .loader import LoaderConfig

    LoaderConfig.parse(extra)


def check_model(model: str) -> None:
    """Refuse what is written like a path and is no directory; anything else may be a name on the hub."""
    looks_like_path = model.startswith((".", "~", os.sep)) or model.endswith(os.sep) or model.count("/") > 1
    if not os.path.isdir(model) and looks_like_path:
        raise StorageError(f"there is no model directory {model!r}; give one, or a model's name on the hub")


def check_sizes(path: str, llm_kwargs: dict[str, Any]) -> None:
    """Refuse a snapshot whose parallel sizes the engine cannot thaw, before vLLM starts its processes.

    Of another number of tensor-parallel ranks it can be, unless its weights are quantised; the loader looks closer.
    """
    with open_snapshot(path, with_chunks=False) as opened:
        identity = opened.snapshot.header.identity
    if identity.engine != "vllm":
        raise MismatchError(
            f"{path!r} holds the {identity.stage!r} stage of {identity.engine or 'a plain module'}; vLLM needs the raw "
            "stage: thaw freeze --model M --output weights.thaw"
        )
    check_asked(path, identity, llm_kwargs)


def check_kv(kv_snapshot: str, snapshot: str) -> None:
    """Refuse KV blocks that other weights made before vLLM starts its processes."""
    with open_snapshot(kv_snapshot, with_chunks=False) as kv, open_snapshot(snapshot, with_chunks=False) as weights:
        ours, theirs = kv.snapshot.header, weights.snapshot.header
    if ours.kv is None:
        raise MismatchError(f"{kv_snapshot!r} holds weights, not KV blocks; pass it as snapshot")
    if theirs.kv is not None:
        raise MismatchError(f"{snapshot!r} holds KV blocks, not weights; pass it as kv_snapshot")
    if ours.identity.model != theirs.identity.model:
        raise MismatchError(
            f"{kv_snapshot!r} was made with the weights {ours.identity.model}, {snapshot!r} holds "
            f"{theirs.identity.model}; freeze the cache of this model"
        )


def require_vllm_installed() -> None:
    """Check that vLLM is there, and in the support window, without importing it."""
    versions.vllm_version()


def require_vllm() -> Any:
    """The vllm module.

    Raises:
        MissingDependencyError: with the install line.
    """
    try:
        import vllm
    except ImportError as error:
        raise MissingDependencyError(f"vLLM cannot be imported ({error}); {versions.INSTALL}") from None
    return vllm
