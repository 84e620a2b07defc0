"""Everything here needs a CUDA device; elsewhere it is skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("vllm") is not None:
    from tests.engines.vllm.conftest import checkpoints, load, thaw_args, vllm_process

    __all__ = ["checkpoints", "load", "thaw_args", "vllm_process"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
