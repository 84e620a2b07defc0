"""A zygote of a test's own, programs in it, and which processes are left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from thaw_vllm.zygote import client, processes, start
from thaw_vllm.zygote.place import Place, place

ROOT = Path(__file__).parents[2]
MARK = "THAW_TEST_MARK"
COMMAND = [sys.executable, "-m", "thaw_vllm"]


def until(condition: Callable[[], Any], what: str = "", seconds: float = 60) -> Any:
    """What ``condition`` returns when it is true at last."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what or condition}")
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    return state(pid) not in ("Z", "X", None)


def state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


class Zygote:
    """One that is started, in a directory of its own; all that it and its programs start carries ``mark``."""

    def __init__(self, place: Place, mark: str) -> None:
        self.place, self.mark = place, mark
        self.pid = 0

    def start(self, imports: tuple[str, ...] = (), **environment: str) -> int:
        self.pid = start.start(self.place, imports=list(imports), models=[], environment=environment)
        return self.pid

    def popen(self, *arguments: Any, env: dict[str, str | None] | None = None, **options: Any) -> subprocess.Popen:
        """``thaw run``, its standard streams piped."""
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        named = [] if self.place.name == "default" else ["--zygote", self.place.name]
        return subprocess.Popen([*COMMAND, "run", *named, *map(str, arguments)], env=changed(env), **(piped | options))

    def run(self, *arguments: Any, input: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        return finished(self.popen(*arguments, **streams(input), **options), input)

    def status(self) -> dict[str, Any]:
        return client.ask(self.place, "status")

    def left(self) -> list[int]:
        """Processes of this zygote's, but for itself, that have not ended."""
        below = processes.below(self.pid) if self.pid else []  # below 0 is everything
        return sorted({*below, *self._marked()} - {self.pid})

    def left_of_programs(self) -> list[int]:
        """``left`` without the keepers, which end just after they have told how their programs ended."""
        keepers = processes.children(self.pid)  # first: a keeper that ends now is in neither
        return sorted({*self.left()} - {*keepers})

    def _marked(self) -> list[int]:
        """Processes that began with the mark in their environment: the zygote, forks of it, clients."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    marked = f"{MARK}={self.mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes()
                except OSError:
                    continue
                if marked and alive(int(entry)):
                    found.append(int(entry))
        return found

    def kill_all(self) -> None:
        """The zygote, too, if it is still there; its id may be another process's by now."""
        while found := {*self._marked(), *(processes.below(self.pid) if self.pid in self._marked() else [])}:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def all_gone(self) -> None:
        until(lambda: not self.left(), "all processes to end")

    def idle(self) -> None:
        """Nothing is left, and the zygote is there and takes programs."""
        self.all_gone()
        until(lambda: not self.status()["programs"], "the zygote to take leave of its programs")
        assert self.status()["unsound"] is None
        until(lambda: descriptors(self.pid) == 7, "the zygote to close what it got")  # 3 streams, lock, socket, pipe


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def changed(env: dict[str, str | None] | None) -> dict[str, str]:
    """This process's environment with other values; None takes a variable away."""
    return {name: value for name, value in (dict(os.environ) | (env or {})).items() if value is not None}


def streams(input: str | None) -> dict[str, Any]:
    return {} if input is None else {"stdin": subprocess.PIPE}


def finished(process: subprocess.Popen, input: str | None = None) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(input, timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def python(*arguments: Any, input: str | None = None, env: dict[str, str | None] | None = None, **options: Any):
    """The same program without a zygote."""
    piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return finished(subprocess.Popen(command, env=changed(env), **(piped | streams(input) | options)), input)


@contextmanager
def made(prepare: str = "tests.zygote.light", name: str = "default") -> Iterator[Zygote]:
    """A zygote's place, and nothing left of it afterwards."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="thaw-z-", dir="/tmp") as directory:
        patch.setenv("THAW_ZYGOTE_DIR", directory)
        patch.setenv(MARK, mark)
        patch.setenv("PYTHONPATH", str(ROOT))
        # The last is set by vLLM's CPU platform, in a process that has had an engine.
        for variable in ("PYTHONUNBUFFERED", "READ_AT_IMPORT", "VLLM_WORKER_MULTIPROC_METHOD"):
            patch.delenv(variable, raising=False)
        patch.setattr(start, "VLLM", prepare)
        zygote = Zygote(place(name), mark)
        try:
            yield zygote
        finally:
            zygote.kill_all()
