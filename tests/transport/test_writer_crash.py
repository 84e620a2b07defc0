"""A writer that is killed, or fails, at each of its calls to the system: the old file or the new one, never a part."""

import errno
import os

import pytest
from tests.transport.calls import Calls, in_child

from thaw_vllm.errors import StorageError
from thaw_vllm.transport.writer import StagedFile

pytestmark = pytest.mark.usefixtures("no_leaks")

OLD, NEW = b"old" * 1000, b"new" * 2000


def write(target, force):
    with StagedFile(target, len(NEW), force=force) as file:
        for at in range(0, len(NEW), 2500):
            file.write(at, NEW[at : at + 2500])
        file.publish()


def trace(tmp_path, force):
    """The names of the calls that one write makes, in order."""
    place = tmp_path / "trace"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        write(place / "w.thaw", force)
        return list(calls.names)


def test_trace_is_what_the_format_says(tmp_path):
    """Reserved, written, synced, named, and the name synced, in this order."""
    forced = trace(tmp_path, True)
    assert [n for n in forced if n not in ("close", "flock")] == [
        "open",
        "posix_fallocate",
        "pwrite",
        "pwrite",
        "pwrite",
        "fchmod",
        "fsync",
        "rename",
        "open",
        "fsync",
        "unlink",
    ]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_each_call(force, moment, tmp_path, parts):
    names = trace(tmp_path, force)
    named = names.index("rename" if force else "link")
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        place.mkdir()
        target = place / "w.thaw"
        if force:
            target.write_bytes(OLD)

        def work(number=number, target=target):
            Calls(pytest.MonkeyPatch(), number, moment, lambda: os._exit(9))
            write(target, force)

        assert in_child(work) == 9, name
        published = number > named or (number == named and moment == "after")
        expected = NEW if published else OLD if force else None
        assert (target.read_bytes() if target.exists() else None) == expected, (number, name)
        write(target, True)
        assert target.read_bytes() == NEW
        assert not parts(place), (number, name)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_failed_at_each_call(force, error, moment, tmp_path, parts, monkeypatch):
    """Whatever is raised: no part stays, and what is under the name is whole."""
    names = trace(tmp_path, force)

    def fail():
        raise error

    for number, name in enumerate(names):
        if moment == "after" and name == "open":
            continue  # the descriptor would be lost between the kernel and us, and with it what we know
        if name in ("unlink", "close"):
            continue  # of the clean-up itself; see below
        place = tmp_path / str(number)
        place.mkdir()
        target = place / "w.thaw"
        if force:
            target.write_bytes(OLD)
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, number, moment, fail)
            try:
                write(target, force)
                raised = None
            except (StorageError, KeyboardInterrupt, MemoryError) as caught:
                raised = caught
        found = target.read_bytes() if target.exists() else None
        assert found in (NEW, OLD if force else None), (number, name)
        assert raised is not None or found == NEW, (number, name)
        assert not parts(place), (number, name)


@pytest.mark.parametrize("name", ["unlink", "close"])
def test_failed_while_cleaning_up(name, tmp_path, parts):
    """What could not be removed is removed by the next writer."""
    names = trace(tmp_path, True)
    number = len(names) - 1 - names[::-1].index(name)
    target = tmp_path / "w.thaw"

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        Calls(patch, number, "after", fail)
        try:
            write(target, True)
        except OSError:
            assert name == "close"
    assert target.read_bytes() == NEW
    write(target, True)
    assert not parts(tmp_path)
