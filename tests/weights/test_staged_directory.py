"""Where ``to_checkpoint`` writes, and what is there afterwards when it cannot."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.transport.calls import Calls, in_child

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, ExistsError, SpaceError, StorageError, UsageError
from thaw_vllm.transport.swap import swap
from thaw_vllm.weights import staged_directory
from thaw_vllm.weights.convert import from_checkpoint, to_checkpoint

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def snapshot(tmp_path):
    freeze_model(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)]), tmp_path / "model.thaw")
    return tmp_path / "model.thaw"


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def place(tmp_path):
    """A directory of its own, so that everything left behind shows."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def two_steps(monkeypatch):
    """A file system that cannot swap two names."""
    monkeypatch.setattr(staged_directory, "swap", lambda first, second: False)


@pytest.fixture(params=["in one step", "in two"])
def route(request, tmp_path):
    """How one directory replaces another."""
    if request.param == "in two":
        request.getfixturevalue("two_steps")
    else:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        if not swap(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system cannot swap two names")
    return request.param


def test_empty_directory(snapshot, place):
    (place / "out").mkdir()
    to_checkpoint(snapshot, place / "out")
    assert (place / "out" / "model.safetensors").exists() and listing(place) == ["out"]


def test_exists(snapshot, place):
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text("mine")
    with pytest.raises(ExistsError, match="not empty; use --force"):
        to_checkpoint(snapshot, place / "out")
    assert (place / "out" / "config.json").read_text() == "mine" and listing(place) == ["out"]


def test_force_replaces_a_checkpoint_whole(snapshot, place, route):
    to_checkpoint(snapshot, place / "out", shard_size=100)
    assert len(listing(place / "out")) == 6
    to_checkpoint(snapshot, place / "out", force=True)
    assert len(list((place / "out").glob("*.safetensors"))) == 1
    assert not (place / "out" / "model.safetensors.index.json").exists()
    assert listing(place) == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "weights.thaw", "sub"])
def test_force_loses_nothing_of_others(snapshot, place, name):
    to_checkpoint(snapshot, place / "out")
    if name == "sub":
        (place / "out" / name).mkdir()
    else:
        (place / "out" / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name}.*would be lost"):
        to_checkpoint(snapshot, place / "out", force=True)
    assert name in listing(place / "out") and listing(place) == ["out"]


def test_file(snapshot, place):
    (place / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file; name a directory"):
        to_checkpoint(snapshot, place / "out", force=True)
    assert (place / "out").read_text() == "mine"


def test_mount_point(snapshot):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("nothing is mounted at /dev/shm")
    before = listing(Path("/dev/shm"))
    with pytest.raises(UsageError, match="mount point, which cannot be replaced"):
        to_checkpoint(snapshot, "/dev/shm", force=True)
    assert listing(Path("/dev/shm")) == before


def test_links_in_a_circle(snapshot, place):
    (place / "out").symlink_to("out")
    with pytest.raises(UsageError, match="is a file; name a directory"):
        to_checkpoint(snapshot, place / "out")
    with pytest.raises(UsageError, match="not a model directory"):
        from_checkpoint(place / "out", place / "w.thaw")


def test_no_parent(snapshot, place):
    with pytest.raises(StorageError, match="make it first"):
        to_checkpoint(snapshot, place / "a" / "b")


def test_link_to_a_directory_stays_a_link(snapshot, place):
    (place / "real").mkdir()
    (place / "out").symlink_to("real")
    to_checkpoint(snapshot, place / "out")
    assert (place / "out").is_symlink() and (place / "real" / "model.safetensors").exists()


def test_permissions_follow_the_umask(snapshot, place):
    old = os.umask(0o027)
    try:
        to_checkpoint(snapshot, place / "out")
    finally:
        os.umask(old)
    assert (place / "out").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (place / "out").iterdir()} == {0o640}


def test_no_room(snapshot, place, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(staged_directory.shutil, "disk_usage", lambda p: real(p)._replace(free=10))
    with pytest.raises(SpaceError, match="make room"):
        to_checkpoint(snapshot, place / "out")
    assert listing(place) == []


@pytest.mark.parametrize("force", [False, True])
def test_disk_fills_up(snapshot, place, monkeypatch, force):
    if force:
        to_checkpoint(snapshot, place / "out")
    before = contents(place / "out") if force else None

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SpaceError, match=r"out/model\.safetensors.*untouched"):
        to_checkpoint(snapshot, place / "out", force=force)
    monkeypatch.undo()
    assert listing(place) == (["out"] if force else [])
    assert not force or contents(place / "out") == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1])
def test_rename_that_fails_brings_the_old_one_back(snapshot, place, monkeypatch, two_steps, at, error):
    to_checkpoint(snapshot, place / "out")
    (place / "out" / "config.json").write_text("old")
    real, calls = os.rename, []

    def rename(source, target):
        if os.path.isdir(source):
            calls.append(source)
            if len(calls) == at + 1:
                raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        to_checkpoint(snapshot, place / "out", force=True)
    assert (place / "out" / "config.json").read_text() == "old"
    assert listing(place) == ["out"]


def test_directory_that_appears_meanwhile(snapshot, place):
    def appear(*_):
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / "mine.txt").touch()

    with pytest.raises(ExistsError):
        to_checkpoint(snapshot, place / "out", progress=appear)
    assert listing(place / "out") == ["mine.txt"] and listing(place) == ["out"]


def test_killed_writer_leaves_nothing_for_long(snapshot, place):
    code = f"""
import os, signal
from thaw_vllm.weights.convert import to_checkpoint
to_checkpoint({str(snapshot)!r}, {str(place / "out")!r}, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = listing(place)
    assert left.startswith(".out.") and left.endswith(".thaw-part")
    to_checkpoint(snapshot, place / "out")
    assert listing(place) == ["out"]


STEPS = [(os, "rename"), (shutil, "rmtree"), (staged_directory, "swap")]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_publishing(snapshot, tmp_path, route, moment):
    """The old directory or the new one, whole, at the latest when the next writer has begun, even if that one fails."""
    damaged = tmp_path / "damaged.thaw"
    data = bytearray(snapshot.read_bytes())
    data[-4096] ^= 1
    damaged.write_bytes(data)

    def replace(out, number):
        Calls(pytest.MonkeyPatch(), number, moment, lambda: os._exit(9), calls=STEPS)
        to_checkpoint(snapshot, out, force=True, workers=1)

    steps, seen = 0, set()
    while True:
        out = tmp_path / f"place{steps}" / "out"
        out.parent.mkdir()
        to_checkpoint(snapshot, out, shard_size=100)
        old = contents(out)
        status = in_child(lambda out=out, number=steps: replace(out, number))
        if not status:
            break
        assert status == 9
        missing = not out.exists()
        with pytest.raises(CorruptionError):
            to_checkpoint(damaged, out, force=True)
        assert contents(out) == old or list(contents(out)) == ["model.safetensors"], steps
        assert listing(out.parent) == ["out"], steps
        seen.add((contents(out) == old, missing))
        steps += 1
    assert (False, False) in seen and ((True, True) in seen) == (route == "in two")


@pytest.mark.parametrize("force", [False, True])
def test_other_writer_while_the_old_one_is_aside(snapshot, place, monkeypatch, two_steps, force):
    """It takes the place; the first one says so, and nothing of any of the three is left beside it."""
    to_checkpoint(snapshot, place / "out", shard_size=100)
    real = os.rename

    def rename(source, target):
        real(source, target)
        if source == place / "out":
            monkeypatch.setattr(os, "rename", real)
            to_checkpoint(snapshot, place / "out", force=force)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ExistsError, match=r"out' appeared while it was being written; run it again"):
        to_checkpoint(snapshot, place / "out", shard_size=200, force=True)
    assert listing(place / "out") == ["model.safetensors"] and listing(place) == ["out"]


def test_what_was_left_aside_beside_its_successor_goes(snapshot, place):
    to_checkpoint(snapshot, place / "out")
    for name in (".out.00000000.thaw-old", ".out.v2.00000000.thaw-old", ".out.v2.00000000.thaw-part"):
        (place / name).mkdir()
    to_checkpoint(snapshot, place / "out", force=True)
    assert listing(place) == [".out.v2.00000000.thaw-old", ".out.v2.00000000.thaw-part", "out"]


@pytest.mark.parametrize("until", ["open", "flock"])
def test_taken_for_stale_before_it_was_locked(snapshot, place, monkeypatch, until):
    """Another writer removes the directory between our making and our locking it; then it is made again."""
    module = {"open": os, "flock": fcntl}[until]
    real, made = getattr(module, until), []

    def call(what, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{what}") if until == "flock" else str(what)
        if not made and path.endswith(".thaw-part"):
            made.append(path)
            to_checkpoint(snapshot, place / "out")
            shutil.rmtree(place / "out")
        return real(what, *arguments, **options)

    monkeypatch.setattr(module, until, call)
    to_checkpoint(snapshot, place / "out")
    assert len(made) == 1 and listing(place) == ["out"] and listing(place / "out") == ["model.safetensors"]


def test_writer_beside_us_is_left_alone(snapshot, place):
    def second(*_):
        if not (place / "out").exists():
            to_checkpoint(snapshot, place / "out")

    with pytest.raises(ExistsError):
        to_checkpoint(snapshot, place / "out", workers=1, progress=second)
    assert contents(place / "out") and listing(place) == ["out"]
