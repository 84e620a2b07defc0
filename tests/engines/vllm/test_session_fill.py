"""A session's blocks from a store into an engine's memory, without an engine: every page, by both ways."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sessions import made

from thaw_vllm.engines.vllm.sessions import pages
from thaw_vllm.errors import CorruptionError, DeviceError, StorageError
from thaw_vllm.format.kv import Region
from thaw_vllm.sessions import blocks
from thaw_vllm.sessions.context import Context
from thaw_vllm.sessions.store import Store
from thaw_vllm.weights.waterfall import Phases

WAYS = [pages._to_device, pages._through_host]
BLOCKS = 40


def context(page: int, layers: int = 3) -> Context:
    """With regions of a page each, the last one half as long."""
    sizes = [page] * (layers - 1) + [page // 2]
    regions = tuple(Region(f"layer.{n}#0", "uint8", (size,), (1,), size) for n, size in enumerate(sizes))
    base = made.context()
    return Context(base.identity, replace(base.layout, regions=regions))


class Kept:
    """A session's blocks in a store, and an engine's memory of twice as many that holds something else."""

    def __init__(self, store: Store, page: int, device: str = "cpu", count: int = BLOCKS, layers: int = 3) -> None:
        own = context(page, layers)
        self.store, self.page = store, own.page
        session = made.session([n % 50 for n in range(count * made.SIZE)], contexts=[own])
        self.data = {}
        with store.use():
            for seed, (_, name) in enumerate(store.named(session, [own])):
                self.data[name] = random.Random(seed).randbytes(own.page)
                blocks.write(store.blocks, name, memoryview(self.data[name]))
            store.publish(session, [own])
        self.found: list[tuple[Region, Any]] = []
        for region in own.layout.regions:
            view = torch.full((2 * count, region.page // 4), -7, dtype=torch.int32, device=device)
            self.found.append((region, view))
        ids = random.Random(count).sample(range(2 * count), count)
        self.wanted = list(zip(self.data, ids, strict=True))

    def fill(self, way: Any) -> dict[str, float]:
        phases = Phases()
        with torch.inference_mode():
            way(self.store, self.found, self.wanted, self.page, phases)
        return phases.seconds

    def correct(self) -> bool:
        """Whether every page is where it belongs, and no other block was written to."""
        at = 0
        for region, view in self.found:
            expected = torch.full(view.shape, -7, dtype=torch.int32)
            for name, number in self.wanted:
                part = bytearray(self.data[name][at : at + region.page])
                expected[number] = torch.frombuffer(part, dtype=torch.int32)
            if not torch.equal(view.cpu(), expected):
                return False
            at += region.page
        return True

    def path(self, number: int) -> Any:
        return self.wanted[number][0].path(self.store.blocks)


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.mark.parametrize("page", [8, 4096, 3 << 20])
@pytest.mark.parametrize("way", WAYS)
def test_every_page(way: Any, page: int, store: Store):
    kept = Kept(store, page, count=5 if page > 4096 else BLOCKS)
    kept.fill(way)
    assert kept.correct()


@pytest.mark.parametrize("way", WAYS)
def test_a_few_at_a_time(way: Any, store: Store, monkeypatch: Any):
    """Where there is little room."""
    kept = Kept(store, 4096)
    monkeypatch.setattr(pages, "room_on", lambda device: 7 * kept.page)
    monkeypatch.setattr(pages, "_AT_ONCE", 7 * kept.page)
    kept.fill(way)
    assert kept.correct()
    monkeypatch.setattr(pages, "room_on", lambda device: 5)
    kept.fill(way)
    assert kept.correct()


def test_heads_are_looked_at_beforehand_on_a_disk(store: Store, monkeypatch: Any):
    """By many threads, not one after another while what copies waits."""
    kept, own = Kept(store, 4096), threading.get_ident()
    monkeypatch.setattr(pages, "_in_memory", lambda directory: False)
    check = blocks.check

    def checked(*arguments: Any) -> blocks.Head:
        assert threading.get_ident() != own
        return check(*arguments)

    monkeypatch.setattr(blocks, "check", checked)
    kept.fill(pages._to_device)
    assert kept.correct()


def test_a_device_without_room(store: Store, monkeypatch: Any):
    """Blocks go through host memory then."""
    kept, asked = Kept(store, 4096), []

    @contextlib.contextmanager
    def scratch(size: int, device: torch.device) -> Any:
        asked.append(size)
        raise DeviceError("out of memory")
        yield

    monkeypatch.setattr(pages, "scratch", scratch)
    kept.fill(pages._to_device)
    assert kept.correct() and asked == [BLOCKS * kept.page]


def test_memory_that_may_not_be_locked(monkeypatch: Any):
    empty = torch.empty

    def refusing(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: operation not permitted")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    assert pages._host_room(3, 5, pinned=True).shape == (3, 5)


@pytest.mark.parametrize("way", WAYS)
def test_damaged_ones_are_named(way: Any, store: Store):
    kept = Kept(store, 4096)
    path = kept.path(23)
    data = bytearray(path.read_bytes())
    data[blocks.PAYLOAD_AT + 4000] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"'{path}' is damaged: .* does not agree; thaw fsck --repair takes it"):
        kept.fill(way)


@pytest.mark.parametrize("way", WAYS)
def test_missing_and_strange_ones_are_named(way: Any, store: Store):
    kept = Kept(store, 4096)
    path = kept.path(7)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(StorageError, match=f"'{path}' is missing; thaw fsck shows"):
        kept.fill(way)
    shutil.copy(kept.path(8), path)
    with pytest.raises(CorruptionError, match="another block than its name says"):
        kept.fill(way)
    store.blocks.rename(store.blocks.with_name("gone"))
    with pytest.raises(StorageError, match="is missing; thaw fsck shows"):
        kept.fill(way)


def test_regions_of_other_words():
    """A row's bytes of a region may begin between that region's words."""
    rows = torch.arange(5 * 22, dtype=torch.uint8).view(5, 22)
    views = [
        torch.zeros((8, size // kind.itemsize), dtype=kind) for size, kind in ((6, torch.int16), (16, torch.int64))
    ]
    regions = [(Region(str(n), "uint8", (6 + 10 * n,), (1,), 6 + 10 * n), view) for n, view in enumerate(views)]
    pages._scattered(regions, rows, [7, 0, 3, 2, 5])
    for at, (region, view) in zip((0, 6), regions, strict=True):
        expected = torch.zeros((8, region.page), dtype=torch.uint8)
        expected[[7, 0, 3, 2, 5]] = rows[:, at : at + region.page]
        assert torch.equal(view.view(torch.uint8), expected)
