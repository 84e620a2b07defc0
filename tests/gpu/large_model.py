"""One large checkpoint through vLLM: freeze, restore, every tensor compared, tokens compared, host memory watched.

    python tests/gpu/large_model.py MODEL_DIRECTORY SNAPSHOT RESULT.json [engine_arg=value …]

Prints and writes a JSON object: equal tensors (digests of the raw stage and after post-processing), equal tokens and
log-probabilities, seconds of each phase, and the peak of anonymous and shared host memory above what the process held
before its weights were read (the page cache is not in it).
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
from pathlib import Path
from typing import Any


def host_memory() -> int:
    """Bytes of anonymous and shared memory of this process; mapped files are the page cache's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Watch:
    """The highest ``host_memory`` while the block runs, above its start."""

    def __enter__(self) -> Watch:
        self._stop, self._start = threading.Event(), host_memory()
        self.peak = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, host_memory() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of every parameter and buffer, by name."""
    import torch

    found = {}
    for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        data = t.detach().contiguous().cpu()
        raw = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
        found[name] = hashlib.sha256(raw).hexdigest() + f" {t.dtype} {tuple(t.shape)} {t.stride()}"
    return found


def load_and_digest(model: str, options: dict[str, Any], answer: Any) -> None:
    """In a process of its own: vLLM's ``get_model``, digests before and after post-processing, seconds, memory."""
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
        kind.load_weights = timed(kind.load_weights, found)
    with set_current_vllm_config(config):
        module = get_model(vllm_config=config)
    found["processed"] = digests(module)
    answer.put(found)


def timed(original: Any, found: dict[str, Any]) -> Any:
    """``load_weights`` with its seconds and its peak of host memory noted; the outermost call wins."""

    def load_weights(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        with Watch() as watch:
            original(self, *args)
        found["seconds"] = time.perf_counter() - start
        found["peak_host_mib"] = round(watch.peak / 2**20, 1)

    return load_weights


def in_fresh_process(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """``load_and_digest`` in a spawned process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=load_and_digest, args=(model, options, answer))
    process.start()
    found: dict[str, Any] = answer.get()
    process.join()
    return found


def main(model: str, snapshot: str, result: str, *pairs: str) -> None:
    """See the module's docstring."""
    from thaw_vllm.engines.vllm import fresh

    args: dict[str, Any] = {"max_model_len": 2048}
    args |= {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
    options = {"max_model_len": args["max_model_len"]}
    extra = {"load_format": "thaw", "model_loader_extra_config": {"snapshot": snapshot}}
    runs = {"default": in_fresh_process(model, options)}
    freezing = {"snapshot": snapshot, "mode": "freeze", "force": True}
    runs["freeze"] = in_fresh_process(model, options | extra | {"model_loader_extra_config": freezing})
    runs["thaw"] = in_fresh_process(model, options | extra)
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
