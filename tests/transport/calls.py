"""Counting the calls that a writer makes to the system, and failing or dying at one of them."""

import fcntl
import os
import warnings

WRITERS = [(os, name) for name in ("open", "posix_fallocate", "pwrite", "fchmod", "fsync", "rename", "link", "unlink")]
WRITERS += [(os, "close"), (fcntl, "flock")]


class Calls:
    """Counts calls, and does something before or after the nth of them.

    Args:
        patch: pytest's monkeypatch.
        number: which call; None for none.
        moment: ``before`` or ``after`` it.
        action: what to do then.
        counts: whether this call is one to count, asked in the thread that makes it.
    """

    def __init__(self, patch, number=None, moment="before", action=None, *, calls=WRITERS, counts=lambda: True):
        self.names, self.number, self.moment, self.action, self.counts = [], number, moment, action, counts
        for module, name in calls:
            patch.setattr(module, name, self.counted(name, getattr(module, name)))

    def counted(self, name, real):
        def call(*arguments, **options):
            if not self.counts():
                return real(*arguments, **options)
            self.names.append(name)
            chosen = len(self.names) - 1 == self.number
            if chosen and self.moment == "before":
                self.action()
            try:
                return real(*arguments, **options)
            finally:
                if chosen and self.moment == "after":
                    self.action()

        return call


def start_child(work):
    """Run ``work`` in a copy of this process; returns its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the copy starts none
        child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def in_child(work):
    """Run ``work`` in a copy of this process; returns its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work), 0)[1])
