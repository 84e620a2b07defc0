"""Logins to a pool's page: who is logged in, who has guessed too often. In memory, so they end with the server.

A session is a random number in a cookie; the admin token itself never reaches a browser's storage.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable

LIFETIME = 12 * 3600.0
"""Seconds until one has to log in again."""
MOST = 32
"""Sessions at once; one more ends the oldest."""
WINDOW = 60.0
"""Seconds for which a failed login counts."""
EACH, ALL = 5, 60
"""Failed logins in that time: from one address, and from all together."""


class Sessions:
    """Those who are logged in. What is kept of a session does not tell its cookie."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def begin(self) -> str:
        """A new session's secret."""
        self._forget()
        while len(self._until) >= MOST:
            self._until.pop(next(iter(self._until)))
        made = secrets.token_urlsafe(32)
        self._until[_key(made)] = self._clock() + LIFETIME
        return made

    def left(self, session: str | None) -> float:
        """Seconds until a session ends; 0 where there is none of that secret."""
        self._forget()
        until = None if session is None else self._until.get(_key(session))
        return 0.0 if until is None else until - self._clock()

    def end(self, session: str | None) -> None:
        """Log out."""
        if session is not None:
            self._until.pop(_key(session), None)

    def _forget(self) -> None:
        now = self._clock()
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]


class Attempts:
    """Logins that failed within the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: deque[tuple[float, str]] = deque(maxlen=ALL)

    def wait(self, address: str) -> float:
        """Seconds until somebody at this address may try again; 0: now."""
        since = self._clock() - WINDOW
        while self._failed and self._failed[0][0] <= since:
            self._failed.popleft()
        own = [at for at, who in self._failed if who == address]
        if len(own) >= EACH:
            return own[-EACH] - since
        return self._failed[0][0] - since if len(self._failed) >= ALL else 0.0

    def note(self, address: str) -> None:
        """One that failed."""
        self._failed.append((self._clock(), address))


def _key(session: str) -> bytes:
    return hashlib.sha256(session.encode()).digest()
