"""The secret that a server's admin routes ask for: given, or made once and kept for its user alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..engines.vllm.kv.access import SHORTEST_TOKEN, usable
from ..engines.vllm.kv.access import TOKEN_VARIABLE as VARIABLE
from ..errors import StorageError, UsageError
from ..transport.kept_token import kept, made
from .state import state_directory

_WHAT = "admin token"
_CURE = f"remove that file, and another one is made, or set {VARIABLE}"


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
    return made(path, _WHAT, _CURE, f"set {VARIABLE}"), path


def kept_token() -> str | None:
    """The token in the file; None where there is none that can be used."""
    try:
        return kept(token_path(), _WHAT, _CURE)
    except StorageError:
        return None
