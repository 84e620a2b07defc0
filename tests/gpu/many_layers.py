"""Weights of Llama 70B's shape with some of its 80 layers, over two GPUs: does a restore grow with its bytes alone?

    python tests/gpu/many_layers.py RESULT.json [--layers 10 --layers 30] [--ranks 2] [--dir /dev/shm]

All of it would be 141 GB, as much as a GPU or this machine's disk. Weights are vLLM's own dummy ones, which are seeded.
For each number of layers a set is frozen, and engines with and without it answer the same prompts. Writes after each
what it has: bytes, each rank's seconds by phase, whether tokens and log-probabilities are equal, and by how much the
machine's memory beyond the page cache was larger at most while the engine thawed than before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from thaw_vllm.bench.footprint import Watch
from thaw_vllm.engines.vllm import fresh

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PROMPTS = [list(range(5, 70)), [7, 7, 7]]


def measured(layers: int, ranks: int, directory: Path) -> dict[str, Any]:
    """The figures of so many layers."""
    args = {"tensor_parallel_size": ranks, "max_model_len": 512, "enforce_eager": True, "skip_tokenizer_init": True}
    args["kv_cache_memory_bytes"] = 1 << 30
    with tempfile.TemporaryDirectory(dir=directory, prefix="layers-") as name:
        model, path = Path(name) / "model", Path(name) / "w.thaw"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
        start = time.perf_counter()
        frozen = fresh.run("freeze", model=str(model), snapshot=path, engine_args=args | {"source_format": "dummy"})
        took = time.perf_counter() - start
        asked: dict[str, Any] = {"model": str(model), "questions": PROMPTS, "max_tokens": 16}
        with Watch(os.getpid()) as watch:
            thawed = fresh.run("ask", snapshot=path, engine_args=args, **asked)
        default = fresh.run("ask", snapshot=None, engine_args=args | {"load_format": "dummy"}, **asked)
    return {
        "layers": layers,
        "ranks": ranks,
        "bytes": sum(report["bytes"] for report in thawed["reports"]),
        "freeze_with_start": took,
        "freezing": [report["seconds"] for report in frozen["reports"]],
        "restoring": [report["seconds"] for report in thawed["reports"]],
        "routes": [report["route"] for report in thawed["reports"]],
        "verified": [report["verified"] for report in thawed["reports"]],
        "equal": thawed["outputs"] == default["outputs"],
        "machine_mib": watch.machine_mib,
    }


def main() -> int:
    """Exit status: 0 when all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    given = parser.parse_args()
    found = []
    for layers in given.layers or [10, 30]:
        found.append(measured(layers, given.ranks, given.dir))
        print(json.dumps(found[-1]), flush=True)
        given.result.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(one["equal"] for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
