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
    small = tmp_path / "small.thaw"
    load(directory, **thaw_args(small, mode="freeze", compress=True))
    compressed = load(directory, **thaw_args(small))
    assert compressed.raw == default.raw and small.stat().st_size < snapshot.stat().st_size
    assert compressed.processed() == default.processed()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_checkpoint_without_a_snapshot_is_streamed(kind: str, checkpoints: Callable, load: Callable):
    if kind == "int8" and not (torch.cuda.is_available() or hasattr(torch.ops._C, "release_dnnl_matmul_handler")):
        pytest.skip("this vLLM's int8 kernels are not loaded")
    from thaw_vllm.engines.vllm import loader
    from thaw_vllm.weights.stream import StreamReport

    default = load(checkpoints(kind))
    streamed = load(checkpoints(kind), load_format="thaw")
    assert isinstance(loader.last_report, StreamReport) and loader.last_report.tensors
    assert loader.last_report.seconds["total"] > 0  # as in every other report
    assert streamed.raw == default.raw
    assert streamed.processed() == default.processed()


def test_what_cannot_be_streamed_is_left_to_vllm(checkpoints: Callable, load: Callable, tmp_path: Path):
    from thaw_vllm.engines.vllm import loader

    directory = checkpoints("untied")
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path, load_format="thaw")
    assert loader.last_report is None
    assert loaded.raw == load(directory).raw
