"""What a freeze of the KV cache costs 32 requests that stream beside it, on a model of real size.

    python tests/gpu/freeze_beside_requests.py MODEL_DIRECTORY FILE.thawkv

Appends a record of the work ``kv-freeze`` to benchmarks/results, with the 99th percentiles of the seconds between two
tokens of a request, alone and beside freezes that follow one another. Exit code 1 if a token was another, unless tokens
differ between two rounds without any freeze, too: they may, with 16 bits, where requests meet in other steps.
VLLM_BATCH_INVARIANT=1 has vLLM compute each alike in whatever step, and is recorded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.engines.vllm.test_kv import ID, run_script

REQUESTS, LENGTH, TOKENS = 32, 1024, 256


def main(model: str, path: str) -> int:
    """See the module's docstring."""
    from thaw_vllm.bench.record import Record, append, file_system_of

    prompts = [[3 + (number * (7 + k)) % 30000 for number in range(LENGTH)] for k in range(REQUESTS)]
    engine = {"model": model, "max_model_len": 2048, "enable_prefix_caching": True}
    asked = {"engine": engine, "prompts": prompts, "max_tokens": TOKENS, "path": path, "model_id": ID}
    asked["control"] = True
    with tempfile.TemporaryDirectory() as folder:
        answer = run_script("kv_load.py", Path(folder), asked)
    alone, beside = answer["gaps"]
    reports, same = answer["reports"], answer["beside"] == answer["alone"]
    control = answer["control"] == answer["alone"]
    equal = same if control or same else None
    print(f"p99 between tokens: {alone * 1e3:.1f} ms, {beside * 1e3:.1f} ms while freezing: {beside / alone:.2f} times")
    print(f"{len(reports)} freezes: {[(r['bytes'], round(r['seconds'], 2)) for r in reports]}, tokens equal: {same}")
    print(f"tokens of two rounds without a freeze equal: {control}")
    extra = {
        "directory": str(Path(path).parent),
        "tokens": LENGTH,
        "p99_gap_alone_s": round(alone, 5),
        "p99_gap_beside_s": round(beside, 5),
        "tokens_equal": same,
        "control_tokens_equal": control,
        "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
    }
    append(
        [
            Record(
                "kv-freeze",
                "thaw",
                f"beside {REQUESTS} requests",
                max(report["bytes"] for report in reports),
                [report["seconds"] for report in reports],
                "warm",
                False,
                equal,
                None,
                extra,
                file_system_of(Path(path).parent),
            )
        ]
    )
    return 1 if equal is False else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
