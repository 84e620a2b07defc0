"""Which cores are near a device, on machines whose memory is in several parts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SYSTEM = Path("/sys")


def near(bus: str, system: Path = SYSTEM) -> frozenset[int]:
    """Cores of the memory node that a PCI device hangs on, of those this process may use.

    Args:
        bus: PCI address, as ``0000:3b:00.0``.

    Returns:
        Empty where it makes no difference: one node, or not known.
    """
    cores = _beside(bus, system)
    if not cores:
        return frozenset()
    allowed = os.sched_getaffinity(0)
    return frozenset(cores & allowed) if cores & allowed != allowed else frozenset()


@cache
def _beside(bus: str, system: Path) -> frozenset[int]:
    """Of all cores; the machine does not change."""
    try:
        if len(list((system / "devices/system/node").glob("node[0-9]*"))) < 2:
            return frozenset()
        return _listed((system / "bus/pci/devices" / bus / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


@contextlib.contextmanager
def pinned_to(cores: frozenset[int]) -> Iterator[None]:
    """Keep the calling thread on ``cores`` meanwhile, so that memory it is first to write lies beside them."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # not allowed to: slower, not wrong
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _listed(text: str) -> frozenset[int]:
    """The kernel's list format: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
