"""The zygote's process: locks its place, imports, says that it is ready, and serves."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ..errors import ThawError

COMMAND = (
    "import atexit; last = []; atexit.register(lambda: [call() for call in last]); "
    "from thaw_vllm.zygote.main import main; main(last)"
)
"""For ``python -c``. What is registered first is called last at the exit."""


def main(last: list[Callable[[], None]]) -> None:
    """``argv[1]`` is a JSON object of ``start``'s: ``name``, ``prepare``, ``imports``, ``models``, and ``ready``, a
    descriptor to answer on.

    Args:
        last: takes what is to be called last of all at the interpreter's exit.
    """
    request = json.loads(sys.argv[1])
    sys.path[:] = [entry for entry in sys.path if entry]  # what lies in the working directory is no program's module
    program = None
    try:
        program = _serve(request)
    except ThawError as error:
        _tell(request["ready"], {"refused": str(error), "error": type(error).__name__})
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        traceback.print_exc()
        said = f"the zygote failed: {type(error).__name__}: {error}"
        _tell(request["ready"], {"refused": said, "error": "ThawError"})
        raise SystemExit(1) from None
    if program is not None:
        last.append(program.finish)
        program.run()


def _serve(request: dict[str, Any]) -> Any:
    from .place import place
    from .server import Zygote, lock

    os.environ.pop("THAW_START_REPORT", None)  # programs write their own
    where = place(request["name"])
    held = lock(where)
    if request["ready"] >= 0:
        os.ftruncate(1, 0)  # the log is this zygote's now
    prepare = importlib.import_module(request["prepare"]).import_all
    zygote = Zygote(where, held, prepare(request["imports"], request["models"]))
    _tell(request["ready"], {"ready": os.getpid()})
    request["ready"] = -1
    return zygote.serve()


def _tell(ready: int, answer: dict[str, Any]) -> None:
    """Answer who started this, once."""
    if ready >= 0:
        os.write(ready, json.dumps(answer).encode())
        os.close(ready)
