"""Host memory that another process takes, watched from outside so that watching costs it nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

EVERY = 0.01
"""Seconds between two looks."""
MIB = 1 << 20


def held(process: int, files: Sequence[Path]) -> int | None:
    """Bytes of anonymous memory, and of shared memory that belongs to no file below ``files``; None when it is gone.

    The anonymous memory of processes that it started is counted too; what they share is its own.

    A mapped file on tmpfs counts as shared memory (RssShmem) although it is page cache, so no more of that is counted
    than the size of all shared mappings that are something else. Memory that a driver hands out itself, as
    cudaHostAlloc does, is in no process's account; ``machine`` sees it.
    """
    places = tuple(str(path) for path in files)
    with contextlib.suppress(OSError, ValueError, KeyError):  # the last where it has ended and nobody has asked for it
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if "kB" in line}
        shared = sizes.get("RssShmem", 0)
        return sizes["RssAnon"] + _children(process) + (min(shared, _shared(process, places)) if shared else 0)
    return None


def _anonymous(process: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _children(process: int) -> int:
    """A child that did not begin its program yet (vfork) has its parent's memory, and its command line."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        own = _command(process)
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                with contextlib.suppress(OSError):  # ended meanwhile
                    total += _anonymous(int(child)) if _command(int(child)) != own else 0
    return total


def _shared(process: int, places: tuple[str, ...]) -> int:
    found = 0
    for line in Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines():
        span, rights, _, _, _, *name = line.split(None, 5)
        if rights.endswith("s") and not (name and name[0].startswith(places or ("\0",))):
            low, high = (int(part, 16) for part in span.split("-"))
            found += high - low
    return found


def machine() -> int:
    """Bytes in use on the whole machine, pinned and drivers' memory included, page cache and tmpfs not."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    size = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return size["MemTotal"] - size["MemFree"] - size["Buffers"] - size["Cached"] - size["SReclaimable"]


class Watch:
    """The most memory beyond what was held at the start, while the block runs.

    Attributes:
        process_mib: of the process; None where the kernel does not tell, or the process ended at once.
        machine_mib: of the whole machine; of use only when nothing else runs there.
    """

    def __init__(self, process: int, files: Sequence[Path] = ()) -> None:
        self._process, self._files = process, files
        self.process_mib: float | None = None
        self.machine_mib = 0.0

    def __enter__(self) -> Watch:
        self._before, self._all_before = held(self._process, self._files), machine()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thaw-bench-memory", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()

    def _look(self) -> None:
        now = held(self._process, self._files)
        if now is not None and self._before is not None:
            self.process_mib = max(self.process_mib or 0.0, round((now - self._before) / MIB, 1))
        self.machine_mib = max(self.machine_mib, round((machine() - self._all_before) / MIB, 1))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
