"""The directory of kept snapshots: keys, locks, how much fits, what goes first, and what is stale."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thaw_vllm.errors import StorageError, UsageError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.transport.writer import StagedFile
from thaw_vllm.weights import cache
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot

pytestmark = pytest.mark.usefixtures("no_leaks")

A, B, C, D = ("0123456789ab" + letter * 12 for letter in "abcd")


@pytest.fixture
def place(tmp_path):
    found = tmp_path / "snapshots"
    cache.private(found)
    return found


@pytest.fixture
def keep(place):
    """``keep(key, size, used)``: files of a key, last used then."""

    def make(key, size, used, *ends):
        for end in ends or (".thaw",):
            (place / (key + end)).write_bytes(bytes(size))
            os.utime(place / (key + end), (used, used))
        lock = place / f"{key}.lock"
        lock.touch()
        os.utime(lock, (used, used))

    return make


def keys(place):
    return [entry.key for entry in cache.entries(place)]


@pytest.fixture
def disk(monkeypatch):
    """``disk(total, free)`` in bytes."""

    def make(total, free):
        status = types.SimpleNamespace(f_blocks=total, f_bavail=free, f_frsize=1)
        monkeypatch.setattr(cache.os, "statvfs", lambda _: status)

    return make


def test_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "a"))
    assert cache.snapshots_directory() == tmp_path / "a" / "snapshots"
    assert cache.snapshots_directory(tmp_path / "b") == tmp_path / "b" / "snapshots"
    monkeypatch.delenv("THAW_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.snapshots_directory() == tmp_path / "thaw" / "snapshots"
    monkeypatch.chdir(tmp_path)
    assert cache.snapshots_directory("c") == tmp_path / "c" / "snapshots"


def test_it_is_private(tmp_path):
    place = tmp_path / "a" / "b"
    cache.private(place)
    cache.private(place)
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o770)
    with pytest.raises(StorageError, match="others may write"):
        cache.private(place)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be made"):
        cache.private(tmp_path / "file" / "b")


@pytest.mark.parametrize(("given", "variable", "found"), [(None, "", None), (None, "1.5", 1.5e9), (0, "7", 0)])
def test_the_limit(monkeypatch, given, variable, found):
    monkeypatch.setenv("THAW_CACHE_GB", variable)
    assert cache.limit(given) == found


@pytest.mark.parametrize("variable", ["x", "-1", "nan", "inf"])
def test_a_limit_that_is_none(monkeypatch, variable):
    monkeypatch.setenv("THAW_CACHE_GB", variable)
    with pytest.raises(UsageError, match="THAW_CACHE_GB"):
        cache.limit(None)


@pytest.mark.parametrize("rank", ["rank1", "pp1-tp0", "dp1-pp0-tp1"])
def test_entries(place, keep, rank):
    keep(A, 10, 300, ".thaw", f".0123456789ab.{rank}.thaw")
    keep(B, 5, 100)
    (place / f"{A}.{rank}.thaw").symlink_to(f"{A}.0123456789ab.{rank}.thaw")
    for other in ("notes.txt", f"{A}.thaw.bak", f".{A}.thaw.01234567.thaw-part", "x.thaw", f"{A}.{rank}.thaw.x"):
        (place / other).write_bytes(b"other")
    (place / f"{C}.thaw").mkdir()
    found = cache.entries(place)
    assert [(e.key, e.bytes, e.made, e.used) for e in found] == [(B, 5, 100, 100), (A, 20, 300, 300)]
    cache.discard(found[1])
    assert keys(place) == [B] and not os.path.lexists(place / f"{A}.{rank}.thaw")
    assert cache.entries(place / "none") == []


def test_the_use_is_noted(place, keep):
    keep(A, 1, 100)
    keep(B, 1, 200)
    lock = cache.Lock(place, A)
    assert lock.share()
    lock.used()
    lock.release()
    assert keys(place) == [B, A]


def test_locks(place):
    one, other, third = (cache.Lock(place, A) for _ in range(3))
    assert one.share() and other.share() and not third.alone()
    one.release()
    assert other.alone() and not one.share() and not one.alone()
    assert other.share() and one.share()  # from one to the other, without letting go
    other.release()
    assert one.alone()
    cache.discard(cache.Entry(A, place / f"{A}.thaw", (), 0, None, 0.0))
    assert third.alone()  # of another file by now
    one.release()
    third.release()


def test_a_lock_ends_with_its_process(place, keep):
    keep(A, 1, 100)
    code = "import sys, pathlib, thaw_vllm.weights.cache as c; l = c.Lock(pathlib.Path(sys.argv[1]), sys.argv[2])"
    code += "; print(l.share(), flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(place), A], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "True\n"
        (entry,) = cache.entries(place)
        assert cache.in_use(entry) and not cache.discard_unused(entry)
        child.kill()
        child.wait()
        assert not cache.in_use(entry) and cache.discard_unused(entry) and keys(place) == []
    finally:
        child.kill()
        child.communicate()


def test_what_fits_stays(place, keep, disk):
    keep(A, 10, 100)
    disk(1000, 1000)
    assert cache.make_room(place, D, 190, None) is None and keys(place) == [A]
    assert cache.make_room(place, D, 90, 100) is None and keys(place) == [A]


def test_the_one_used_longest_ago_goes_first(place, keep, disk):
    for key, used in ((A, 200), (B, 100), (C, 300)):
        keep(key, 10, used)
    disk(1000, 1000)
    assert cache.make_room(place, D, 10, 30) is None
    assert keys(place) == [A, C] and not (place / f"{B}.lock").exists()
    assert cache.make_room(place, D, 10, 20) is None and keys(place) == [C]


def test_the_stale_go_before(place, keep, disk):
    for key, used in ((A, 100), (B, 200), (C, 300)):
        keep(key, 10, used)
    disk(1000, 1000)
    assert cache.make_room(place, D, 10, 30, lambda entry: entry.key == C) is None
    assert keys(place) == [A, B]


def test_what_killed_freezes_left_goes_anyway(place, keep, disk):
    keep(A, 10, 100, ".0123456789ab.rank1.thaw")
    keep(B, 10, 200)
    part = place / f".{C}.thaw.01234567.thaw-part"
    part.write_bytes(b"part")
    disk(1000, 1000)
    with StagedFile(place / f"{D}.thaw", 5) as living:
        assert cache.make_room(place, D, 10, 100) is None
        assert living.path.exists()
    assert keys(place) == [B] and not part.exists()


def test_what_is_in_use_stays(place, keep, disk):
    keep(A, 10, 100)
    keep(B, 10, 200)
    disk(1000, 1000)
    lock = cache.Lock(place, A)
    assert lock.share()
    assert cache.make_room(place, D, 10, 20) is None and keys(place) == [A]
    assert "engines use" in cache.make_room(place, D, 10, 10) and keys(place) == [A]
    lock.release()
    assert cache.make_room(place, D, 10, 10) is None and keys(place) == []


def test_nothing_goes_in_vain(place, keep, disk):
    keep(A, 10, 100)
    disk(1000, 1000)
    assert "may hold" in cache.make_room(place, D, 201, None) and keys(place) == [A]
    assert "as you chose" in cache.make_room(place, D, 11, 10) and keys(place) == [A]
    disk(1000, 100)  # a tenth stays free
    assert "left free" in cache.make_room(place, D, 11, None) and keys(place) == [A]
    assert cache.make_room(place, D, 10, None) is None and keys(place) == []
    disk(1000, 5)
    assert "5 GB free" not in cache.make_room(place, D, 6, 500)
    assert cache.make_room(place, D, 5, 500) is None


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": torch.ones(3)}, directory / "model.safetensors")
    return directory


def test_stamps(model, tmp_path):
    first = cache.stamp(open_checkpoint(model))
    assert first == cache.stamp(open_checkpoint(model)) and first[0][:2] == ["model.safetensors", 76 + 0]
    os.utime(model / "model.safetensors", (1, 1))
    assert cache.stamp(open_checkpoint(model)) != first
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    blob = (model / "model.safetensors").rename(blobs / ("ab" * 32))
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    found = cache.stamp(open_checkpoint(snapshot))
    assert found[0][2] == blob.name
    os.utime(blob, (2, 2))  # as when it is fetched once more
    assert cache.stamp(open_checkpoint(snapshot)) == found


def snapshot_of(model, place, key=A, **origin):
    made = {"directory": str(model), "files": cache.stamp(open_checkpoint(model))} | origin
    header = Header(Identity(stage="checkpoint"), source={cache.ORIGIN: made})
    options = FreezeOptions()
    write_snapshot(place / f"{key}.thaw", header, capture([("a", "parameter", torch.ones(2))]), options)
    return cache.entries(place)


def test_what_is_stale(model, place):
    found = snapshot_of(model, place)
    ((_, header),) = cache.headers(found)
    assert cache.stale(header) is None
    os.utime(model / "model.safetensors", (1, 1))
    assert "changed" in cache.stale(header)
    (model / "model.safetensors").write_bytes(b"none")
    assert "damaged" in cache.stale(header)
    (model / "model.safetensors").unlink()
    assert "gone" in cache.stale(header)
    model.rmdir()
    assert cache.stale(header) == "the model directory is gone"
    assert "does not say" in cache.stale(Header(Identity(stage="checkpoint"), source={cache.ORIGIN: []}))


def test_headers_that_cannot_be_read(place, keep):
    keep(A, 10, 100)
    keep(B, 10, 200, ".0123456789ab.rank1.thaw")
    found = dict(cache.headers(cache.entries(place)))
    assert [type(wrong).__name__ for wrong in found.values()] == ["FormatError", "StorageError"]


def test_a_file_system_without_locks(place, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache.fcntl, "flock", none)
    with pytest.raises(StorageError, match="cannot be locked"):
        cache.Lock(place, A).share()
    assert Path(place).exists()
