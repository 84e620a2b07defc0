"""``thaw bench swap``: what it asks of its engine, and what it makes of the answer. Real engines: on the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thaw_vllm import freeze_model
from thaw_vllm.bench import ceilings, swap
from thaw_vllm.bench.outcome import Outcome
from thaw_vllm.errors import StorageError, UsageError

SECONDS = [0.5, 0.4]


def child(**changes: Any) -> dict[str, Any]:
    """What the child answers."""
    report = {"seconds": {"fill": 0.3, "total": 0.4}}
    told = {"seconds": SECONDS, "reports": [report, report], "equal": True}
    away = told | {"used": [40000.0, 40000.0], "left": [1.0, 1.0]}
    parked = [report | {"driver": True, "why": ""}] * 2
    found = {
        "swap": told,
        "swap-pinned": told | {"pinned": 99, "pinning": 0.2},
        "park": away | {"reports": parked},
        "wake": told,
        "sleep": away | {"reports": [{}, {}]},
        "sleep-wake": told | {"reports": [{}, {}]},
    }
    return found | changes


@pytest.fixture
def settings(tmp_path: Path) -> swap.Settings:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        freeze_model(torch.nn.Linear(8, 8), tmp_path / f"{name}.thaw")
    limits = ceilings.Settings("cpu", 10**6, 1, 1)
    return swap.Settings(tmp_path, (tmp_path / "a.thaw", tmp_path / "b.thaw"), 2, None, True, {"x": 1}, limits)


def measured(settings: swap.Settings, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Outcome, Any]:
    asked: list[dict[str, Any]] = []

    def run(request: dict[str, Any], say: object) -> dict[str, Any]:
        asked.append(request)
        return answer

    monkeypatch.setattr(swap, "_run", run)
    return swap.measure(settings, lambda _: None), asked[0]


def test_what_is_asked_and_recorded(settings: swap.Settings, monkeypatch: pytest.MonkeyPatch):
    outcome, asked = measured(settings, child(), monkeypatch)
    assert asked["engine_args"] == {
        "enforce_eager": True,
        "enable_sleep_mode": False,
        "skip_tokenizer_init": True,
        "x": 1,
    }
    assert (asked["pin"], asked["park"], asked["runs"], asked["vocabulary"]) == (False, False, 2, 100)
    found = {(r.work, r.system, r.route): r for r in outcome.records}
    assert len(found) == 6
    assert found["swap", "thaw", "page-locked"].bytes == 4 * (64 + 8)
    assert found["park", "thaw", "driver"].extra["left"] == [1.0, 1.0]
    assert found["wake", "thaw", "driver"].verified and not found["wake", "vllm", "sleep-1"].verified
    assert found["park", "vllm", "sleep-1"].bytes == 0
    swapped = next(r for r in outcome.records if r.work == "swap")
    assert swapped.extra["phases"] == {"fill": [0.3, 0.3], "total": [0.4, 0.4]} and swapped.extra["start"] == "eager"


def test_parked_without_the_driver_is_another_route(settings: swap.Settings, monkeypatch: pytest.MonkeyPatch):
    answer = child()
    answer["park"]["reports"] = [{"seconds": {}, "driver": False, "why": "not as root"}] * 2
    outcome, _ = measured(settings, answer, monkeypatch)
    routes = {(r.work, r.route): r.extra.get("why") for r in outcome.records if r.system == "thaw"}
    assert routes["park", "sleep mode"] == routes["wake", "sleep mode"] == "not as root"


def test_what_was_not_measured_is_no_line(settings: swap.Settings, monkeypatch: pytest.MonkeyPatch):
    outcome, _ = measured(settings, {"swap": child()["swap"] | {"equal": None}}, monkeypatch)
    assert [(r.work, r.equal) for r in outcome.records] == [("swap", None)]


def test_the_same_snapshot_twice_is_refused(settings: swap.Settings, tmp_path: Path):
    (tmp_path / "b.thaw").write_bytes((tmp_path / "a.thaw").read_bytes())
    with pytest.raises(UsageError, match="hold the same"):
        swap.measure(settings, lambda _: None)


def test_what_is_not_there(settings: swap.Settings, tmp_path: Path):
    (tmp_path / "b.thaw").unlink()
    with pytest.raises(StorageError, match=r"b\.thaw"):
        swap.measure(settings, lambda _: None)
