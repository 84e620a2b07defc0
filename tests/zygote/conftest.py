"""Zygotes that have imported next to nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.zygote.running import Zygote, made


@pytest.fixture(scope="module")
def _shared() -> Iterator[Zygote]:
    with made() as zygote:
        zygote.start()
        yield zygote


@pytest.fixture
def zygote(_shared: Zygote, interruptible: None) -> Iterator[Zygote]:
    """A module's zygote; after each test nothing is left of it, and the zygote is as it was."""
    yield _shared
    _shared.idle()


@pytest.fixture
def own(interruptible: None) -> Iterator[Zygote]:
    """A place of the test's own, whose zygote it starts itself."""
    with made() as zygote:
        yield zygote
