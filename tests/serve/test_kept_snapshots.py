"""A kept snapshot is swapped in only where a start of the model would load the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.serve.config import Model
from thaw_vllm.serve.kept_snapshots import outdated
from thaw_vllm.weights import cache
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.checkpoint import carried_files, open_checkpoint
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"w": torch.arange(8.0)}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def snapshot(model: Path, tmp_path: Path) -> str:
    origin = {"directory": str(model), "files": cache.stamp(open_checkpoint(model))}
    header = Header(Identity(stage="checkpoint"), source={cache.ORIGIN: origin})
    path = tmp_path / "kept.thaw"
    write_snapshot(
        str(path), header, capture([("w", "parameter", torch.arange(8.0))], carried_files(model)), FreezeOptions()
    )
    return str(path)


def asked(path: Path, snapshot: str, *args: str) -> str | None:
    return outdated(Model("m", str(path), args=args), (), snapshot)


def test_as_it_was(model: Path, snapshot: str):
    assert asked(model, snapshot) is None
    assert asked(model, snapshot, "--max-model-len", "9") is None


def test_of_a_copy_the_copy_counts(model: Path, snapshot: str, tmp_path: Path):
    """Whichever directory it was frozen from."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)  # with its times
    save_file({"w": torch.ones(8)}, model / "model.safetensors")
    assert "weight files" in str(asked(model, snapshot)) and asked(copy, snapshot) is None
    shutil.rmtree(model)
    assert asked(copy, snapshot) is None
    os.utime(copy / "model.safetensors", (1, 1))
    assert "weight files are others" in str(asked(copy, snapshot))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", '{"model_type": "llama", "rope_theta": 2}', "'config.json' is another"),
        ("tokenizer.json", "{ }", "'tokenizer.json' is another"),
        ("tokenizer.json", None, "'tokenizer.json' came or went"),
        ("chat_template.jinja", "{{ messages }}", "'chat_template.jinja' came or went"),
        ("generation_config.json", "", "'generation_config.json' came or went"),
    ],
)
def test_the_small_files_count(name: str, text: str | None, said: str, model: Path, snapshot: str):
    (model / name).unlink() if text is None else (model / name).write_text(text)
    assert said in str(asked(model, snapshot))


def test_what_cannot_be_held_against_it(model: Path, snapshot: str, tmp_path: Path):
    assert "--tokenizer is given" in str(asked(model, snapshot, "--tokenizer", "another"))
    assert "not here" in str(asked(tmp_path / "nowhere", snapshot))
    Path(snapshot).write_bytes(b"x")
    assert "kept.thaw" in str(asked(model, snapshot))
    assert "does not exist" in str(asked(model, snapshot + "x"))
