import pytest
import torch

from thaw_vllm import freeze_model, restore_model
from thaw_vllm.weights.waterfall import waterfall


def test_bars_follow_one_another():
    text = waterfall({"open": 1.0, "read": 2.0, "settle": 1.0, "total": 4.0}, width=8)
    assert text.splitlines() == [
        "open    ██          1.000 s   25%",
        "read      ████      2.000 s   50%",
        "settle        ██    1.000 s   25%",
    ]


@pytest.mark.parametrize("seconds", [{}, {"total": 1.0}, {"a": 0.0, "total": 0.0}, {"a": 1e-9, "b": 5.0, "total": 1.0}])
def test_odd_reports(seconds):
    lines = waterfall(seconds, width=5).splitlines()
    assert len(lines) == len(seconds.keys() - {"total"})
    assert all("█" in line for line in lines)


def test_every_report_has_one(tmp_path):
    model = torch.nn.Linear(3, 3)
    frozen = freeze_model(model, tmp_path / "w.thaw")
    thawed = restore_model(model, tmp_path / "w.thaw")
    assert [line.split()[0] for line in frozen.waterfall().splitlines()] == ["payload", "publish"]
    assert [line.split()[0] for line in thawed.waterfall().splitlines()] == [
        "choose",
        "open",
        "match",
        "plan",
        "read",
        "settle",
    ]
