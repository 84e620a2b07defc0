"""What the loader makes ready for a restore while vLLM builds the model; no engine, and the GPU is made up."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
import torch
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from thaw_vllm.engines.vllm import loader as loading
from thaw_vllm.engines.vllm.loader import ThawModelLoader
from thaw_vllm.transport.reading_helpers import WORTH
from thaw_vllm.weights import ahead

GPU = torch.device("cuda", 1)


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, torch.device]]:
    found: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(loading, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("expect", "expect_peer", "rest"):
        monkeypatch.setattr(ahead, name, lambda device, name=name: found.append((name, device)))
    monkeypatch.setattr(ThawModelLoader, "_prepare", lambda *_: None)
    monkeypatch.setattr(loading, "note", lambda *_: None)
    return found


@pytest.fixture
def snapshot(tmp_path) -> str:
    """As large as one that is worth it, and empty."""
    path = tmp_path / "w.thaw"
    with open(path, "wb") as file:
        file.truncate(WORTH)
    return str(path)


def loader(snapshot: str, **options: Any) -> ThawModelLoader:
    given = {"snapshot": snapshot} | options
    return ThawModelLoader(LoadConfig(load_format="thaw", model_loader_extra_config=given))


def load(made: ThawModelLoader, monkeypatch: Any, fails: bool = False) -> None:
    def base(*_: Any) -> torch.nn.Module:
        if fails:
            raise KeyError
        return torch.nn.Module()

    monkeypatch.setattr(BaseModelLoader, "load_model", base)
    made.load_model(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_it_comes_up_before_and_ends_after(fails, told, snapshot, monkeypatch):
    """However the load ends: graphs are captured next, and nothing may be unlocked meanwhile."""
    if fails:
        with pytest.raises(KeyError):
            load(loader(snapshot), monkeypatch, fails=True)
    else:
        load(loader(snapshot), monkeypatch)
    assert told == [("expect", GPU), ("rest", GPU)]


def test_it_stays_for_blocks_that_come_next(told, snapshot, monkeypatch):
    load(loader(snapshot, expects_kv=True), monkeypatch)
    assert told == [("expect", GPU)]


@pytest.mark.parametrize("options", [{}, {"processes": False}, {"workers": 3}])
def test_of_a_peer_the_kernel_comes_up(options, told, snapshot, monkeypatch):
    """What a file needs then comes up if the peer has gone meanwhile, so that it is to rest, too."""
    load(loader(snapshot, peer="/run/x.sock", **options), monkeypatch)
    assert told == [("expect_peer", GPU), ("rest", GPU)]


NOBODY = [{"processes": False}, {"workers": 3}, {"mode": "freeze"}, {"shared": "/run/x"}, {"peer": "tcp://127.0.0.1:1"}]


@pytest.mark.parametrize("options", NOBODY)
def test_nothing_comes_up_that_nobody_would_use(options, told, snapshot, monkeypatch):
    load(loader(snapshot, **options), monkeypatch)
    assert not told


def test_files_that_are_small_or_missing(told, snapshot, tmp_path, monkeypatch):
    (tmp_path / "small.thaw").write_bytes(b"x")
    load(loader(str(tmp_path / "small.thaw")), monkeypatch)
    load(loader(str(tmp_path / "none.thaw")), monkeypatch)
    monkeypatch.setattr(loading, "current_platform", SimpleNamespace(is_cuda=lambda: False))
    load(loader(snapshot), monkeypatch)
    assert not told


@pytest.mark.parametrize(
    ("options", "lent"),
    [
        ({}, True),
        ({"processes": False}, False),
        ({"workers": 2}, False),
        ({"peer": "auto"}, True),
        ({"peer": "s"}, False),
    ],
)
def test_who_borrows(options, lent, snapshot, monkeypatch):
    monkeypatch.setattr(ahead, "ready", lambda targets: "kept")
    made = loader(snapshot, **options)
    assert made._kept([], made._helped(snapshot)) == ("kept" if lent else None)
