"""A session's blocks from a store into a GPU's memory: by helpers and by threads, in one part and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.vllm.test_session_fill import Kept

from thaw_vllm.engines.vllm.sessions import pages
from thaw_vllm.errors import CorruptionError, StorageError
from thaw_vllm.sessions import blocks
from thaw_vllm.sessions.store import Store
from thaw_vllm.transport import reading_helpers
from thaw_vllm.transport.files import Files
from thaw_vllm.weights import ahead

PAGE, LAYERS, COUNT = 64 << 10, 32, 128
"""The shape of an 8b model's blocks: 2 MiB less half a page."""
READ = reading_helpers.Helpers.reading


@pytest.fixture
def kept(memory_path: Path) -> Kept:
    return Kept(Store(memory_path / "store", create=True), PAGE, "cuda", COUNT, LAYERS)


@pytest.fixture
def used(monkeypatch: Any) -> list[Any]:
    """Deliveries that helpers have read."""
    found: list[Any] = []

    def reading(self: Any, source: Any) -> Any:
        found.append(source)
        return READ(self, source)

    monkeypatch.setattr(reading_helpers.Helpers, "reading", reading)
    return found


@pytest.mark.parametrize("room", [None, 40])
@pytest.mark.parametrize("who", ["helpers", "threads"])
def test_every_page(who: str, room: int | None, kept: Kept, used: list[Any], monkeypatch: Any):
    if room is not None:
        monkeypatch.setattr(pages, "room_on", lambda device: room * kept.page)
    device = torch.device("cuda", 0)
    if who == "helpers":
        ahead.kept(device).start(0)
        monkeypatch.setattr(Files, "read_into", lambda *_: pytest.fail("read here"))
    else:
        ahead.kept(device).close()
    for _ in range(2):
        for _, view in kept.found:
            view.fill_(-7)
        kept.fill(pages._to_device)
        assert kept.correct()
    assert len(used) == (2 if who == "helpers" else 0)
    ahead.kept(device).close()


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bit(seed: int, kept: Kept):
    path = kept.path(11 * seed)
    data = bytearray(path.read_bytes())
    data[blocks.PAYLOAD_AT + 70_001 * (seed + 1)] ^= 1 << seed
    path.write_bytes(data)
    ahead.kept(torch.device("cuda", 0)).start(0)
    with pytest.raises(CorruptionError, match=f"'{path}' is damaged: .* does not agree; thaw fsck --repair takes it"):
        kept.fill(pages._to_device)
    data[blocks.PAYLOAD_AT + 70_001 * (seed + 1)] ^= 1 << seed
    path.write_bytes(data)
    kept.fill(pages._to_device)
    assert kept.correct()
    ahead.kept(torch.device("cuda", 0)).close()


def test_missing_one(kept: Kept):
    """And the next restore works."""
    path = kept.path(100)
    path.rename(path.with_name("elsewhere"))
    ahead.kept(torch.device("cuda", 0)).start(0)
    with pytest.raises(StorageError, match=f"'{path}' is missing; thaw fsck shows"):
        kept.fill(pages._to_device)
    path.with_name("elsewhere").rename(path)
    kept.fill(pages._to_device)
    assert kept.correct()
    ahead.kept(torch.device("cuda", 0)).close()
