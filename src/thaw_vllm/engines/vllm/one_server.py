"""vLLM's own server in a process of its own: up, asked, and ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ThawError
from ...zygote.processes import has_ended
from .command_line import options
from .ending import end_group
from .fresh import python
from .versions import SERVER as MODULE

_PATIENCE = 600.0
"""Seconds for a server to come up, kernels compiled and all."""
_ENDING = 60.0


@dataclass(frozen=True)
class Server:
    """One that is healthy.

    Attributes:
        seconds: that it took to be so.
    """

    port: int
    model: str
    log: Path
    seconds: float

    def complete(self, prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        """The ``tokens`` and ``logprobs`` of a completion, greedy where nothing else is said.

        Raises:
            ThawError: there was none; with the last line that the server printed.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        with self._told("gave no completion"):
            choice = self._asked("POST", "/v1/completions", body | sampling)["choices"][0]
            return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}

    def described(self) -> tuple[str, int]:
        """The name that the model is served under, and the tokens that it takes, prompt and answer.

        Raises:
            ThawError: it does not say.
        """
        with self._told("does not answer"):
            found = self._asked("GET", "/v1/models")["data"][0]
            return str(found["id"]), int(found["max_model_len"])

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            raise ThawError(f"the server {what}: {_last_line(self.log)}") from None

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextlib.contextmanager
def serving(
    model: str,
    words: Sequence[str],
    environment: Mapping[str, str | None],
    zygote: str | None,
    log: Path,
    patience: float = _PATIENCE,
) -> Iterator[Server]:
    """A server on a free port of this machine, ended with the block, and with it all that it has started.

    Args:
        words: options of vLLM's server.
        environment: added to this process's; None takes a variable away.
        zygote: the name of one whose fork it shall be.
        log: where what it prints stays.
        patience: seconds for it to come up.

    Raises:
        ThawError: it did not come up; with the last line that it printed.
    """
    port = _free_port()
    command = [*python(zygote), "-m", MODULE, "--model", model, "--host", "127.0.0.1", "--port", str(port), *words]
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    begun = time.perf_counter()
    with log.open("wb") as stream, _running(command, stream, variables) as process:
        while not _healthy(port):
            if has_ended(process.pid):
                raise ThawError(f"the server did not come up: {_last_line(log)}")
            if time.perf_counter() - begun > patience:
                raise ThawError(f"the server did not come up within {patience:.0f} s: {_last_line(log)}")
            time.sleep(0.01)
        yield Server(port, model, log, time.perf_counter() - begun)


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
        environment, zygote, log: as for ``serving``.

    Returns:
        As ``fresh.run``: ``outputs``, ``seconds`` with ``process`` (until it was healthy), ``first_token`` absent, and
        ``answers`` (the completion).

    Raises:
        ThawError: it ended, or did not answer; with the last line that it printed.
    """
    begun = time.perf_counter()
    with serving(model, options(engine_args), environment, zygote, log) as server:
        asked = time.perf_counter()
        answer = server.complete(question, max_tokens)
        seconds = {"process": server.seconds, "answers": time.perf_counter() - asked}
    seconds["total"] = time.perf_counter() - begun
    return {"seconds": seconds, "outputs": [answer], "reports": []}


@contextlib.contextmanager
def _running(command: list[str], log: Any, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    patience = 0.0  # an interruption, or a server that does not come up: it may not listen to signals for long
    try:
        yield process
        patience = _ENDING
    finally:
        try:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            until = time.monotonic() + patience
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


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]
