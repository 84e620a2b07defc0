#!/usr/bin/env python3
"""The tests that need a GPU, side by side where they can be: most of a start of vLLM is waiting.

    python scripts/gpu_tests.py [--logs DIRECTORY] [NAME …]

Run it with a Python that has torch, vLLM and thaw installed; what needs two GPUs is skipped where there is one. First
the groups that want the machine for themselves, then all others at once. Output goes to DIRECTORY/NAME.txt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALONE = {
    "transport": ["tests/gpu/test_core.py", "tests/gpu/test_transport.py"],
    "fill": ["tests/gpu/test_session_fill.py"],
    "coded": ["tests/gpu/test_coded_link.py", "tests/gpu/test_encoder.py"],
    "driver": ["tests/gpu/test_process_checkpoint.py"],
    "pages": ["tests/gpu/test_kv.py", "-k", "pages_go or memory_on"],
    "pool": ["tests/gpu/test_pool.py"],
    "fork": ["tests/gpu/test_fork_pool.py"],
    "caches": ["tests/gpu/test_caches.py"],
    "peers": ["tests/gpu/test_peers.py"],
}
TOGETHER = {
    "tensors": ["tests/gpu/test_vllm.py", "-k", "every_tensor"],
    "running": ["tests/gpu/test_vllm.py", "-k", "running"],
    "eager": ["tests/gpu/test_vllm.py", "-k", "fresh_processes and eager"],
    "graphs": ["tests/gpu/test_vllm.py", "-k", "fresh_processes and graphs"],
    "kv": ["tests/gpu/test_kv.py", "-k", "another_process"],
    "sessions": ["tests/gpu/test_sessions.py"],
    "streams": ["tests/gpu/test_kv.py", "-k", "requests_stream"],
    "swap": ["tests/gpu/test_swap.py", "-k", "swaps_and_parks"],
    "requests": ["tests/gpu/test_swap.py", "-k", "two_weights or without"],
    "ranks": ["tests/gpu/test_swap.py", "-k", "two_ranks"],
    "reshard": ["tests/gpu/test_ranks.py", "-k", "another_number or answers"],
    "kinds": ["tests/gpu/test_ranks.py", "-k", "pipeline or replicas or share_experts"],
    "whole": ["tests/gpu/test_ranks.py", "-k", "whole_engines and tensors"],
    "stages": ["tests/gpu/test_ranks.py", "-k", "whole_engines and stages"],
    "experts": ["tests/gpu/test_ranks.py", "-k", "whole_engines and experts"],
    "ray": ["tests/gpu/test_ray.py"],
    "killed": ["tests/gpu/test_swap.py", "-k", "killed"],
    "zygote": ["tests/gpu/test_zygote.py"],
    "automatic": ["tests/gpu/test_automatic.py"],
}


def started(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A pytest in the background."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as stream:
        # Without a cache its directory is an unknown option, so that pyproject's own options are replaced.
        options = ["-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers --import-mode=importlib"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "THAW_TEST_ANEW": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def summary(log: Path) -> str:
    """The line in which pytest says how many passed, and what failed."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n    ".join([next((line for line in reversed(lines) if " in " in line), "no summary"), *found])


def main() -> int:
    """Exit status: 0 when every group passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, help="where the outputs go [default: a new temporary directory]")
    groups = ALONE | TOGETHER
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"groups: {', '.join(groups)} [default: all]")
    given = parser.parse_args()
    if unknown := set(given.names) - set(groups):
        parser.error(f"there is no group {min(unknown)!r}; there are {', '.join(groups)}")
    logs = given.logs or Path(tempfile.mkdtemp(prefix="gpu-tests-"))
    logs.mkdir(parents=True, exist_ok=True)
    begun, failed = time.monotonic(), 0
    chosen = [name for name in groups if name in given.names or not given.names]
    together = [name for name in chosen if name in TOGETHER]
    for names in [*([name] for name in chosen if name in ALONE), together]:
        running = {name: started(groups[name], logs / f"{name}.txt") for name in names}
        while running:
            for name, process in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    failed += process.returncode != 0
                    told = summary(logs / f"{name}.txt")
                    print(f"{time.monotonic() - begun:5.0f} s  {name}: {told}", flush=True)
            time.sleep(0.2)
    print(f"{logs}: {failed} of {len(chosen)} groups failed" if failed else f"{logs}: all {len(chosen)} groups passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
