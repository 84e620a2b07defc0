"""Modules that are tried in a fork before they are imported; no vLLM here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = {
    "good": "",
    "better": "import good",
    "absent": "import nothing_of_this_name",
    "failing": "1 / 0",
    "leaving": "raise SystemExit(3)",
    "dying": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
}
SCRIPT = """
import json, sys
from thaw_vllm.engines.vllm.preimport import _Work
from thaw_vllm.zygote import proof
sys.path.insert(0, sys.argv[1])
names = sys.argv[2:]
work = _Work()
work.pools = len(proof.native_threads())
work.import_sound(names)
there = [name for name in names if name in sys.modules]
print(json.dumps({"there": there, "noted": work.modules, "unsound": proof.unsound(work.pools)}))
"""


@pytest.mark.parametrize(
    ("names", "spoilt"),
    [
        (["good", "better"], []),
        (["absent", "good", "failing", "better", "nowhere"], []),
        (["good", "threaded", "better"], ["threaded"]),
        (["threaded", "dying", "leaving", "good"], ["threaded", "dying", "leaving"]),
        (["good", "dying"], ["dying"]),
        (["dying"], ["dying"]),
        ([], []),
    ],
)
def test_what_would_spoil_the_process_is_left_out(names: list[str], spoilt: list[str], tmp_path: Path):
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    ran = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, *names], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    wanted = [name for name in names if name in ("good", "better")]
    assert json.loads(ran.stdout) == {"there": wanted, "noted": wanted, "unsound": None}
    told = [line.partition(" ")[0] for line in ran.stderr.splitlines()]
    assert told == spoilt and all("spoil" in line for line in ran.stderr.splitlines())
