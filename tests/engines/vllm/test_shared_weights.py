"""Parameters that another process holds: put into a model that takes no memory for them, or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.weights.modules import state
from tests.zygote.running import until

pytest.importorskip("vllm", reason="vLLM is not installed")

from thaw_vllm import freeze_model
from thaw_vllm.engines.vllm import shared_weights
from thaw_vllm.engines.vllm.sessions import pool_weights, pool_worker
from thaw_vllm.engines.vllm.sessions.pool_process import Child
from thaw_vllm.engines.vllm.sessions.pool_weights import SharedWeights
from thaw_vllm.engines.vllm.shared_weights import Placeholders, place
from thaw_vllm.errors import (
    CorruptionError,
    DeviceError,
    MismatchError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.restore import RestoreReport

pytestmark = pytest.mark.vllm


class Model(torch.nn.Module):
    """One large parameter under two names, one in other order, one small, and a buffer."""

    def __init__(self, rows: int = 700, dtype: torch.dtype = torch.float32, transposed: bool = True) -> None:
        super().__init__()
        wide = torch.empty(600, rows, dtype=dtype)
        self.first = torch.nn.Linear(512, 1024, bias=False)
        self.head = torch.nn.Linear(512, 1024, bias=False)
        self.head.weight = self.first.weight
        self.other = torch.nn.Parameter(wide.t() if transposed else torch.empty(rows, 600, dtype=dtype))
        self.small = torch.nn.Parameter(torch.empty(7))
        self.register_buffer("scale", torch.tensor(3.5))


def filled(seed: int) -> Model:
    generator, model = torch.Generator().manual_seed(seed), Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    freeze_model(filled(1), tmp_path / "w.thaw")
    return tmp_path / "w.thaw"


@pytest.fixture(autouse=True)
def going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does not end with a holder."""
    monkeypatch.setattr(shared_weights, "_end_with", lambda connection: connection.close())


@pytest.fixture
def holder(snapshot: Path, tmp_path: Path) -> Iterator[str]:
    """Its socket."""
    child, ends = Child("the holder", threading.Event()), time.monotonic() + 120
    child.start(pool_weights.PROGRAM, path=tmp_path / "p.sock", log=tmp_path / "log", until=ends, zygote=None)
    told = child.asked({"snapshot": str(snapshot), "socket": str(tmp_path / "h.sock")}, ends)
    assert isinstance(told.pop("holder"), int)
    assert told == {"bytes": 512 * 1024 * 4 + 600 * 700 * 4 + 7 * 4 + 4, "memory": None}
    yield str(tmp_path / "h.sock")
    child.end()


def placed(model_of: dict, snapshot: Path, holder: str) -> tuple[Model, RestoreReport]:
    placeholders = Placeholders()
    try:
        model = Model(**model_of)
    finally:
        placeholders.end()
    with open_snapshot(snapshot, with_chunks=False) as opened:
        return model, place(model, opened, holder, placeholders)


def test_large_parameters_take_no_memory():
    placeholders = Placeholders()
    model = Model()
    placeholders.end()
    placeholders.end()
    assert (model.first.weight.shape, model.other.shape) == ((1024, 512), (700, 600))
    assert type(model.other) is torch.nn.Parameter and model.head.weight is model.first.weight
    one, other = model.first.weight.untyped_storage(), model.other.untyped_storage()
    assert one.data_ptr() == other.data_ptr() and one.nbytes() == 512 * 1024 * 4
    assert placeholders.holds(model.first.weight) and placeholders.holds(model.other)
    assert model.small.untyped_storage().nbytes() == 28 and not placeholders.holds(model.small)
    assert model.other.stride() == (1, 700)
    assert torch.nn.Linear(1024, 1024).weight.untyped_storage().nbytes() == 4 << 20, "that is over"


def test_what_is_held_is_put_there(snapshot: Path, holder: str):
    model, report = placed({}, snapshot, holder)
    assert state(model) == state(filled(1)) and model.head.weight is model.first.weight
    assert model.other.stride() == (1, 700)
    assert (report.tensors, report.verified, report.route) == (5, "xxh3", "mapped")
    memory = {one.untyped_storage().data_ptr() for one in (model.first.weight, model.other)}
    assert len(memory) == 1, "both in the one that is held"
    assert model.small.untyped_storage().nbytes() == 28
    with torch.no_grad():
        model.other.zero_()
    assert state(placed({}, snapshot, holder)[0]) == state(filled(1)), "what one writes is its own"


@pytest.mark.parametrize(
    "other", [{"rows": 701}, {"dtype": torch.float16}, {"transposed": False}], ids=["shape", "dtype", "stride"]
)
def test_another_model(other: dict, snapshot: Path, holder: str):
    with pytest.raises(MismatchError, match="thaw it into the model it was frozen from"):
        placed(other, snapshot, holder)


def test_another_snapshot_by_now(snapshot: Path, holder: str):
    freeze_model(filled(2), snapshot, force=True)
    with pytest.raises(MismatchError, match="has become another snapshot"):
        placed({}, snapshot, holder)


def test_nobody_there(snapshot: Path, tmp_path: Path):
    with pytest.raises(StorageError, match="does not answer"):
        placed({}, snapshot, str(tmp_path / "nowhere.sock"))


ENDS_WITH_IT = """
import os, signal, sys, time
from tests.engines.vllm.test_shared_weights import placed
model, _ = placed({}, sys.argv[1], sys.argv[2])
print("placed", flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_the_holder_of_its_weights(snapshot: Path, tmp_path: Path):
    child, ends = Child("the holder", threading.Event()), time.monotonic() + 120
    child.start(pool_weights.PROGRAM, path=tmp_path / "p.sock", log=tmp_path / "log", until=ends, zygote=None)
    child.asked({"snapshot": str(snapshot), "socket": str(tmp_path / "h.sock")}, ends)
    command = [sys.executable, "-c", ENDS_WITH_IT, str(snapshot), str(tmp_path / "h.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "placed\n"
        child.end()
        assert process.wait() == 1


def test_what_a_holder_cannot_hold(snapshot: Path, tmp_path: Path):
    def ask(path: Path) -> None:
        child, ends = Child("the holder", threading.Event()), time.monotonic() + 120
        try:
            child.start(pool_weights.PROGRAM, path=tmp_path / "p.sock", log=tmp_path / "log", until=ends, zygote=None)
            child.asked({"snapshot": str(path), "socket": str(tmp_path / "h.sock")}, ends)
        finally:
            child.end()

    data = bytearray(snapshot.read_bytes())
    data[-4200] ^= 1
    (tmp_path / "damaged.thaw").write_bytes(data)
    with pytest.raises(CorruptionError):
        ask(tmp_path / "damaged.thaw")
    with pytest.raises(StorageError, match=r"nowhere\.thaw"):
        ask(tmp_path / "nowhere.thaw")


class Seeing(Model):
    """One whose buffer is a view of a parameter, which no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flat", self.other.data[0], persistent=False)


class Hiding(Model):
    """One with a module that it does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.nn.Linear(1024, 1024)]


@pytest.mark.parametrize(("kind", "what"), [(Seeing, "'flat'"), (Hiding, "a parameter that no module names")])
def test_what_would_stay_without_memory_of_its_own(kind: type[Model], what: str, snapshot: Path, holder: str):
    placeholders = Placeholders()
    model = kind()
    placeholders.end()
    with open_snapshot(snapshot, with_chunks=False) as opened, pytest.raises(UnsupportedError, match=what):
        place(model, opened, holder, placeholders)


def options(**more: Any) -> SharedWeights:
    return SharedWeights(**{"snapshot": "w.thaw", "engine_args": {}, "wanted": None, "zygote": None} | more)


def test_a_holder_that_does_not_come_up_is_started_again(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that says nothing in time is not taken for one that is there."""
    weights = options(snapshot=str(snapshot), wanted=True, closing=threading.Event())
    with monkeypatch.context() as patch:
        patch.setattr(pool_weights, "PROGRAM", "tests.engines.vllm.silent")
        with pytest.raises(TimeoutError):
            weights.there(tmp_path, tmp_path, time.monotonic() + 1)
    assert weights.pid is None
    found = weights.there(tmp_path, tmp_path, time.monotonic() + 120)
    assert found is not None and weights.pid is not None
    before = weights.pid
    os.kill(before, signal.SIGKILL)
    until(lambda: weights.pid is None, "the holder to end")
    again = weights.there(tmp_path, tmp_path, time.monotonic() + 120)
    assert again is not None and again["socket"] != found["socket"] and weights.pid not in (None, before)
    weights.end()
    assert weights.pid is None


@pytest.mark.parametrize(
    ("error", "wanted", "after"),
    [(UnsupportedError("no"), None, True), (DeviceError("no"), None, True), (DeviceError("no"), True, False),
     (MismatchError("no"), None, False), (BrokenPipeError(), None, False)],
)  # fmt: skip
def test_when_each_engine_gets_its_own(error: Exception, wanted: bool | None, after: bool):
    weights = options(wanted=wanted, closing=threading.Event())
    weights.asked = True
    assert weights.given_up(error) is after
    assert weights.asked is not after and weights.given_up(BrokenPipeError()) is after, "what others see of it, too"


@pytest.mark.parametrize(
    ("given", "workers", "weights", "found"),
    [
        (None, 2, None, 0.45),
        (None, 2, {"bytes": 20, "memory": 100}, 0.35),
        (0.4, 4, {"bytes": 20, "memory": 100}, 0.35),
        (0.4, 4, {"bytes": 20, "memory": None}, 0.4),
    ],
)
def test_an_engines_share_of_the_memory(given: Any, workers: int, weights: Any, found: float):
    assert pool_worker._share(given, workers, weights) == pytest.approx(found)
    with pytest.raises(UsageError, match=r"leave nothing of the GPU's 0\.0 GB to 4 engines"):
        pool_worker._share(None, 4, {"bytes": 90, "memory": 100})
