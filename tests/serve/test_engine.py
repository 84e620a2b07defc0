"""What a pool's engine knows of snapshots: named ones, and those that it has found or made itself."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from thaw_vllm.errors import ThawError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.serve.config import Model
from thaw_vllm.serve.engine import Runtime, ServerEngine
from thaw_vllm.serve.resident import BusyEngineError, RefusedError
from thaw_vllm.weights import cache
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot


@pytest.fixture
def runtime(tmp_path):
    return Runtime(tmp_path, tmp_path, gpu=True)


@pytest.fixture
def engine(runtime, monkeypatch):
    """``engine(model, answer)``: one whose server answers so; what it was asked is in ``asked``."""

    def make(model, answer=(200, {"parked": False})):
        made = ServerEngine(model, runtime)
        made.asked = []

        async def ask(what, body=None):
            named = json.loads(body) if body else None
            made.asked.append((what, named))
            if named and "name" in named:
                made.target = os.path.realpath(made._snapshots / named["name"])
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(made, "ask", ask)
        made._snapshots.mkdir()
        return made

    return make


def kept(tmp_path, name):
    """A snapshot of the cache, and the directory of its model."""
    directory = tmp_path / name
    directory.mkdir()
    save_file({"a": torch.ones(3)}, directory / "model.safetensors")
    origin = {"directory": str(directory), "files": cache.stamp(open_checkpoint(directory))}
    header = Header(Identity(stage="checkpoint"), source={cache.ORIGIN: origin})
    path = tmp_path / f"{name}.thaw"
    write_snapshot(path, header, capture([("a", "parameter", torch.ones(2))]), FreezeOptions())
    return path, directory


A, B, NAMED = Model("a", "m/a"), Model("b", "m/b"), Model("c", "m/c", snapshot="/c.thaw")


def learn(engine):
    asyncio.run(engine._learn())


def test_a_named_snapshot_is_known(engine):
    one = engine(NAMED)
    learn(one)
    assert one.asked == [] and one.parks() and one.swaps(NAMED) and not one.swaps(A)


def test_one_that_was_found_is_known_from_then_on(engine, runtime):
    one, other = engine(A, (200, {"snapshot": "/cache/a.thaw"})), engine(NAMED)
    assert not one.parks() and not one.swaps(NAMED) and not other.swaps(A)
    learn(one)
    learn(other)
    assert one.asked == [("engine/state", None)] and runtime.known == {"a": "/cache/a.thaw"}
    assert one.parks() and one.swaps(NAMED) and other.swaps(A) and not other.swaps(B)
    assert not other.swaps(Model("a", "m/a", args=("--x",)))


@pytest.mark.parametrize("answer", [(200, {"snapshot": None}), (403, {"error": {}}), ThawError("gone")])
def test_there_may_be_none(engine, runtime, answer):
    runtime.known["a"] = "/cache/old.thaw"
    one = engine(A, answer)
    learn(one)
    assert one.snapshot is None and not one.parks() and not one.swaps(NAMED)


def test_it_is_swapped_to_the_file_that_is_known(engine, runtime, tmp_path):
    path, directory = kept(tmp_path, "b")
    runtime.known["b"], model = str(path), Model("b", str(directory))
    one = engine(NAMED)
    asyncio.run(one.swap(model))
    assert one.asked[0][0] == "engine/swap" and one.target == str(path)
    assert one.model is model and one.snapshot == str(path)
    assert list(one._snapshots.iterdir()) == []
    one = engine(NAMED)
    os.utime(directory / "model.safetensors", (1, 1))
    with pytest.raises(RefusedError, match="are others"):
        asyncio.run(one.swap(model))
    assert one.asked == [] and one.model is NAMED and not one.swaps(model)
    runtime.known["b"] = str(tmp_path / "evicted.thaw")
    with pytest.raises(RefusedError, match="no use"):
        asyncio.run(one.swap(model))


@pytest.mark.parametrize(
    ("status", "kind", "raised", "again"),
    [
        (409, "BusyError", BusyEngineError, True),
        (409, "MismatchError", RefusedError, True),
        (501, "UnsupportedError", RefusedError, False),
        (500, "ThawError", ThawError, True),
    ],
)
def test_a_swap_that_is_refused(engine, tmp_path, status, kind, raised, again):
    """Who is busy says nothing of other times, and other models."""
    one = engine(NAMED, (status, {"error": {"type": kind, "message": "why"}}))
    learn(one)
    with pytest.raises(ThawError, match="why") as found:
        asyncio.run(one.swap(Model("d", "m/d", snapshot=str(tmp_path / "d.thaw"))))
    assert type(found.value) is raised and one.swaps(NAMED) == again
