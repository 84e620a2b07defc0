"""Secrets in files that are one user's alone: made once, and not believed where others might know them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from ..errors import StorageError

_BYTES = 32
_LONGEST = 4096


def usable(token: str, shortest: int) -> bool:
    """Whether it is long enough, and any program hands it on as it is."""
    return len(token) >= shortest and token.isascii() and token.isprintable() and token == token.strip()


def made(path: Path, what: str, cure: str, instead: str) -> str:
    """The secret in a file; a new one where there is no such file.

    Args:
        path: in a private directory.
        what: it is, for messages: ``admin token``.
        cure: for a file that will not do.
        instead: what to do where none can be kept.

    Raises:
        StorageError: it can neither be read nor made, or others might know it.
    """
    if os.path.lexists(path):
        return kept(path, what, cure)
    token = secrets.token_urlsafe(_BYTES)
    try:
        # Complete before it has its name: another process may be started at the same moment.
        hidden = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(token + "\n")
            os.link(hidden, path)
        finally:
            os.unlink(hidden)
    except FileExistsError:
        return kept(path, what, cure)
    except OSError as error:
        raise StorageError(f"the {what} cannot be kept in {str(path)!r}: {error}; {instead}") from None
    return token


def kept(path: Path, what: str, cure: str, *, linked: bool = False) -> str:
    """The secret in a file.

    Args:
        what, cure: as for ``made``.
        linked: the path may be a symbolic link.

    Raises:
        StorageError: it cannot be read, is empty, or others might know it.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if linked else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                if not (linked and stat.S_ISFIFO(found.st_mode)):  # what a shell's <(…) is
                    raise StorageError(f"{str(path)!r} is no file with the {what}; {cure}")
                os.set_blocking(descriptor, True)
        except BaseException:
            os.close(descriptor)
            raise
        with os.fdopen(descriptor) as stream:
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise StorageError(f"others may know the {what} in {str(path)!r}; {cure}")
            token = stream.read(_LONGEST).strip()
    except FileNotFoundError:
        raise StorageError(f"there is no file {str(path)!r}; make it, with the {what} in one line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the {what} cannot be read from {str(path)!r}: {error}; {cure}") from None
    if not token:
        raise StorageError(f"there is no {what} in {str(path)!r}; {cure}")
    return token
