"""Which files of caches may be unpacked: those that this user packed here, or whose SHA-256 was given.

What is in such a file is machine code, and pickles that vLLM and PyTorch load: whoever wrote it can do anything as the
user who starts an engine with it.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ..errors import StorageError, UsageError
from ..transport.private import STATE as VARIABLE
from ..transport.private import private, state_path
from ..transport.writer import StagedFile
from .archive import Whole

OWN = "own"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_MOST = 1 << 20
"""Bytes of the list: some 16,000 files, the newest."""


def own_list(environment: Mapping[str, str]) -> Path:
    """The file that names what this user has packed here, a SHA-256 a line."""
    return state_path(environment) / "own-caches"


def check_word(trust: str | None) -> None:
    """Hold an answer to ``--trust-caches`` against what one may be.

    Raises:
        UsageError: it is neither OWN nor a SHA-256.
    """
    if trust is not None and trust != OWN and not _DIGEST.fullmatch(trust):
        raise UsageError(
            f"--trust-caches takes '{OWN}', for what you have packed here yourself, or the file's SHA-256 (64 "
            f"hexadecimal digits), not {trust[:80]!r}"
        )


def why_not(whole: Whole, trust: str | None, environment: Mapping[str, str]) -> str | None:
    """Why a file of caches may not be unpacked; None where it may.

    Args:
        trust: OWN, a SHA-256, or None.

    Raises:
        UsageError: ``trust`` is something else.
        StorageError: others may write to the list of own ones.
    """
    check_word(trust)
    if trust is None:
        return (
            f"{whole.shown} was not trusted: it holds machine code and pickles, which vLLM would execute; give "
            f"--trust-caches {OWN} if you have packed it here, or --trust-caches {whole.sha256} if you know from whom "
            "it is"
        )
    if trust != OWN:
        if trust.lower() == whole.sha256:
            return None
        return f"{whole.shown} is not the file that was trusted: its SHA-256 is {whole.sha256}"
    if whole.sha256 in _read(own_list(environment)):
        return None
    return (
        f"{whole.shown} is not one that you have packed here; where you know from whom it is, give --trust-caches "
        f"{whole.sha256}"
    )


def note_own(digest: str, environment: Mapping[str, str]) -> None:
    """Add what was packed here to the list, which is made for its owner alone.

    Raises:
        StorageError: it cannot be kept, or others may write to it.
    """
    path = own_list(environment)
    private(path.parent, f"set {VARIABLE} to another directory")
    with _opened(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(path)
        if digest not in known:
            text = "".join(f"{line}\n" for line in [*known, digest][-(_MOST // 65) :]).encode()
            with StagedFile(path, len(text), force=True) as staged:
                staged.write(0, text)
                staged.publish()


def _read(path: Path) -> list[str]:
    try:
        private(path.parent, f"set {VARIABLE} to another directory", write=False)
        with _opened(path, os.O_RDONLY) as file:
            return _digests(file.read(_MOST))
    except StorageError:
        if not os.path.lexists(path):
            return []
        raise


def _opened(path: Path, flags: int) -> IO[str]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise StorageError(f"the list of your own caches, {str(path)!r}: {error.strerror or error}") from None
    found = os.fstat(descriptor)
    sound = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
    if not sound:
        os.close(descriptor)
        raise StorageError(
            f"others may read or write the list of your own caches; chmod 600 {str(path)!r}, or remove it"
        )
    return open(descriptor, "r+" if flags & os.O_RDWR else "r", encoding="utf-8", errors="replace")


def _digests(text: str) -> list[str]:
    return [line.lower() for line in text.split() if _DIGEST.fullmatch(line)]
