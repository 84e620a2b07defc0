"""The processes below one, from /proc, and how they are ended; what a keeper and a zygote have in common."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import defaultdict

_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36
"""Of ``prctl(2)``."""
_ENDED = ("Z", "X")
"""States of a process that waits for its parent to take leave of it."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def adopt_orphans() -> None:
    """Become the parent of whatever is left of this process's children, in place of process 1."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread that forked it ends; at once if it has."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _all() -> dict[int, tuple[str, int]]:
    """State and parent of every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", errors="replace") as file:  # a name may be cut inside a character
                    fields = file.read().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            found[int(entry)] = fields[0], int(fields[1])
    return found


def children(parent: int) -> list[int]:
    """Processes whose parent is ``parent`` and which have not ended."""
    return [process for process, (state, above) in _all().items() if above == parent and state not in _ENDED]


def below(root: int) -> list[int]:
    """Processes that descend from ``root`` and have not ended, parents before their children."""
    found, of = _all(), defaultdict(list)
    for process, (_, parent) in found.items():
        of[parent].append(process)
    order = [root]
    for process in order:
        order += of[process]
    return [process for process in order[1:] if found[process][0] not in _ENDED]


def send_all(processes: list[int], number: int) -> None:
    """A signal to each; those that have ended meanwhile are passed over."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def reap() -> dict[int, int]:
    """Take leave of the children that have ended: their ids and wait statuses."""
    ended: dict[int, int] = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not process:
            return ended
        ended[process] = status


def end_all_below(root: int, grace: float) -> None:
    """Ask what is below ``root``, this process, to end; ``grace`` seconds later kill what has not.

    What cannot be killed, as another user's, is left after as long again, with a line about it.
    """
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    asked: set[int] = set()
    while True:
        reap()
        left = below(root)
        if not left:
            return
        if time.monotonic() >= deadline + grace:
            print(f"left, since they cannot be ended: {left}", file=sys.stderr, flush=True)
            return
        if time.monotonic() >= deadline:
            number = signal.SIGKILL
            asked.clear()
        send_all([process for process in left if process not in asked], number)
        send_all([process for process in left if process not in asked], signal.SIGCONT)
        asked.update(left)
        time.sleep(0.01)
