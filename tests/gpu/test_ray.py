"""vLLM's Ray executor with GPUs; as on the CPU (tests/engines/vllm/test_ray.py), where nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("ray", reason="Ray is not installed")

from tests.engines.vllm.test_ray import two_ranks


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks(checkpoints: Callable, tmp_path: Path):
    two_ranks(checkpoints("tied"), tmp_path, "wordsum", gpu_memory_utilization=0.1)
