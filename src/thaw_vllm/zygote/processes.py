"""Processes below one or of a group, from /proc, and how they are ended; being woken by what happens to them."""

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


def woken_by_signals() -> tuple[int, int]:
    """The ends of a pipe, not blocking, into which a byte goes for each signal that this process has a handler for.

    The end of a child is one of them from now on.
    """
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read, write


def awake(read: int) -> None:
    """Take what is in that pipe."""
    with contextlib.suppress(BlockingIOError):
        os.read(read, 4096)


def _all() -> dict[int, tuple[str, int, int]]:
    """State, parent and group of every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (about := _one(int(entry))):
            found[int(entry)] = about
    return found


def stat(process: int) -> list[str] | None:
    """What /proc/PID/stat says after the name: state, parent, group, …; None where it is not shown.

    At 19 stands when it was started, in ticks since the machine was.
    """
    try:
        with open(f"/proc/{process}/stat", errors="replace") as file:  # a name may be cut inside a character
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _one(process: int) -> tuple[str, int, int] | None:
    """State, parent and group of a process; None when it has ended."""
    fields = stat(process)
    return None if fields is None else (fields[0], int(fields[1]), int(fields[2]))


def of_group(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    return [process for process, (state, _, own) in _all().items() if own == group and state not in _ENDED]


def children(parent: int) -> list[int]:
    """Processes whose parent is ``parent`` and which have not ended."""
    return [process for process, (state, above, _) in _all().items() if above == parent and state not in _ENDED]


def below(root: int) -> list[int]:
    """Processes that descend from ``root`` and have not ended, parents before their children."""
    found, of = _all(), defaultdict(list)
    for process, (_, parent, _) in found.items():
        of[parent].append(process)
    order = [root]
    for process in order:
        order += of[process]
    return [process for process in order[1:] if found[process][0] not in _ENDED]


def has_ended(child: int) -> bool:
    """Whether a child has, which stays to be waited for."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # nobody has to wait where SIGCHLD is ignored
        return True


def is_stopped(process: int) -> bool:
    """Whether a signal has stopped it."""
    about = _one(process)
    return about is not None and about[0] == "T"


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
