"""An open file that workers of the same process borrow, and how many threads a freeze takes; no engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is not installed")
import torch

from thaw_vllm.engines.vllm.kv import lent, pages


def test_an_open_file_is_lent_meanwhile():
    opened = SimpleNamespace()
    with lent.lending(opened) as name, lent.lending(SimpleNamespace()) as other:
        assert lent.borrowed(name) is opened and name != other
        assert lent.borrowed("") is None
    assert lent.borrowed(name) is None
    with pytest.raises(KeyError), lent.lending(opened) as name:
        raise KeyError
    assert lent.borrowed(name) is None


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
