"""Everything that starts of vLLM import, imported once, with a proof after each part that forks stay sound."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import StorageError, UnsupportedError, UsageError
from ...zygote import processes, proof
from ...zygote.environment import Reads
from ...zygote.server import Imported
from . import versions


def _of(package: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names)


POOLS = ("numpy", "cv2", "scipy.linalg")
"""Modules with an OpenBLAS of their own, whose threads start when it is loaded, and survive forks by its own care."""
EVERYWHERE = (
    "torch",
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.generate.api_router",
    "uvloop",
    "thaw_vllm.engines.vllm.api",
    "thaw_vllm.engines.vllm.loader",
    "thaw_vllm.weights.restore",
)
"""Of thaw and of any vLLM; a version lacks some of them."""
ON_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")
ON_CUDA = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.compilation.backends",
    "vllm.compilation.cuda_graph",
)
LATER = (
    *("multiprocessing.popen_fork", "multiprocessing.popen_spawn_posix", "setproctitle"),
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.triton_utils.dispatcher",
    "vllm.v1.pool.flash_maxsim",
    "vllm.distributed.device_communicators.shm_broadcast",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_inspection",
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.compilation.caching",
    "vllm.compilation.compiler_interface",
    "vllm.compilation.piecewise_backend",
    "torch._dynamo.aot_compile",
    "torch._inductor.codecache",
    "torch._inductor.compile_fx",
    "torch._inductor.standalone_compile",
    "torch._functorch._aot_autograd.autograd_cache",
)
"""What starts import in the middle of their work, mostly inside functions; found by comparing ``sys.modules`` (the
``imported`` of a start report). Tried in a fork before: what would spoil the zygote is left to the starts."""
LATER_ON_CUDA = (
    *_of("vllm.compilation.passes", "vllm_inductor_pass", "pass_manager"),
    *_of("vllm.distributed.device_communicators", "cuda_communicator", "xpu_communicator"),
    "vllm.model_executor.kernels.linear.cute_dsl.ll_bf16",
    "vllm.model_executor.layers.batch_invariant",
    *_of("vllm.model_executor.warmup", "kernel_warmup", "minimax_m3_msa_warmup"),
    "vllm.utils.jit_monitor",
    *_of("vllm.v1.attention.backends", "flex_attention", "turboquant_attn"),
    "vllm.v1.sample.ops.topk_topp_triton",
    "vllm.v1.worker.gpu.model_states.default",
    *_of("triton", "backends.nvidia.compiler", "compiler.code_generator", "experimental.gluon"),
    "sympy.tensor.tensor",
    *_of("torch", "_export.passes._node_metadata_hook", "fx.experimental.validator", "utils._cpp_embed_headers"),
    *_of("torch._dynamo.backends", "cudagraphs", "distributed", "inductor", "onnxrt", "tensorrt", "torchxla", "tvm"),
    *_of("torch._inductor", "hooks", "runtime.caching", "runtime.triton_heuristics"),
    *_of("torch._inductor.codegen", "cpp_wrapper_cpu_array_ref", "cpp_wrapper_gpu", "cpp_wrapper_mps"),
    *_of("torch._inductor.codegen", "cuda_combined_scheduling", "halide", "memory_planning", "mps", "pallas"),
    *_of("torch._inductor.codegen", "python_wrapper_mtia", "rocm.rocm_cpp_scheduling", "wrapper_fxir"),
    *_of("torch._inductor.fx_passes", "apply_gumbel_max_trick", "efficient_conv_bn_eval", "freezing_patterns"),
    *_of("torch._inductor.fx_passes", "fuse_attention", "pad_mm", "quantization"),
    *_of("torch._inductor.fx_passes.serialized_patterns", "addmm_pattern", "bmm_pattern", "mm_pattern"),
    *_of("torch._inductor.fx_passes.serialized_patterns", *(f"_sfdp_pattern_{number}" for number in range(1, 28))),
)
MODELS = _of("vllm.model_executor.models", "llama", "qwen2", "qwen3")
"""Modules of models that are imported where no model is named."""


def import_all(extra: list[str], models: list[str]) -> Imported:
    """Import vLLM, thaw, the modules of ``models``' architectures and ``extra``.

    Args:
        extra: modules of the user's own, which must be there.
        models: model directories.

    Raises:
        UnsupportedError: a module started a thread or a pool, or initialised CUDA; it is named.
        UsageError: one of ``extra`` cannot be imported.
        StorageError: a model directory has no config.json.
    """
    started = time.perf_counter()
    architectures = [name for model in models for name in _architectures(Path(model))]
    reads = Reads()
    work = _Work()
    with reads.watching():
        for name in POOLS:
            work.import_one(name, required=False)
        work.pools = len(proof.native_threads())
        for name in EVERYWHERE:
            work.import_one(name, required=name in ("torch", "vllm"))
        cuda = versions.on_cuda()
        for name in ON_CUDA if cuda else ON_CPU:
            work.import_one(name, required=False)
        work.do("vLLM's plugins", versions.load_plugins)
        for name in dict.fromkeys(versions.model_modules(architectures) or MODELS):
            work.import_one(name, required=False)
        for name in architectures:
            work.do(f"looking at {name}", lambda name=name: versions.inspect_model(name))  # type: ignore[misc]
        for model in models:
            work.do(f"the tokenizer of {model}", lambda model=model: _tokenizer(model))  # type: ignore[misc]
        for name in extra:
            work.import_one(name, required=True)
        # Last of all, since a fork takes BLAS pools down, and what is allowed would no longer be what is there.
        work.import_sound(LATER + LATER_ON_CUDA if cuda else LATER)
        if cuda:
            work.do("hashing source files", versions.hash_sources)
    forks = versions.allow_forks(proof.fork_of_program)
    return Imported(
        modules=work.modules,
        left_out=work.left_out,
        pools=work.pools,
        seconds=time.perf_counter() - started,
        reads=reads,
        program=_begin_program,
        details={"vllm": versions.vllm_version(), "engines_forked": forks},
    )


class _Work:
    """Imports one after the other, and looks after each what became of the process.

    Attributes:
        pools: native threads that may be there; any number until that is known.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.left_out: list[str] = []
        self.pools: int = 1 << 20

    def import_one(self, name: str, *, required: bool) -> None:
        try:
            self.do(name, lambda: importlib.import_module(name))
        except ImportError as error:
            if required:
                raise UsageError(f"cannot import {name}: {error}") from None
            self.left_out.append(name)
        else:
            self.modules.append(name)

    def import_sound(self, names: Sequence[str]) -> None:
        """Those of ``names`` that are there and leave a fork of this process as it should be.

        No native thread more is allowed than there is after that fork: what uses BLAS is left out.
        """
        left, pools = list(names), self.pools
        while left:
            answers = _tried(left)
            self.pools = len(proof.native_threads())
            for name, answer in zip(left, answers, strict=False):
                if answer == _SOUND:
                    self.import_one(name, required=False)
                elif answer == _ABSENT:
                    self.left_out.append(name)
                else:
                    print(f"{name} is not imported beforehand: it would spoil this process", file=sys.stderr)
            left = left[len(answers) :]
        self.pools = pools

    def do(self, what: str, step: Callable[[], object]) -> None:
        step()
        reason = proof.unsound(self.pools)
        if reason:
            raise UnsupportedError(f"after {what}, which is to blame, the zygote could not be forked: {reason}")


_SOUND, _ABSENT, _SPOILS = "+", "-", "!"
_PATIENCE = 60.0
"""Seconds for a module to be imported in a trial."""


def _tried(names: Sequence[str]) -> str:
    """What a fork found of each of ``names``, of which it imported one after the other until one had spoilt it."""
    read, write = os.pipe()
    me = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the pools' threads, which survive forks
        child = os.fork()
    if not child:
        try:
            os.setsid()
            processes.die_with(me)
            _try(names, write)
        finally:
            os._exit(0)
    os.close(write)
    try:
        return _answers(read, len(names), child)
    finally:
        os.close(read)
        for kill in (os.killpg, os.kill):  # the group, with what modules have started; it may not lead one yet
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(child, 0)


def _try(names: Sequence[str], write: int) -> None:
    pools = len(proof.native_threads())
    for name in names:
        answer = _SOUND
        try:
            importlib.import_module(name)
        except Exception:
            answer = _ABSENT
        answer = _SPOILS if proof.unsound(pools) else answer
        os.write(write, answer.encode())
        if answer == _SPOILS:
            return


def _answers(read: int, count: int, child: int) -> str:
    """Of a trial; the module in which it ended, or took too long, is one that spoils."""
    found, until = "", time.monotonic() + _PATIENCE
    while len(found) < count and not found.endswith(_SPOILS):
        ready = _readable(read, 0.2)
        more = os.read(read, count).decode() if ready else ""
        if more:
            found, until = found + more, time.monotonic() + _PATIENCE
        # A child can end although something that it started keeps the pipe, and after its last answer.
        elif ready or time.monotonic() > until or (processes.has_ended(child) and not _readable(read)):
            found += _SPOILS
    return found


def _readable(file: int, patience: float = 0.0) -> bool:
    return bool(select.select([file], [], [], patience)[0])


def _architectures(model: Path) -> list[str]:
    try:
        found = json.loads((model / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError) as error:
        raise StorageError(f"{str(model)!r} is no model directory, its config.json cannot be read: {error}") from None
    return [str(name) for name in found]


def _tokenizer(model: str) -> None:
    """Load it, for the modules that this imports; it is not kept."""
    from transformers import AutoConfig, AutoTokenizer

    for kind in (AutoConfig, AutoTokenizer):
        try:
            kind.from_pretrained(model)
        except Exception as error:  # the program will say so, should it need it
            print(f"{kind.__name__} of {model}: {error}", file=sys.stderr)


def _begin_program() -> None:
    """In a program, before its first line."""
    versions.note_choice()
    if os.environ.get("THAW_START_REPORT"):
        from . import startup

        startup.begin()
        startup.plugin_loaded()
