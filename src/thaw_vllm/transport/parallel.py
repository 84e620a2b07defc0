"""Work spread over threads, with one rule for errors: the first one stops the rest, and all threads have ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def default_workers() -> int:
    """Threads that saturate a disk or the memory: two a core up to eight, then one a core up to 16.

    Copies from the page cache release the interpreter lock; on two cores four threads read 15 % faster than two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(cores * 2, 8) if cores <= 8 else min(cores, 16))


def run(tasks: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Call ``work`` on every task from up to ``workers`` threads, in order of the tasks.

    Raises:
        The first exception of any ``work`` or of ``tasks``, or KeyboardInterrupt, once every thread has ended its
        task in flight.
    """
    if workers <= 1:
        for task in tasks:
            work(task)
        return
    pending = iter(tasks)
    lock = threading.Lock()
    failures: list[BaseException] = []
    stop = threading.Event()

    def drain() -> None:
        while not stop.is_set():
            try:
                with lock:
                    task = next(pending, done)
                if task is done:
                    return
                work(task)  # type: ignore[arg-type]
            except BaseException as error:
                failures.append(error)
                stop.set()

    done = object()
    threads = [threading.Thread(target=drain, name=f"thaw-{i}", daemon=True) for i in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if failures:
        raise failures[0]
