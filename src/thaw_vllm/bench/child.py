"""A fresh process that does one task, step by step as its parent says; ``process`` is the other side.

Run as ``python -m thaw_vllm.bench.child DESCRIPTOR``, with the request as a line of standard input. Answers go to the
descriptor, so that whatever a library prints cannot be taken for one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from importlib import import_module
from typing import Any

Steps = Generator[None, None, dict[str, Any]]
"""A task in four parts: import, ``yield``, allocate, ``yield``, what is timed, ``yield``, compare and return."""

TASKS = {
    "make": "files",
    "restore": "restoring",
    "warm": "restoring",
    "freeze": "freezing_task",
    "h2d": "limits.link",
    "d2h": "limits.link",
    "disk-write": "limits.disk",
    "disk-read": "limits.disk",
    "tmpfs-write": "limits.memory",
    "memory-read": "limits.memory",
    "kv-freeze": "kv_task",
    "kv-thaw": "kv_task",
    "swap": "swap_task",
    "d2d": "multi_gpu_task",
    "lend": "multi_gpu_task",
    "borrow": "multi_gpu_task",
    "broadcast": "multi_gpu_task",
    "lend-tcp": "over_tcp_task",
    "sockets": "over_tcp_task",
    "fork-keep": "fork_task",
    "fork-thaw": "fork_task",
    "fork-pool": "fork_task",
}
"""Task → the module here whose ``TASKS`` has it."""
SAID = ("ready", "prepared", "done")


def main(descriptor: int) -> None:
    """Serve the one request."""
    asked = json.loads(sys.stdin.readline())

    def say(**said: Any) -> None:
        data = json.dumps(said).encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]

    try:
        module = import_module(f"{__package__}.{TASKS[asked['task']]}")
        steps: Steps = module.TASKS[asked["task"]](asked["request"])
        for step in SAID:
            next(steps)
            say(step=step)
            if not sys.stdin.readline():  # the parent is gone
                return
        next(steps)
    except StopIteration as end:
        say(step="result", result=end.value)
    except Exception as error:
        text = " ".join(str(error).split())
        say(step="error", error=f"{type(error).__name__}: {text}"[:400])
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
