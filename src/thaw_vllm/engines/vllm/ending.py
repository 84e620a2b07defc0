"""Ending a process with all that it has started, so that an engine's memory is free when that returns."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from ...zygote.processes import of_group

GRACE = 5.0
"""Seconds in which what is ended may clean up: shared memory of engines, which their last process removes."""


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End every process of a group, wait until they are gone, and reap its leader, which may have ended by itself.

    Args:
        leader: started in a session of its own, and not waited for: else the group's number could be another's.
    """
    group = leader.pid
    try:
        os.killpg(group, signal.SIGTERM)
        if not _ended(group, GRACE):
            for process in of_group(group):
                if not _cleans(process):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            _ended(group, GRACE)
    finally:  # also where somebody presses Ctrl-C once more
        os.killpg(group, signal.SIGKILL)
        leader.wait()


def _ended(group: int, patience: float) -> bool:
    """Whether every process of a group has ended, after so many seconds at most."""
    until = time.monotonic() + patience
    while of_group(group):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _cleans(process: int) -> bool:
    """Whether it is multiprocessing's tracker, which removes what the others leave once they have ended."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
