"""A store in a directory of its own."""

import pytest

from thaw_vllm.sessions.store import Store


@pytest.fixture
def store(memory_path):
    return Store(memory_path / "sessions", create=True)
