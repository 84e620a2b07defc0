"""``thaw cache``: what it shows, removes, and keeps."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.weights import cache
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot

KEYS = {"first": "a" * 24, "second": "ab" + "0" * 22, "gone": "c" * 24}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Snapshots of three models, one of which is gone by now."""
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    found = cache.snapshots_directory()
    cache.private(found)
    for used, (name, key) in enumerate(KEYS.items(), 1_700_000_000):
        directory = tmp_path / name
        directory.mkdir()
        save_file({"a": torch.ones(3)}, directory / "model.safetensors")
        origin = {"directory": str(directory), "files": cache.stamp(open_checkpoint(directory))}
        identity = Identity(stage="checkpoint", engine_version="0.32.0")
        header = Header(identity, source={cache.ORIGIN: origin}, metadata={"model": name})
        tensors = capture([("a", "parameter", torch.ones(2))])
        write_snapshot(found / f"{key}.thaw", header, tensors, FreezeOptions())
        for end in ("thaw", "lock"):
            (found / f"{key}.{end}").touch()
            os.utime(found / f"{key}.{end}", (used, used))
    (tmp_path / "gone" / "model.safetensors").unlink()
    (tmp_path / "gone").rmdir()
    return found


def left(place):
    return {entry.key for entry in cache.entries(place)}


def test_a_list(thaw, place, tmp_path):
    ran = thaw("cache", "ls", "--json")
    assert ran.code == 0 and ran.err == ""
    found = ran.document
    assert found["directory"] == str(place) and [one["model"] for one in found["snapshots"]] == [*KEYS][::-1]
    gone, *others = found["snapshots"]
    assert gone["stale"] == "the model directory is gone" and [one["stale"] for one in others] == [None, None]
    second = others[0]
    path = place / f"{KEYS['second']}.thaw"
    assert second == {
        "key": KEYS["second"],
        "path": str(path),
        "bytes": path.stat().st_size,
        "made": 1_700_000_001,
        "used": 1_700_000_001,
        "model": "second",
        "directory": str(tmp_path / "second"),
        "vllm": "0.32.0",
        "stale": None,
        "in_use": False,
    }
    assert found["bytes"] == 3 * second["bytes"]


def test_a_table(thaw, place):
    lock = cache.Lock(place, KEYS["first"])
    assert lock.share()
    (place / "b.txt").touch()
    (place / ("d" * 24 + ".thaw")).write_bytes(b"\x1b[2J")
    lines = thaw("cache", "ls").out.splitlines()
    lock.release()
    assert lines[0].split() == ["KEY", "SIZE", "MADE", "LAST", "USED", "MODEL", "STATE"]
    assert any(
        line.startswith("aaaaaaaaaaaa ") and line.split()[-4:] == ["first", "valid,", "in", "use"] for line in lines
    )
    assert any("gone" in line and "stale: the model directory is gone" in line for line in lines)
    assert any("dddddddddddd" in line and "cannot be read" in line and "\x1b" not in line for line in lines)
    assert lines[-1].endswith(str(place))


def test_nothing(thaw, tmp_path):
    ran = thaw("cache", "ls", "--cache-dir", tmp_path / "none")
    assert ran.code == 0 and ran.out == f"no snapshots in {tmp_path / 'none' / 'snapshots'}\n"
    assert thaw("cache", "rm", "--all", "--cache-dir", tmp_path / "none").code == 0
    assert not (tmp_path / "none").exists()


def test_removed_by_their_keys(thaw, place):
    ran = thaw("cache", "rm", "aaa", "c")
    assert ran.code == 0 and ran.out.startswith("removed 2 snapshots, ")
    assert left(place) == {KEYS["second"]} and len(list(place.iterdir())) == 2


@pytest.mark.parametrize(("words", "said"), [(["a"], "2 snapshots have keys"), (["x"], "no snapshot"), ([""], "no s")])
def test_keys_that_are_none(thaw, place, words, said):
    ran = thaw("cache", "rm", *words)
    assert ran.code == 2 and said in ran.err and len(left(place)) == 3


@pytest.mark.parametrize("words", [[], ["--stale", "--all"], ["aaa", "--all"]])
def test_what_to_remove_is_said_once(thaw, place, words):
    ran = thaw("cache", "rm", *words)
    assert ran.code == 2 and "give keys" in ran.err and len(left(place)) == 3


def test_the_stale_ones_are_removed(thaw, place):
    part = place / f".{KEYS['first']}.thaw.01234567.thaw-part"
    part.touch()
    ran = thaw("cache", "rm", "--stale", "--json")
    assert ran.document == {"removed": [KEYS["gone"]], "in_use": []}
    assert left(place) == {KEYS["first"], KEYS["second"]} and not part.exists()


@pytest.mark.parametrize("words", [["--all"], list(KEYS.values())])
def test_what_is_in_use_is_kept(thaw, place, words):
    lock = cache.Lock(place, KEYS["second"])
    assert lock.share()
    ran = thaw("cache", "rm", *words, "--json")
    assert ran.code == 6 and "in use, and kept: ab0000000000" in ran.err
    assert json.loads(ran.out) == {"removed": [KEYS["first"], KEYS["gone"]], "in_use": [KEYS["second"]]}
    assert left(place) == {KEYS["second"]}
    lock.release()
    assert thaw("cache", "rm", *words[:1] if "--all" in words else [KEYS["second"]]).code == 0
    assert list(place.iterdir()) == []
