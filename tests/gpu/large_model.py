"""One large checkpoint through vLLM: freeze, restore, every tensor compared, tokens compared, host memory watched.

    python tests/gpu/large_model.py MODEL_DIRECTORY SNAPSHOT RESULT.json [engine_arg=value …]

Prints and writes a JSON object: equal tensors (digests of the raw stage and after post-processing), equal tokens and
log-probabilities, seconds of each phase, and the peak of host memory above what was held before the weights were read:
of the process, and of the whole machine, which should do nothing else. The page cache is in neither.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def process_memory(cached: tuple[str, ...]) -> int:
    """Bytes this process holds in anonymous and shared memory, in whatever it has mapped but files under ``cached``.

    The pages of a file are the page cache's. On tmpfs the kernel counts them as shared memory, hence not /proc's sum.
    """
    held, path = 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, value, *rest = line.split(None, 5)
        if not name.endswith(":"):  # a mapping's first line: range, rights, offset, device, inode, path
            path = rest[3] if len(rest) == 4 else ""
        elif name == "Anonymous:" or (name == "Shared_Dirty:" and path.startswith(("/dev/", "/memfd:", "/SYSV"))):
            held += int(value) * 1024 * (not path.startswith(cached))
    return held


def machine_memory() -> int:
    """Bytes in use on the whole machine, driver and pinned memory included, page cache and tmpfs not."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    size = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return size["MemTotal"] - size["MemFree"] - size["Buffers"] - size["Cached"] - size["SReclaimable"]


class Watch:
    """The highest memory of the process and of the machine while the block runs, above its start."""

    def __init__(self, cached: tuple[str, ...]) -> None:
        self._cached = cached

    def _now(self) -> tuple[int, int]:
        return process_memory(self._cached), machine_memory()

    def __enter__(self) -> Watch:
        self._stop, self._start = threading.Event(), self._now()
        self.peak = (0, 0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            now = self._now()
            self.peak = tuple(max(p, n - s) for p, n, s in zip(self.peak, now, self._start, strict=True))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of every parameter and buffer, by name."""
    import torch

    def digest(t: torch.Tensor) -> str:
        data = t.detach().contiguous().cpu()
        raw = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
        return hashlib.sha256(raw).hexdigest() + f" {t.dtype} {tuple(t.shape)} {t.stride()}"

    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def load_and_digest(model: str, snapshot: str, options: dict[str, Any], answer: str) -> None:
    """In a process of its own: vLLM's ``get_model``, digests before and after post-processing, seconds, memory.

    Writes them to the file ``answer`` and ends the process there and then: leaving the process group to the
    interpreter's own end may hang in NCCL.
    """
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model

    config = EngineArgs(model=model, enforce_eager=True, **options).create_engine_config()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    else:
        torch.accelerator.empty_cache = lambda: None
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
        ensure_model_parallel_initialized(1, 1)
    found: dict[str, Any] = {}
    loader = base_loader.BaseModelLoader
    process = base_loader.process_weights_after_loading

    def processed(module: Any, *args: Any) -> None:
        found["raw"] = digests(module)
        process(module, *args)

    base_loader.process_weights_after_loading = processed
    kinds = [k for k in loader.__subclasses__() if "load_weights" in vars(k)]
    for kind in kinds:
        kind.load_weights = timed(kind.load_weights, found, (model, snapshot))
    with set_current_vllm_config(config):
        module = get_model(vllm_config=config)
    found["processed"] = digests(module)
    Path(answer).write_text(json.dumps(found))
    os._exit(0)


def timed(original: Any, found: dict[str, Any], cached: tuple[str, ...]) -> Any:
    """``load_weights`` with its seconds and its peak of host memory noted; the outermost call wins."""

    def load_weights(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        with Watch(cached) as watch:
            original(self, *args)
        found["seconds"] = time.perf_counter() - start
        found["peak_host_mib"] = dict(
            zip(("process", "machine"), (round(p / 2**20, 1) for p in watch.peak), strict=True)
        )

    return load_weights


def in_fresh_process(model: str, snapshot: str, options: dict[str, Any]) -> dict[str, Any]:
    """``load_and_digest`` in a spawned process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = multiprocessing.get_context("spawn").Process(
            target=load_and_digest, args=(model, snapshot, options, str(answer)), daemon=True
        )
        process.start()
        process.join(300)
        if process.exitcode != 0:
            sys.exit(f"the process that should load {model} with {options} ended with {process.exitcode}")
        found: dict[str, Any] = json.loads(answer.read_text())
        print(found["seconds"], found["peak_host_mib"], flush=True)
        return found


def main(model: str, snapshot: str, result: str, *pairs: str) -> None:
    """See the module's docstring."""
    from thaw_vllm.engines.vllm import fresh

    args: dict[str, Any] = {"max_model_len": 2048}
    args |= {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
    options = {"max_model_len": args["max_model_len"]}
    extra = {"load_format": "thaw", "model_loader_extra_config": {"snapshot": snapshot}}
    runs = {"default": in_fresh_process(model, snapshot, options)}
    freezing = {"snapshot": snapshot, "mode": "freeze", "force": True}
    runs["freeze"] = in_fresh_process(model, snapshot, options | extra | {"model_loader_extra_config": freezing})
    runs["thaw"] = in_fresh_process(model, snapshot, options | extra)
    questions = [list(range(5, 200)), [11, 12, 13]]
    default = fresh.run("ask", model=model, snapshot=None, engine_args=args, questions=questions)
    thawed = fresh.run("ask", model=model, snapshot=snapshot, engine_args=args, questions=questions)
    document = {
        "model": model,
        "bytes": os.path.getsize(snapshot),
        "tensors": len(runs["default"]["raw"]),
        "raw_equal": runs["default"]["raw"] == runs["thaw"]["raw"] == runs["freeze"]["raw"],
        "processed_equal": runs["default"]["processed"] == runs["thaw"]["processed"],
        "outputs_equal": default["outputs"] == thawed["outputs"],
        "load_weights_seconds": {name: run["seconds"] for name, run in runs.items()},
        "peak_host_mib": {name: run["peak_host_mib"] for name, run in runs.items()},
        "start_default": default["seconds"],
        "start_thaw": thawed["seconds"],
    }
    Path(result).write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    if not (document["raw_equal"] and document["processed_equal"] and document["outputs_equal"]):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
