"""vLLM's own server from process start to healthy, and one completion of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..engines.vllm.command_line import options
from ..engines.vllm.ending import end_group
from ..engines.vllm.fresh import python
from ..engines.vllm.versions import SERVER as MODULE
from ..errors import ThawError
from ..zygote.processes import has_ended

_PATIENCE = 600.0
"""Seconds for a server to come up, kernels compiled and all."""
_ENDING = 60.0


def run(
    *,
    model: str,
    engine_args: dict[str, Any],
    question: list[int],
    max_tokens: int,
    environment: dict[str, str],
    zygote: str | None,
    log: Path,
) -> dict[str, Any]:
    """Start a server, wait until it is healthy, ask it once, and end it.

    Args:
        question: token ids.
        environment: added to this process's.
        zygote: the name of one whose fork it shall be.
        log: where what it prints stays.

    Returns:
        As ``fresh.run``: ``outputs``, ``seconds`` with ``process`` (until it was healthy), ``first_token`` absent, and
        ``answers`` (the completion).

    Raises:
        ThawError: it ended, or did not answer; with the last line that it printed.
    """
    port = _free_port()
    command = [*python(zygote), "-m", MODULE, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    seconds = {}
    begun = time.perf_counter()
    with log.open("wb") as stream, _running([*command, *options(engine_args)], stream, environment) as process:
        while not _healthy(port):
            if has_ended(process.pid) or time.perf_counter() - begun > _PATIENCE:
                raise ThawError(f"the server did not come up: {_last_line(log)}")
            time.sleep(0.01)
        seconds["process"] = time.perf_counter() - begun
        asked = time.perf_counter()
        answer = _complete(port, model, question, max_tokens, log)
        seconds["answers"] = time.perf_counter() - asked
    seconds["total"] = time.perf_counter() - begun
    return {"seconds": seconds, "outputs": [answer], "reports": []}


@contextlib.contextmanager
def _running(command: list[str], log: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            until = time.monotonic() + _ENDING
            while not has_ended(process.pid) and time.monotonic() < until:
                time.sleep(0.02)
        finally:  # also where somebody presses Ctrl-C once more
            end_group(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    return found


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _complete(port: int, model: str, question: list[int], max_tokens: int, log: Path) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": question,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        choice = json.loads(said)["choices"][0]
        return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        raise ThawError(f"the server gave no completion: {_last_line(log)}") from None
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]
