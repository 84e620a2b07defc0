"""Where a user's zygotes are found: a private directory with a socket, a lock and a log for each."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import StorageError, UsageError

VARIABLE = "THAW_ZYGOTE_DIR"
_ADDRESS = 107
"""Bytes of a Unix socket's path on Linux."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Place:
    """The files of one zygote."""

    directory: Path
    name: str

    @property
    def socket(self) -> Path:
        """What clients connect to; there while the zygote takes programs."""
        return self.directory / f"{self.name}.sock"

    @property
    def lock(self) -> Path:
        """Locked as long as the zygote lives."""
        return self.directory / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        """What the zygote, and the keepers of its programs, print."""
        return self.directory / f"{self.name}.log"


def place(name: str = "default") -> Place:
    """The place of the zygote ``name``: below THAW_ZYGOTE_DIR, else XDG_RUNTIME_DIR, else /tmp.

    Raises:
        UsageError: a name that is no file name, or a directory whose path is too long for a socket.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a zygote; use up to 40 letters, digits, '.', '_' and '-'")
    found = Place(_directory(), name)
    if len(os.fsencode(found.socket)) > _ADDRESS:
        raise UsageError(f"{str(found.socket)!r} is too long for a socket; set {VARIABLE} to a directory near the root")
    return found


def _directory() -> Path:
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.abspath(chosen))
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime) / "thaw"
    return Path(f"/tmp/thaw-{os.getuid()}")


def check(directory: Path) -> bool:
    """Whether the directory is there; one that others could write to or look into is refused.

    Raises:
        StorageError: it is not a directory of this user's that is closed to others (mode 0700).
    """
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"cannot look at {str(directory)!r}: {error.strerror}") from None
    cure = f"remove it, or set {VARIABLE} to another directory"
    if not stat.S_ISDIR(found.st_mode):
        raise StorageError(f"{str(directory)!r} is not a directory; {cure}")
    if found.st_uid != os.getuid():
        raise StorageError(f"{str(directory)!r} belongs to another user; {cure}")
    if found.st_mode & 0o077:
        raise StorageError(f"{str(directory)!r} is open to other users; chmod 700 it after looking who made it so")
    return True


def make(directory: Path) -> None:
    """The directory, with mode 0700.

    Raises:
        StorageError: as ``check``, or it cannot be made.
    """
    if check(directory):
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {str(directory)!r}: {error.strerror}") from None
    check(directory)
