"""Who may call the routes of a server, and which files they may name."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....errors import ExistsError, UsageError
from ....sessions.store import VARIABLE as SESSIONS_VARIABLE
from ....transport import kept_token

TOKEN_VARIABLE = "THAW_ADMIN_TOKEN"
DIRECTORY_VARIABLE = "THAW_KV_DIR"
SNAPSHOTS_VARIABLE = "THAW_SNAPSHOT_DIR"
OPTIONS = {
    DIRECTORY_VARIABLE: "--kv-dir",
    SNAPSHOTS_VARIABLE: "--snapshot-dir",
    SESSIONS_VARIABLE: "--sessions-dir",
}
"""Of ``thaw serve``."""
TOKEN_HEADER = "X-Thaw-Admin-Token"
"""A header of its own: vLLM's API key is in ``Authorization``, and is given to everybody who may ask the model."""
SHORTEST_TOKEN = 16
ENDING, SNAPSHOT_ENDING = ".thawkv", ".thaw"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,206}")


@dataclass(frozen=True)
class Access:
    """What the operator of a server allows.

    Attributes:
        token: what callers must send; None: nobody may call.
        directory: where all files of KV blocks are; None: nobody may name one.
        snapshots: where all snapshots are; None: nobody may name one.
        sessions: the store of sessions, made with the first one; None: nobody may keep or read any.
    """

    token: str | None = field(default=None, repr=False)
    directory: str | None = None
    snapshots: str | None = None
    sessions: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Access:
        """As the variables say; an empty one counts as unset."""
        names = (TOKEN_VARIABLE, DIRECTORY_VARIABLE, SNAPSHOTS_VARIABLE, SESSIONS_VARIABLE)
        return cls(*(environment.get(name) or None for name in names))

    def refusal(self, given: str | None) -> str | None:
        """Why whoever sent this token may not freeze or restore KV blocks, with the cure; None: they may."""
        return self.stranger(given) or no_directory(self.directory, DIRECTORY_VARIABLE)

    def session_refusal(self, given: str | None) -> str | None:
        """Why whoever sent this token may not keep or read sessions, with the cure; None: they may."""
        return self.stranger(given) or no_directory(self.sessions, SESSIONS_VARIABLE)

    def stranger(self, given: str | None) -> str | None:
        """Why whoever sent this token may not ask anything, with the cure; None: they may."""
        token = self.token
        if token is None:
            return f"this server lets nobody use thaw's routes; start it with {TOKEN_VARIABLE} set to a secret"
        if not usable(token):
            return (
                f"the server's {TOKEN_VARIABLE} cannot be used; start it with {SHORTEST_TOKEN} or more printable "
                "ASCII characters"
            )
        # Bytes: text may be compared only where it is ASCII.
        if given is None or not hmac.compare_digest(given.encode(), token.encode()):
            return f"send the server's {TOKEN_VARIABLE} in the header {TOKEN_HEADER}"
        return None

    def path_of(self, name: str) -> str:
        """Where the file of KV blocks of this checked name is.

        Raises:
            UsageError: there is no directory for them.
        """
        return _within(self.directory, DIRECTORY_VARIABLE, name)

    def target(self, name: str, force: bool) -> str:
        """``path_of`` a file that is to be written: said before the engine stops for it.

        Raises:
            ExistsError: it is there, and is not to be replaced.
        """
        path = self.path_of(name)
        if not force and os.path.lexists(path):
            raise ExistsError(f'{name!r} exists in the server\'s directory; use --force ("force": true) to replace it')
        return path

    def snapshot(self, name: str) -> str:
        """Where the snapshot of this checked name is.

        Raises:
            UsageError: there is no directory for them.
        """
        return _within(self.snapshots, SNAPSHOTS_VARIABLE, name)


def usable(token: str) -> bool:
    """Whether it can be a server's admin token: long enough, and sent by any client as it is."""
    return kept_token.usable(token, SHORTEST_TOKEN)


def no_directory(directory: str | None, variable: str) -> str | None:
    """Why a server whose ``variable`` says this has no directory for files, with the cure; None: it has."""
    if directory is None or not os.path.isabs(directory) or not os.path.isdir(directory):
        return (
            f"this server has no directory for files; start it with {variable} set to the absolute path of one that "
            f"exists (thaw serve {OPTIONS[variable]} DIRECTORY)"
        )
    return None


def _within(directory: str | None, variable: str, name: str) -> str:
    why = no_directory(directory, variable)
    if why is not None:
        raise UsageError(why)
    assert directory is not None
    return os.path.join(os.path.realpath(directory), name)


def checked_name(name: object, ending: str = ENDING) -> str:
    """A base name that stays in its directory, is not hidden and cannot be another kind of file.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.endswith(ending):
        shown = repr(name) if isinstance(name, str) and len(name) <= 100 else "this name"
        raise UsageError(
            f"name: {shown} cannot be used; it takes letters, digits and '._-', does not begin with a dot, names no "
            f"directory and ends in {ending}"
        )
    return name
