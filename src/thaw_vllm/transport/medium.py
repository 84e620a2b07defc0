"""What a file lies on, as far as it decides how to read and write it."""

from __future__ import annotations

import os

IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
"""File systems whose files are memory: reading them is copying, and there is nothing to read directly."""

_DIRECT = getattr(os, "O_DIRECT", 0)


def file_system(descriptor: int) -> str:
    """Type of the file system that an open file is on (``tmpfs``, ``ext4``, ``nfs4``, …); empty when not known."""
    device = os.fstat(descriptor).st_dev
    return _mounts().get(f"{os.major(device)}:{os.minor(device)}", "")


def open_direct(descriptor: int, flags: int) -> int:
    """A further descriptor of the same open file, whatever its name is by now, that bypasses the page cache (O_DIRECT).

    Args:
        flags: ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Returns:
        The caller's to close.

    Raises:
        OSError: the file system has no direct I/O.
    """
    return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC | _DIRECT)


def in_memory(descriptor: int) -> bool:
    """Whether an open file's bytes are memory already."""
    return file_system(descriptor) in IN_MEMORY


def _mounts() -> dict[str, str]:
    """File system types by device number, from the kernel's table (proc(5), mountinfo)."""
    found = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
            for line in table:
                fields, _, rest = line.partition(" - ")
                found[fields.split()[2]] = rest.split()[0]
    except (OSError, IndexError):
        return {}
    return found
