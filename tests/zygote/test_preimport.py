"""Modules that are tried in a fork before they are imported, and what else a zygote does beforehand; no vLLM here."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from thaw_vllm.engines.vllm import versions

MODULES = {
    "good": "",
    "better": "import good",
    "absent": "import nothing_of_this_name",
    "failing": "1 / 0",
    "leaving": "raise SystemExit(3)",
    "dying": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "broken": "import good; 1 / 0",
    "hanging": "import time; time.sleep(600)",
    "dying with a child": "import os, time\nif os.fork(): os._exit(1)\ntime.sleep(600)",
    "native": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "libc.pthread_create(ctypes.byref(ctypes.c_void_p()), None, ctypes.cast(libc.pause, ctypes.c_void_p), None)"
    ),
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
}
SCRIPT = """
import json, sys
from thaw_vllm.engines.vllm import preimport
from thaw_vllm.zygote import proof
preimport._PATIENCE = 2
sys.path.insert(0, sys.argv[1])
names = sys.argv[2:]
work = preimport._Work()
work.pools = 7  # as of BLAS, which a fork takes down
print("not twice")
work.import_sound(names)
assert work.pools == 7
there = [name for name in names if name in sys.modules]
answer = {"there": there, "noted": work.modules, "absent": work.left_out, "unsound": proof.unsound(0)}
print(json.dumps(answer))
"""


@pytest.mark.parametrize(
    ("names", "spoilt"),
    [
        (["good", "better"], []),
        (["absent", "good", "failing", "better", "nowhere"], []),
        (["broken"], []),
        (["good", "threaded", "better"], ["threaded"]),
        (["native", "good"], ["native"]),
        (["threaded", "dying", "leaving", "good"], ["threaded", "dying", "leaving"]),
        (["good", "dying"], ["dying"]),
        (["hanging", "good"], ["hanging"]),
        (["dying with a child", "good"], ["dying with a child"]),
        ([], []),
    ],
)
def test_what_would_spoil_the_process_is_left_out(names: list[str], spoilt: list[str], tmp_path: Path):
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    command = [sys.executable, "-c", SCRIPT, tmp_path, *names]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    first, last = ran.stdout.splitlines()
    wanted = [name for name in names if name in ("good", "better")]
    absent = [name for name in names if name in ("absent", "failing", "nowhere", "broken")]
    assert first == "not twice"
    assert json.loads(last) == {"there": wanted, "noted": wanted, "absent": absent, "unsound": None}
    told = [line.partition(" is not imported")[0] for line in ran.stderr.splitlines()]
    assert told == spoilt and all("spoil" in line for line in ran.stderr.splitlines())
    assert not running(str(tmp_path)), "a trial, or what a module has started in it"


def running(text: str) -> list[int]:
    """Processes with this in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


HASHES = """
import builtins, sys
import torch._inductor.codecache as codecache, triton.runtime.cache as cache
from thaw_vllm.engines.vllm import versions
if sys.argv[1] == "before":
    versions.hash_sources()
opened, real = [], builtins.open
builtins.open = lambda *args, **options: opened.append(args[0]) or real(*args, **options)
assert codecache.torch_key() and cache.triton_key()
print(len(opened))
"""


@pytest.mark.parametrize("when", ["before", "not"])
def test_sources_are_hashed_once(when: str):
    """By functions of PyTorch's and Triton's that keep what they have found."""
    pytest.importorskip("triton.runtime.cache")
    ran = subprocess.run([sys.executable, "-c", HASHES, when], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    opened = int(ran.stdout)
    assert opened == 0 if when == "before" else opened >= 100


def test_what_has_no_sources_to_hash_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace(triton_key=lambda: 1 / 0))
    key = SimpleNamespace(torch_key=lambda: hashed.append("torch"))
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", key)
    versions.hash_sources()
    assert hashed == ["torch"], "the other one failed"
    monkeypatch.delitem(sys.modules, "triton.runtime.cache")
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", SimpleNamespace())
    versions.hash_sources()
    assert "triton.runtime.cache" not in sys.modules, "nothing is imported for it"
