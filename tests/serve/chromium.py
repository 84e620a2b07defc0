"""A real browser for the tests of the page: the system's Chromium, driven by Playwright, which brings none of its own
here. It runs without a window, and tells what it logs, asks for, and refuses."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def executable() -> str:
    """Where it is; THAW_CHROMIUM says so where it has another name. Skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("THAW_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium here (on Debian: apt install chromium), or THAW_CHROMIUM does not name it")
    return found


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Playwright's ``Browser``."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=flags)
        try:
            yield made
        finally:
            made.close()


@dataclass
class Heard:
    """What a page has logged and asked for.

    Attributes:
        errors: of its console, and exceptions that nobody caught.
        hosts: of its requests.
    """

    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def listen(self, page: Any) -> Any:
        page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda asked: self.hosts.add(urlsplit(asked.url).hostname or asked.url[:20]))
        return page
