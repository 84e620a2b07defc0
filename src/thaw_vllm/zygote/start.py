"""Starting a zygote in a process of its own and waiting until it takes programs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import StorageError, ThawError, UsageError, named
from .main import COMMAND
from .place import Place, make

VLLM = "thaw_vllm.engines.vllm.preimport"
"""The module whose ``import_all`` fills a zygote for vLLM."""
_ENDING = 5.0
"""Seconds for one that refused to start to end and give its name back, for the next one."""
_SHOWN = 2000
"""Characters of a log's end that an error shows."""


def start(place: Place, *, imports: list[str], models: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Start the zygote of a place, detached from this process and its terminal; its process id.

    Args:
        imports: modules of the user's own that are imported, too.
        models: model directories whose architecture's modules are imported.
        environment: added to this process's environment.

    Raises:
        UsageError: one runs there already.
        UnsupportedError: a module did what no fork survives; it is named.
        ThawError: it ended; with the end of its log.
    """
    variables = os.environ | dict(environment or {})
    entries = variables.get("PYTHONPATH")
    if entries and not all(map(os.path.isabs, entries.split(os.pathsep))):
        raise UsageError(
            f"PYTHONPATH={entries} has a relative or an empty entry, which is another directory for each program; make "
            "all of them absolute"
        )
    make(place.directory)
    try:
        log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write {str(place.log)!r}: {error.strerror}") from None
    read, write = os.pipe()
    request = {"name": place.name, "prepare": VLLM, "imports": imports, "models": models, "ready": write}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            cwd="/",
            start_new_session=True,
            pass_fds=[write],
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
        os.close(log)
    waiting = threading.Thread(target=process.wait, name="zygote-ended", daemon=True)
    try:
        with os.fdopen(read) as answers:
            waiting.start()  # else it would stay in the table of processes when it has ended, as long as this one lives
            said = answers.read()
    except BaseException:  # Ctrl-C: nobody waits for it any more
        process.terminate()
        raise
    if not said:
        waiting.join()
        raise ThawError(_ended(place, process.returncode))
    answer: dict[str, Any] = json.loads(said)
    if "refused" in answer:
        waiting.join(_ENDING)
        raise (named(answer.get("error")) or ThawError)(answer["refused"])
    return int(answer["ready"])


def _ended(place: Place, code: int) -> str:
    tail = ""
    with contextlib.suppress(OSError):
        tail = place.log.read_text(errors="replace")[-_SHOWN:].strip()
    return f"the zygote ended with {code} before it was ready; {str(place.log)!r} ends with:\n{tail}"
