"""Whether a store's lock is held, and having it held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading


def free(directory):
    """Whether nobody has a store's lock."""
    for name in ("gate", "lock"):
        lock = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
    return True


@contextlib.contextmanager
def held(store):
    """Somebody else is alone with it."""
    there, over = threading.Event(), threading.Event()

    def hold():
        with store.alone():
            there.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    there.wait(60)
    try:
        yield
    finally:
        over.set()
        thread.join()
