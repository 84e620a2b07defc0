"""What a process makes ready for a restore to come; the GPU is made up (tests/gpu has a real one)."""

import os

import pytest
import torch

import thaw_vllm
from thaw_vllm.errors import UsageError
from thaw_vllm.weights import ahead


@pytest.fixture(autouse=True)
def nothing_kept():
    before = dict(ahead._kept)
    ahead._kept.clear()
    yield
    ahead._kept.clear()
    ahead._kept.update(before)


@pytest.fixture
def asked(monkeypatch):
    """Two GPUs, of which the second is torch's current one; which helpers were started."""
    found = []
    monkeypatch.setattr(ahead, "by_driver", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", lambda: found.append("torch has a context"))
    monkeypatch.setattr(ahead.KeptHelpers, "start", lambda self, *given: found.append((self, *given)))
    return found


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_nothing_is_made_ready_for_other_devices(device):
    thaw_vllm.expect_restore(device)
    assert not ahead._kept


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", "", None, 1.5])
def test_no_device(device):
    with pytest.raises(UsageError, match="is no device"):
        thaw_vllm.expect_restore(device)


def test_a_gpu_that_is_not_there(asked, monkeypatch):
    with pytest.raises(UsageError, match="no GPU 2; torch finds 2"):
        thaw_vllm.expect_restore("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="no GPU 0; torch finds 0"):
        thaw_vllm.expect_restore()
    assert not asked


def test_a_gpu_has_its_own(asked):
    for device in ("cuda:0", "cuda", "cuda:1", 0):
        thaw_vllm.expect_restore(device)
    first, second = ahead.kept(torch.device("cuda", 0)), ahead.kept(torch.device("cuda", 1))
    assert first is not second
    calls = [(first, 0), (second, 1), (second, 1), (first, 0)]
    assert [call for call in asked if isinstance(call, tuple)] == [(*call, ahead.ANNOUNCED) for call in calls]
    assert asked[0] == "torch has a context"  # before anything of ours has: who would fork can tell


def test_a_forked_process_has_none(asked):
    ahead.kept(torch.device("cuda", 0))
    child = os.fork()
    if not child:
        os._exit(len(ahead._kept))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and ahead._kept


def test_what_will_not_come(monkeypatch):
    rested = []
    monkeypatch.setattr(ahead.KeptHelpers, "rest", lambda self: rested.append(self))
    ahead.rest(torch.device("cuda", 3))
    assert not rested and not ahead._kept
    kept = ahead.kept(torch.device("cuda", 3))
    ahead.rest(torch.device("cuda", 3))
    assert rested == [kept]


class On:
    def __init__(self, device):
        self.device = torch.device(device)


def test_who_finds_them(asked):
    thaw_vllm.expect_restore("cuda:1")
    kept = ahead.kept(torch.device("cuda", 1))
    assert ahead.ready([On("cuda:1"), On("cpu"), On("cuda:1")]) is kept
    assert ahead.ready([On("cuda:0")]) is None
    assert ahead.ready([On("cuda:0"), On("cuda:1")]) is None
    assert ahead.ready([On("cpu")]) is None and ahead.ready([]) is None
