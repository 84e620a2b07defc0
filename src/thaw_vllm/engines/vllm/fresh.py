"""Starting ``ask`` in a fresh process and reading its answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import ThawError, named
from .ending import end_group

# The default loader says how long it took at this level only, whatever the caller's own level is.
READ_FROM_THE_LOG = {"VLLM_LOGGING_LEVEL": "INFO"}
_DOES = {
    **{"ask": "ask", "freeze": "freeze", "kv": "freeze or thaw the KV cache"},
    **{"fork": "fork a conversation", "rollouts": "fork a prompt"},
}
_ENDPOINT = 37
"""Characters of the names that vLLM gives its sockets."""
_WEIGHTS_TOOK = re.compile(r"Loading weights took ([0-9.]+) seconds")


def endpoints(folder: str) -> dict[str, str]:
    """Variables that put an engine's sockets into ``folder``, where vLLM, which leaves them behind, leaves them.

    Empty where the folder's path is too long for a socket's address, and where the user has chosen a place.
    """
    fits = len(os.fsencode(folder)) + _ENDPOINT < 107
    return {"VLLM_RPC_BASE_PATH": folder} if fits and "VLLM_RPC_BASE_PATH" not in os.environ else {}


def python(zygote: str | None) -> list[str]:
    """The beginning of a command that runs Python anew, or in a fork of a zygote."""
    return [sys.executable, *([] if zygote is None else ["-m", "thaw_vllm", "run", "--zygote", zygote])]


def run(
    action: str,
    *,
    model: str | None,
    snapshot: str | os.PathLike[str] | None,
    engine_args: dict[str, Any],
    questions: list[Any] | None = None,
    max_tokens: int = 32,
    environment: dict[str, str] | None = None,
    kv: dict[str, Any] | None = None,
    fork: dict[str, Any] | None = None,
    zygote: str | None = None,
    log: Path | None = None,
    removed: Sequence[str] = (),
    caches: str | None = None,
) -> dict[str, Any]:
    """What ``ask`` answered, with ``seconds["weights"]`` added from thaw's report or vLLM's own log.

    The process and its engine are gone when this returns, or raises.

    Args:
        action: ``ask``, ``freeze``, ``kv``, ``fork`` or ``rollouts``; the rest as in ``ask.main``.
        environment: added to this process's environment.
        zygote: the name of one whose fork it shall be, instead of a process that imports all anew.
        log: where what it prints stays; None to keep nothing.
        removed: variables that it shall not have.
        caches: a file of caches that was packed here, unpacked for it.

    Raises:
        ThawError: the process failed; of the class of the last error it printed where that is one of thaw's.
    """
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        log = Path(folder) / "log.txt" if log is None else log
        document = {
            "action": action,
            "model": model,
            "snapshot": None if snapshot is None else os.fspath(snapshot),
            "engine_args": engine_args,
            "questions": questions or [],
            "max_tokens": max_tokens,
            "kv": kv,
            "fork": fork,
            "caches": caches,
            "started": time.time(),
        }
        request.write_text(json.dumps(document))
        command = [*python(zygote), "-m", "thaw_vllm.engines.vllm.ask", str(request), str(answer)]
        started = time.perf_counter()
        variables = os.environ | READ_FROM_THE_LOG | endpoints(folder) | (environment or {})
        for name in removed:
            variables.pop(name, None)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
            try:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                elapsed = time.perf_counter() - started
            finally:  # Ctrl-C, too: what is left of an engine holds its memory, and the folder with its sockets
                end_group(process)
        printed = log.read_text(errors="replace")
        if process.returncode or not answer.exists():
            raise _failure(
                f"the process that should {_DOES[action]} failed (exit {process.returncode})", last_error(printed)
            )
        found: dict[str, Any] = json.loads(answer.read_text())
    found["seconds"]["total"] = elapsed
    if found["reports"]:
        found["seconds"]["weights"] = max(report["seconds"]["total"] for report in found["reports"])
    elif took := _WEIGHTS_TOOK.findall(printed):
        found["seconds"]["weights"] = max(float(t) for t in took)
    return found


def _failure(what: str, line: str) -> ThawError:
    ours = re.search(r"thaw_vllm\.errors\.(\w+): (.*)", line)
    kind = (named(ours[1]) if ours else None) or ThawError
    return kind(f"{what}: {ours[2] if ours else line}")


def last_error(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(Error|Exception)\b.*: ", line)]
    errors = [line for line in errors if "See root cause above" not in line] or errors
    chosen = next((line for line in errors if "thaw_vllm.errors" in line), errors[-1] if errors else "")
    return chosen or (lines[-1] if lines else "it printed nothing")
