"""The secret that a server's admin routes ask for: given, or made once and kept for its user alone."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from ..engines.vllm.kv.access import SHORTEST_TOKEN, usable
from ..engines.vllm.kv.access import TOKEN_VARIABLE as VARIABLE
from ..errors import StorageError, UsageError
from .state import state_directory

_BYTES = 32


def token_path() -> Path:
    """The file that it is kept in.

    Raises:
        StorageError: there is no directory for it.
    """
    return state_directory() / "admin-token"


def admin_token(environment: Mapping[str, str] = os.environ) -> tuple[str, Path | None]:
    """The token that a server shall ask for, and the file that it is from: THAW_ADMIN_TOKEN, else the kept one, else a
    new one, which is kept.

    Raises:
        UsageError: the one that is given cannot be used.
        StorageError: it can neither be read nor made, or others might know it.
    """
    given = environment.get(VARIABLE)
    if given:
        if not usable(given):
            raise UsageError(f"{VARIABLE} must be {SHORTEST_TOKEN} or more printable ASCII characters")
        return given, None
    path = token_path()
    if os.path.lexists(path):
        return _kept(path), path
    made = secrets.token_urlsafe(_BYTES)
    try:
        # Complete before it has its name: another server may be started at the same moment.
        hidden = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(made + "\n")
            os.link(hidden, path)
        finally:
            os.unlink(hidden)
    except FileExistsError:
        return _kept(path), path
    except OSError as error:
        raise StorageError(f"the admin token cannot be kept in {str(path)!r}: {error}; set {VARIABLE}") from None
    return made, path


def kept_token() -> str | None:
    """The token in the file; None where there is none that can be used."""
    try:
        return _kept(token_path())
    except StorageError:
        return None


def _kept(path: Path) -> str:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as stream:
            found = os.fstat(stream.fileno())
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise StorageError(
                    f"others may know the admin token in {str(path)!r}; remove that file, and another one is made, or "
                    f"set {VARIABLE}"
                )
            token = stream.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the admin token cannot be read from {str(path)!r}: {error}; remove that file") from None
    if not token:
        raise StorageError(f"{str(path)!r} is empty; remove it, and another admin token is made")
    return token
