"""Who may call the routes of a server, and which files they may name."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....errors import UsageError

TOKEN_VARIABLE = "THAW_ADMIN_TOKEN"
DIRECTORY_VARIABLE = "THAW_KV_DIR"
TOKEN_HEADER = "X-Thaw-Admin-Token"
"""A header of its own: vLLM's API key is in ``Authorization``, and is given to everybody who may ask the model."""
SHORTEST_TOKEN = 16
ENDING = ".thawkv"

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,199}}{re.escape(ENDING)}")


@dataclass(frozen=True)
class Access:
    """What the operator of a server allows.

    Attributes:
        token: what callers must send; None: nobody may call.
        directory: where all files are; None: nobody may call.
    """

    token: str | None = field(default=None, repr=False)
    directory: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Access:
        """As the variables say; an empty one counts as unset."""
        return cls(environment.get(TOKEN_VARIABLE) or None, environment.get(DIRECTORY_VARIABLE) or None)

    def refusal(self, given: str | None) -> str | None:
        """Why whoever sent this token may not call, with the cure; None: they may."""
        token, directory = self.token, self.directory
        if token is None:
            return f"this server lets nobody freeze or restore; start it with {TOKEN_VARIABLE} set to a secret"
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or token != token.strip():
            return (
                f"the server's {TOKEN_VARIABLE} cannot be used; start it with {SHORTEST_TOKEN} or more printable "
                "ASCII characters"
            )
        # Bytes: text may be compared only where it is ASCII.
        if given is None or not hmac.compare_digest(given.encode(), token.encode()):
            return f"send the server's {TOKEN_VARIABLE} in the header {TOKEN_HEADER}"
        if directory is None or not os.path.isabs(directory) or not os.path.isdir(directory):
            return (
                "this server has no directory for files; start it with "
                f"{DIRECTORY_VARIABLE} set to the absolute path of one that exists"
            )
        return None

    def path_of(self, name: str) -> str:
        """Where the file of this checked name is."""
        assert self.directory is not None
        return os.path.join(os.path.realpath(self.directory), name)


def checked_name(name: object) -> str:
    """A base name that stays in its directory, is not hidden and cannot be another kind of file.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name) if isinstance(name, str) and len(name) <= 100 else "this name"
        raise UsageError(
            f"name: {shown} cannot be used; it takes letters, digits and '._-', does not begin with a dot, names no "
            f"directory and ends in {ENDING}"
        )
    return name
