"""``thaw serve`` as a process, and how it is asked."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.zygote.running import COMMAND, until


class Program:
    """``thaw serve`` with a log, and how it is asked; made when it is healthy, unless it need not be yet."""

    def __init__(self, folder: Path, name: str, *options: str, healthy: bool = True, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"{name}.log"
        command = [*COMMAND, "serve", *options, "--port", str(port)]
        variables = os.environ | {"THAW_STATE_DIR": str(folder / "state")} | environment
        with self.log.open("w") as log:
            default = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, start_new_session=True
                )
            finally:
                signal.signal(signal.SIGINT, default)
        self.token_file = Path(variables["THAW_STATE_DIR"], "admin-token")
        self.retry_after = 0.0
        if healthy:
            until_healthy(self)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data, {"Content-Type": "application/json"} | (headers or {})
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            self.retry_after = float(error.headers.get("Retry-After") or 0)
            return error.code, json.load(error)

    def admin(self, path: str, body: Any = None) -> tuple[int, Any]:
        return self.ask(f"/v1/thaw/{path}", body, {"X-Thaw-Admin-Token": self.token_file.read_text().strip()})

    def answer(self, model: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Without what is new each time."""
        status, answer = self.ask(f"/v1/{path}", {"model": model, "max_tokens": 12, **body})
        text = json.dumps({k: v for k, v in answer.items() if k not in ("id", "created", "system_fingerprint")})
        return status, json.loads(re.sub(r'"(chatcmpl-tool|call|cmpl)[-_][0-9a-zA-Z]+"', '"id"', text))

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def until_healthy(program: Program) -> None:
    def healthy() -> bool:
        assert program.process.poll() is None, program.log.read_text()[-3000:]
        try:
            return program.ask("/v1/models")[0] == 200
        except OSError:
            time.sleep(0.05)
            return False

    until(healthy, "the server", 300)
