"""Engines of tests in forks of one zygote, which saves each of them the imports: most of a start on two cores.

Each is a process of its own all the same, with an engine core and workers of its own. Tests that are about how a
process starts, or about variables that are read at import, start theirs anew.
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
from unittest import mock

from thaw_vllm.engines.vllm.fresh import READ_FROM_THE_LOG
from thaw_vllm.zygote import start
from thaw_vllm.zygote.place import VARIABLE, Place

ROOT = Path(__file__).parents[3]
NAME = "tests"
_BEGINNING = dict(os.environ)
"""Before any engine ran in this process, which leaves variables of its own."""
_PASSED = ("THAW_", "XDG_", "HF_")
"""Beginnings of names whose values tests change."""
_place: Place | None = None


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Variables with which a program is taken by the zygote, which is started where it is not there yet."""
    global _place
    if _place is None:
        directory = tempfile.mkdtemp(prefix="thaw-z-", dir="/tmp")
        _place = Place(Path(directory), NAME)
        with mock.patch.dict(os.environ, _BEGINNING, clear=True):
            pid = start.start(_place, imports=[], models=[], environment=_own() | {VARIABLE: directory})
        atexit.register(_end, pid, directory, os.getpid())
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
    return _BEGINNING | passed | _own() | {VARIABLE: str(_place.directory)} | (more or {})


def command(*, fallback: bool = True) -> list[str]:
    """What stands before a script, as ``python`` does."""
    return [sys.executable, "-m", "thaw_vllm", "run", "--zygote", NAME, *(["--fallback"] if fallback else [])]


def _own() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [_BEGINNING.get("PYTHONPATH")])])
    return READ_FROM_THE_LOG | {"PYTHONPATH": paths}


def _end(pid: int, directory: str, owner: int) -> None:
    if os.getpid() == owner:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        shutil.rmtree(directory, ignore_errors=True)
