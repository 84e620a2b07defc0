"""Engines of tests in forks of a zygote, which saves each of them the imports: most of a start on two cores.

Each is a process of its own all the same, with an engine core and workers of its own. Tests that are about how a
process starts, or about variables that are read at import, start theirs anew. So do all of them where
``THAW_TEST_ANEW`` is set, as where they run side by side on a machine with a GPU.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from thaw_vllm.bench.process import COMMAND
from thaw_vllm.engines.vllm import fresh
from thaw_vllm.zygote import start
from thaw_vllm.zygote.place import VARIABLE, Place

ROOT = Path(__file__).parents[3]
NAME = "tests"
PARALLEL = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""vLLM's CPU build places one rank a NUMA node by itself; on a machine with one node it must be told cores."""
_ON_CPU = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PLAIN = _ON_CPU if torch.version.cuda is None else {}
"""For engines on the CPU that compile no model, in place of PARALLEL as well. Else the first token of each waits for a
compiler, which a function of its sampler is given to; and all of them compute on the same core, which vLLM chooses,
while others are idle. With COMPILES a program is started anew instead, since no zygote has that."""
COMPILES = {"TORCHDYNAMO_DISABLE": "0"}
_BEGINNING = dict(os.environ)
"""Before any engine ran in this process, which leaves variables of its own."""
_PASSED = ("THAW_",)
"""Beginnings of names whose values tests change."""
_HAND_OVER = "os.execv(sys.argv[1], [*sys.argv[1:-1], f'/proc/{os.getpid()}/fd/{sys.argv[-1]}'])"
_places: dict[str, Place] = {}
"""By ``PYTHONPATH``, which a program has in common with its zygote."""


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Variables with which a program is taken by a zygote, which is started where it is not there yet."""
    own = fresh.READ_FROM_THE_LOG | {"PYTHONPATH": _paths(more or {})}
    if _anew():
        return os.environ | PLAIN | _beside_plain(more or {}) | own
    if own["PYTHONPATH"] not in _places:
        directory = tempfile.mkdtemp(prefix="thaw-z-", dir="/tmp")
        place = _places[own["PYTHONPATH"]] = Place(Path(directory), NAME)
        with mock.patch.dict(os.environ, _BEGINNING, clear=True):
            pid = start.start(place, imports=[], models=[], environment=PLAIN | own | {VARIABLE: directory})
        atexit.register(_end, pid, directory, os.getpid())
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
    where = {VARIABLE: str(_places[own["PYTHONPATH"]].directory)}
    return _BEGINNING | passed | PLAIN | _beside_plain(more or {}) | own | where


def command() -> list[str]:
    """What stands before a script, ``-m`` or ``-c``, as ``python`` does; that where a zygote does not take it."""
    if _anew():
        return [sys.executable]
    return [sys.executable, "-m", "thaw_vllm", "run", "--zygote", NAME, "--fallback"]


def benchmark() -> list[str]:
    """Like ``bench.process.COMMAND``; a fork is given no other descriptors than the standard ones, so it opens one."""
    if _anew():
        return [*COMMAND]
    own = "import os, sys; from thaw_vllm.bench.child import main; main(os.open(sys.argv[1], os.O_WRONLY))"
    words = [*command(), "-c", own]
    return [sys.executable, "-c", f"import os, sys; {_HAND_OVER}", *words]


def run(action: str, *, engine_args: dict[str, Any], more: dict[str, str] | None = None, **options: Any) -> Any:
    """``fresh.run`` in a fork; of several ranks each has a core.

    Args:
        more: variables.
    """
    ranks = PARALLEL if "tensor_parallel_size" in engine_args else {}
    with mock.patch.dict(os.environ, environment(ranks | (more or {})), clear=True):
        return fresh.run(action, engine_args=engine_args, zygote=None if _anew() else NAME, **options)


def in_place_of_new(patch: pytest.MonkeyPatch) -> None:
    """What a command of this process starts with ``fresh.run`` is started in forks."""
    anew = fresh.run

    def forked(action: str, **options: Any) -> Any:
        with mock.patch.object(fresh, "run", anew):
            return run(action, **options)

    patch.setattr(fresh, "run", forked)


def _anew() -> bool:
    return os.environ.get("THAW_TEST_ANEW") == "1"


def _beside_plain(more: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in more.items() if not (PLAIN and name in PARALLEL)}


def _paths(more: dict[str, str]) -> str:
    entries = [*filter(None, [more.get("PYTHONPATH", _BEGINNING.get("PYTHONPATH"))])]
    return os.pathsep.join([str(ROOT), *entries])


def _end(pid: int, directory: str, owner: int) -> None:
    if os.getpid() == owner:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        shutil.rmtree(directory, ignore_errors=True)
