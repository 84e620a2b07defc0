"""The secret that both sides of weights over TCP prove to each other that they know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import StorageError
from .kept_token import kept, made, usable
from .private import STATE, private, state_path

VARIABLE = "THAW_PEER_TOKEN_FILE"
SHORTEST = 32
"""Characters: who listens to the proofs may try tokens for as long as he likes."""
_WHAT = "peer token"
_OWN = "remove that file, and another one is made, or name one that is yours alone (--token-file)"
_GIVEN = "give a file of yours alone (chmod 600) with the token in one line, the same at both ends"


def lender_token(given: Path | None, environment: Mapping[str, str]) -> tuple[bytes, Path]:
    """Of who lends, and the file that it is from: the given one, THAW_PEER_TOKEN_FILE, or one that is made and kept.

    Raises:
        StorageError: it can neither be read nor made, others might know it, or it is too short.
    """
    named = given or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    if named is not None:
        return _read(named), named
    path = _path(environment)
    private(path.parent, f"set {STATE} to a directory of your own")
    return _checked(made(path, _WHAT, _OWN, "name a file by --token-file"), path), path


def taker_token(environment: Mapping[str, str]) -> bytes:
    """Of who takes: in THAW_PEER_TOKEN_FILE, or the one that ``thaw lend`` keeps for this user.

    Raises:
        StorageError: as ``lender_token``, or there is none.
    """
    named = environment.get(VARIABLE)
    if named:
        return _read(Path(named))
    path = _path(environment)
    if not os.path.lexists(path):
        raise StorageError(f"no {_WHAT} is kept here; copy the lender's to a file of yours alone, named by {VARIABLE}")
    return _checked(kept(path, _WHAT, _OWN), path)


def _path(environment: Mapping[str, str]) -> Path:
    return state_path(environment) / "peer-token"


def _read(path: Path) -> bytes:
    return _checked(kept(path, _WHAT, _GIVEN, linked=True), path)


def _checked(token: str, path: Path) -> bytes:
    if not usable(token, SHORTEST):
        raise StorageError(
            f"the {_WHAT} in {str(path)!r} must be {SHORTEST} or more printable ASCII characters; "
            f"'openssl rand -hex {SHORTEST}' makes one"
        )
    return token.encode()
