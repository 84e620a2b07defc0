"""The command in this process, as in tests/cli; small results to make a page of."""

import json
import os
from functools import partial
from unittest import mock

import pytest
from tests.cli.conftest import Ran

from thaw_vllm.bench import kv
from thaw_vllm.bench.process import Child
from thaw_vllm.cli.main import main


@pytest.fixture
def thaw(capfd, tmp_path, monkeypatch):
    """``thaw("bench", "limits")`` in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def cpu(monkeypatch):
    """As on a machine without a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def in_place_of_engines(monkeypatch, cpu):
    """``in_place_of_engines(module, found)`` has a benchmark's module ask ``found``, which is given back."""

    def use(module, found):
        monkeypatch.setattr(module, "run", found)
        return found

    monkeypatch.setattr("thaw_vllm.engines.vllm.api.require_vllm_installed", lambda: None)
    monkeypatch.setattr(kv, "open_checkpoint", lambda path: path)
    monkeypatch.setattr(kv, "checkpoint_id", lambda checkpoint: "tensors-blake3:" + "ab" * 32)
    return use


@pytest.fixture
def forked_engines(monkeypatch):
    """Real engines of ``thaw bench kv`` and ``thaw bench fork``, in forks of the tests' zygote."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # before a zygote is started, and before its variables are noted
    from tests.engines.vllm import forks

    monkeypatch.setattr(kv, "Child", partial(Child, command=forks.benchmark()))
    with mock.patch.dict(os.environ, forks.environment(), clear=True):  # an engine of this process leaves variables
        yield


@pytest.fixture
def model(tmp_path):
    """The config of a model; its weights are never read."""
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text(json.dumps({"vocab_size": 5000, "max_position_embeddings": 4096}))
    (tmp_path / "M" / "tokenizer.json").write_text("{}")
    (tmp_path / "files").mkdir()
    return tmp_path / "M"
