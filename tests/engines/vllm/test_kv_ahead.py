"""What a worker's process keeps for restores; no engine, and the GPU is made up."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is not installed")
import torch

from thaw_vllm.engines.vllm.kv import ahead, pages


def test_an_open_file_is_lent_meanwhile():
    opened = SimpleNamespace()
    with ahead.lending(opened) as name, ahead.lending(SimpleNamespace()) as other:
        assert ahead.borrowed(name) is opened and name != other
        assert ahead.borrowed("") is None
    assert ahead.borrowed(name) is None
    with pytest.raises(KeyError), ahead.lending(opened) as name:
        raise KeyError
    assert ahead.borrowed(name) is None


def test_nothing_is_made_ready_for_the_host(monkeypatch):
    monkeypatch.setattr(ahead, "_kept", {})
    ahead.expect(torch.device("cpu"))
    assert not ahead._kept


def test_a_gpu_has_its_own(monkeypatch):
    monkeypatch.setattr(ahead, "_kept", {})
    monkeypatch.setattr(ahead, "by_driver", lambda device: True)
    asked = []
    monkeypatch.setattr(ahead.KeptHelpers, "start", lambda self, *given: asked.append((self, *given)))
    for number in (0, 1, 0):
        ahead.expect(torch.device("cuda", number))
    first, second = ahead.kept(torch.device("cuda", 0)), ahead.kept(torch.device("cuda", 1))
    assert first is not second
    assert asked == [(first, 0, ahead.ANNOUNCED), (second, 1, ahead.ANNOUNCED), (first, 0, ahead.ANNOUNCED)]


@pytest.mark.parametrize(
    ("device", "job", "busy", "threads"),
    [
        ("cpu", "a", False, 1),
        ("cpu", None, True, None),
        ("cuda", "a", True, 2),
        ("cuda", "a", False, None),
        ("cuda", None, True, None),
    ],
)
def test_a_freeze_beside_requests_takes_few_threads(device: str, job: str | None, busy: bool, threads: int | None):
    assert pages._threads({"job": job, "busy": busy}, torch.device(device)) == threads
