"""What a process makes ready for a restore to come; the GPU is made up (tests/gpu has a real one)."""

import pytest
import torch

import thaw_vllm
from thaw_vllm.errors import UsageError
from thaw_vllm.weights import ahead


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(ahead, "_kept", {})


@pytest.fixture
def asked(monkeypatch):
    """Two GPUs, of which the second is torch's current one; which helpers were started."""
    found = []
    monkeypatch.setattr(ahead, "by_driver", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(ahead.KeptHelpers, "start", lambda self, *given: found.append((self, *given)))
    return found


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_nothing_is_made_ready_for_other_devices(device):
    thaw_vllm.expect_restore(device)
    assert not ahead._kept


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", ""])
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
    assert asked == [
        (kept, number, ahead.ANNOUNCED) for kept, number in ((first, 0), (second, 1), (second, 1), (first, 0))
    ]


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
