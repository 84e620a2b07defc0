"""Helpers that are lent again and again; the GPU is made up (driver.py)."""

import time

import pytest
from tests.transport.test_reading_helpers import ROOM, ending, no_children, numbers

from thaw_vllm.errors import DeviceError
from thaw_vllm.transport import kept_helpers, reading_helpers
from thaw_vllm.transport.kept_helpers import KeptHelpers

__all__ = ["no_children"]

pytestmark = pytest.mark.usefixtures("no_leaks", "no_children")


@pytest.fixture(autouse=True)
def few(monkeypatch, driver):
    """Two small helpers on any machine."""
    monkeypatch.setattr(kept_helpers, "able", lambda: True)
    monkeypatch.setattr(kept_helpers, "most", lambda workers, cores: 2)
    monkeypatch.setattr(kept_helpers, "Helpers", lambda gpu, count: reading_helpers.Helpers(gpu, count, slot=ROOM))
    return driver


def test_the_same_ones_again(few):
    with KeptHelpers() as kept:
        assert not kept.running(0)
        first = kept.borrow(0)
        known = numbers(first)
        assert not kept.running(0)
        kept.give_back(first)
        assert kept.running(0) and not kept.running(1)
        assert kept.borrow(0) is first and numbers(first) == known
        second = kept.borrow(0)
        assert second is not first
        kept.give_back(second)
        kept.give_back(first)  # there are some already
        assert kept.borrow(0) is second and not first.sound
        kept.give_back(second)
    assert not kept.running(0)
    ending()
    assert few.idle()


def test_another_gpu(few):
    with KeptHelpers() as kept:
        kept.start(0)
        assert kept.running(0)
        kept.start(1)
        assert kept.running(1) and not kept.running(0)
    ending()
    assert few.idle()


def test_those_that_are_of_no_use_are_not_kept(few, memory_path):
    (memory_path / "source.bin").write_bytes(b"x")
    with KeptHelpers() as kept:
        found = kept.borrow(0)
        source = reading_helpers.FileSource(memory_path / "source.bin")
        with source, pytest.raises(KeyError), found.reading(source):
            raise KeyError
        kept.give_back(found)
        assert not kept.running(0)
        other = kept.borrow(0)
        assert other is not found
        kept.give_back(other)
    ending()


def test_ended_when_nobody_wants_them(few):
    kept = KeptHelpers(idle=0.05)
    kept.start(0)
    until = time.monotonic() + 30
    while kept.running(0):
        assert time.monotonic() < until
        time.sleep(0.01)
    ending()
    kept.close()  # the kernel stays
    assert few.idle()


def test_announced_they_wait_longer(few):
    with KeptHelpers(idle=0.05) as kept:
        kept.start(0, idle=30)
        known = kept._helpers
        kept.start(0)  # does not shorten it
        time.sleep(0.3)
        assert kept.running(0) and kept._helpers is known
        kept.give_back(kept.borrow(0))  # it has come
        until = time.monotonic() + 30
        while kept.running(0):
            assert time.monotonic() < until
            time.sleep(0.01)
    ending()


def test_used_again_and_again_they_stay(few):
    with KeptHelpers(idle=0.2) as kept:
        kept.start(0)
        known = kept._helpers
        for _ in range(8):
            time.sleep(0.05)
            kept.give_back(kept.borrow(0))
        assert kept._helpers is known
    ending()


def test_rest(few):
    """Now; and there can be others."""
    with KeptHelpers(idle=30) as kept:
        kept.start(0, idle=600)
        kept._loaders[0].join()
        known = kept._helpers
        kept.rest()
        assert not kept.running(0) and not known.sound and len(few.modules) == 2
        kept.rest()
        lent = kept.borrow(0)
        kept.rest()
        assert lent.sound
        kept.give_back(lent)
    ending()
    assert few.idle()


def test_no_driver(few):
    few.refuse["cuDevicePrimaryCtxRetain"] = 0
    with KeptHelpers() as kept:
        kept.start(0)  # never raises for want of it
    ending()


def test_kernels_are_loaded_once(few):
    with KeptHelpers() as kept:
        kept.start(0)
        kept.start(0)
        kept._loaders[0].join()
        assert kept.kernels.sums(0) is kept.kernels.sums(0) and kept.kernels.decoders(0) is kept.kernels.decoders(0)
        assert few.calls.count("cuModuleLoadData") == 2
        assert kept.kernels.sums(1).device == 1 and len(few.modules) == 3
    ending()
    assert few.idle()


def test_a_kernel_that_the_driver_does_not_take(few):
    few.refuse["cuModuleLoadData"] = 0
    with KeptHelpers() as kept:
        kept.start(0)
        assert kept.running(0)
        kept._loaders[0].join()
        few.refuse["cuModuleLoadData"] = 0
        with pytest.raises(DeviceError):
            kept.kernels.sums(0)
        few.refuse.clear()
        assert kept.kernels.sums(0).device == 0
    ending()
    assert few.idle()


def test_none_can_be_started(few, monkeypatch):
    def refusing(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(kept_helpers, "Helpers", refusing)
    with KeptHelpers() as kept:
        kept.start(0)
        assert not kept.running(0)
        with pytest.raises(OSError, match="no more processes"):
            kept.borrow(0)
    monkeypatch.setattr(kept_helpers, "able", lambda: False)
    with KeptHelpers() as kept:
        assert kept.borrow(0) is None
