"""Every tensor equal: vLLM's default loading, loading while freezing, and thawing, before and after post-processing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engines.vllm.models import KINDS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_tensor_is_equal(kind: str, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path):
    if kind == "int8" and not (torch.cuda.is_available() or hasattr(torch.ops._C, "release_dnnl_matmul_handler")):
        pytest.skip("this vLLM's int8 kernels are not loaded")
    directory, snapshot = checkpoints(kind), tmp_path / "weights.thaw"
    default = load(directory)
    frozen = load(directory, **thaw_args(snapshot, mode="freeze"))
    thawed = load(directory, **thaw_args(snapshot))
    assert default.raw, "the raw stage was not recorded"
    assert frozen.raw == default.raw
    assert thawed.raw == default.raw
    assert thawed.processed() == default.processed()
