"""Everything here needs a CUDA device; elsewhere it is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from thaw_vllm.engines.vllm.fresh import READ_FROM_THE_LOG
from thaw_vllm.zygote import client
from thaw_vllm.zygote.place import Place, place
from thaw_vllm.zygote.start import start

if find_spec("vllm") is not None:
    from tests.engines.vllm.conftest import checkpoints, load, thaw_args, vllm_process

    __all__ = ["checkpoints", "load", "thaw_args", "vllm_process"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One of a module's own, and an environment in which it takes programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_ZYGOTE_DIR", str(tmp_path_factory.mktemp("zygote")))
        os.chmod(os.environ["THAW_ZYGOTE_DIR"], 0o700)
        for name, value in READ_FROM_THE_LOG.items():
            patch.setenv(name, value)
        start(place(), imports=[], models=[])
        yield place()
        client.ask(place(), "stop")
