import errno
import fcntl
import glob
import os
import resource
import subprocess
import sys
import threading

import pytest

from thaw_vllm.errors import ExistsError, SpaceError, StorageError, ThawError, UsageError
from thaw_vllm.transport import writer
from thaw_vllm.transport.writer import StagedFile, check_target, remove_stale, staged

pytestmark = pytest.mark.usefixtures("no_leaks")

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def target(tmp_path):
    return tmp_path / "w.thaw"


@pytest.fixture
def old(target):
    target.write_bytes(OLD)
    return target


@pytest.fixture
def mounted(tmp_path):
    """``mounted(options)``: a small tmpfs, where this process may mount one."""
    places = []

    def mount(options):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        ran = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"cannot mount a tmpfs: {ran.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def write(target, data=NEW, **options):
    with StagedFile(target, len(data), **options) as file:
        file.write(0, data)
        file.publish()


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_nothing_has_the_name_until_it_is_published(target, parts):
    with StagedFile(target, 2 * len(NEW)) as file:
        for at in range(0, len(NEW), 7):
            file.write(at, memoryview(NEW)[at : at + 7])
        assert not target.exists()
        assert len(parts(target.parent)) == 1
        assert file.path.stat().st_mode & 0o777 == 0o600
        file.publish()
        assert target.read_bytes() == NEW + bytes(len(NEW))
    assert not parts(target.parent)


def test_left_without_publishing(old, parts):
    with StagedFile(old, 10, force=True) as file:
        file.write(0, b"0123456789")
    file.discard()
    assert old.read_bytes() == OLD
    assert not parts(old.parent)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o644, 0o660])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_mode_is_the_one_asked_for(target, mode, umask):
    before = os.umask(umask)
    try:
        write(target, mode=mode)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == mode


def test_private_unless_asked_otherwise(target):
    write(target)
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_target_that_exists(kind, target, parts):
    other = target.with_name("other")
    if kind == "file":
        target.write_bytes(OLD)
    else:
        target.symlink_to(other.name)
        if kind == "link":
            other.write_bytes(OLD)
    for refuse in (lambda: check_target(target, False), lambda: StagedFile(target, 1)):
        with pytest.raises(ExistsError, match=r"'.*w.thaw' exists; use --force \(force=True\) to replace it"):
            refuse()
    assert not parts(target.parent)
    write(target, force=True)
    assert target.read_bytes() == NEW
    assert not target.is_symlink()
    assert kind != "link" or other.read_bytes() == OLD


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("absent/w.thaw", StorageError, "the directory '.*absent' does not exist; make it first"),
        ("file/w.thaw", StorageError, "the directory '.*file' does not exist"),
        ("directory", UsageError, "is a directory; name a file in it"),
        ("directory/..", UsageError, "names no file"),
        ("x" * 256, StorageError, "File name too long"),
        ("x" * 250, StorageError, "File name too long"),
    ],
)
def test_target_that_cannot_be(place, error, words, tmp_path, parts):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "directory").mkdir()
    with pytest.raises(error, match=words):
        StagedFile(tmp_path / place, 1, force=True)
    assert not parts(tmp_path)


@pytest.mark.parametrize("place", ["", ".", "/", "w\0.thaw"])
def test_target_without_a_name(place):
    with pytest.raises(UsageError, match="names no file"):
        StagedFile(place, 1)


def test_directory_that_is_not_writable(old, monkeypatch, parts):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match=r"the directory '.*' is not writable"):
        write(old, force=True)
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", failing(errno.EACCES))  # the check can be wrong, for root on a network file system
    with pytest.raises(
        StorageError, match=r"cannot write '.*w.thaw': Permission denied; what was there before is unto"
    ):
        write(old, force=True)
    monkeypatch.undo()
    assert old.read_bytes() == OLD
    assert not parts(old.parent)


def test_directory_that_makes_no_files():
    with pytest.raises(StorageError):
        StagedFile("/proc/w.thaw", 1)


def test_media_that_is_read_only(mounted):
    place = mounted("size=1m")
    (place / "w.thaw").write_bytes(OLD)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with pytest.raises(StorageError, match="not writable"):
        write(place / "w.thaw", force=True)
    assert (place / "w.thaw").read_bytes() == OLD


def test_too_little_room_is_told_before_anything_is_written(old, parts):
    with pytest.raises(SpaceError, match=r"has .* GB free, 'w.thaw' needs 1000000000.00 GB; make room"):
        StagedFile(old, 10**18, force=True)
    assert old.read_bytes() == OLD
    assert not parts(old.parent)


@pytest.mark.parametrize("reserving", [True, False])
def test_disk_that_fills_up(mounted, reserving, monkeypatch, parts):
    place = mounted("size=1m")
    (place / "w.thaw").write_bytes(OLD)
    if not reserving:  # and somebody else takes the room meanwhile
        monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
        with StagedFile(place / "w.thaw", 900_000, force=True) as file:
            (place / "other").write_bytes(bytes(500_000))
            with pytest.raises(SpaceError, match=r"no room for '.*w.thaw': No space left on device; what was there"):
                for at in range(0, 900_000, 100_000):
                    file.write(at, b"x" * 100_000)
    else:
        monkeypatch.setattr(writer, "_free_bytes", lambda directory: 1 << 40)
        with pytest.raises(SpaceError, match="no room for"):
            StagedFile(place / "w.thaw", 2_000_000, force=True)
    assert (place / "w.thaw").read_bytes() == OLD
    assert not parts(place)


LIMITED = """
import os, resource, sys
from thaw_vllm.errors import SpaceError
from thaw_vllm.transport.writer import StagedFile
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
if sys.argv[2] == "written":
    def refuse(*_):
        raise OSError(95, "Operation not supported")
    os.posix_fallocate, os.ftruncate = refuse, lambda fd, size: None
try:
    with StagedFile(sys.argv[1], 6000, force=True) as file:
        file.write(0, b"x" * 6000)
        file.publish()
except SpaceError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("when", ["reserved", "written"])
def test_limit_on_the_size_of_files(old, when, parts):
    """As a quota does, it stops a write in the middle."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ran = subprocess.run([sys.executable, "-c", LIMITED, old, when], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("no room for ")
    assert "File too large; what was there before is untouched" in ran.stderr
    assert old.read_bytes() == OLD
    assert not parts(old.parent)


def test_file_system_that_cannot_reserve(target, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    write(target)
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_file_system_without_links(target, monkeypatch, code, parts):
    monkeypatch.setattr(os, "link", failing(code))
    write(target)
    assert target.read_bytes() == NEW
    with StagedFile(target.with_name("second"), 3) as file:
        file.target.write_bytes(OLD)
        with pytest.raises(ExistsError, match="appeared while it was being written; use force"):
            file.publish()
    assert file.target.read_bytes() == OLD
    assert not parts(target.parent)


def test_target_that_appears_meanwhile(target, parts):
    with StagedFile(target, len(NEW)) as file:
        file.write(0, NEW)
        target.write_bytes(OLD)
        with pytest.raises(ExistsError, match="appeared while it was being written; use force"):
            file.publish()
    assert target.read_bytes() == OLD
    assert not parts(target.parent)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_sync_that_fails_is_not_a_success(old, monkeypatch, code, parts):
    with StagedFile(old, len(NEW), force=True) as file:
        file.write(0, NEW)
        monkeypatch.setattr(os, "fsync", failing(code))
        with pytest.raises(SpaceError if code == errno.ENOSPC else StorageError, match="what was there before"):
            file.publish()
    assert old.read_bytes() == OLD
    assert not parts(old.parent)


@pytest.mark.parametrize("what", ["cannot be opened", "cannot be synced"])
def test_directory_that_cannot_be_synced_does_not_undo_a_success(old, monkeypatch, what, parts):
    """The new name is there by then: an error that speaks of the old file would be wrong."""
    with StagedFile(old, len(NEW), force=True) as file:
        file.write(0, NEW)
        if what == "cannot be opened":
            monkeypatch.setattr(os, "open", failing(errno.EACCES))
        else:
            then = iter([os.fsync, failing(errno.EINVAL)])
            monkeypatch.setattr(os, "fsync", lambda fd: next(then)(fd))
        file.publish()
    monkeypatch.undo()
    assert old.read_bytes() == NEW
    assert not parts(old.parent)


def test_file_that_cannot_be_removed_keeps_the_first_error(old, monkeypatch):
    with pytest.raises(RuntimeError, match="the first"), StagedFile(old, 1, force=True) as file:
        monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
        raise RuntimeError("the first")
    monkeypatch.undo()
    assert remove_stale(old.parent, old.name) == [file.path]


# --- what others left, and what they are still writing ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.thaw", "a[1].thaw", "*.thaw", "?", "[!a]", "w\n.thaw", "wörter 雪.thaw", "-f"])
def test_next_writer_removes_what_a_killed_one_left_of_the_same_target_alone(name, tmp_path):
    target = tmp_path / name
    left = [tmp_path / f".{name}.{token}.thaw-part" for token in ("00000000", "89abcdef")]
    others = [
        tmp_path / place
        for place in (f".x{name}.00000000.thaw-part", ".zz.00000000.thaw-part", f"{name}.00000000.thaw-part", "a1.thaw")
    ]
    for path in left + others:
        path.write_bytes(OLD)
    write(target)
    assert target.read_bytes() == NEW
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_what_a_writer_of_a_longer_name_left_stays(target, tmp_path):
    left = tmp_path / ".w.thaw.v2.00000000.thaw-part"
    left.write_bytes(OLD)
    write(target)
    assert left.read_bytes() == OLD


@pytest.mark.parametrize("force", [True, False])
def test_directory_of_the_process_changes_meanwhile(tmp_path, monkeypatch, parts, force):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with StagedFile("w.thaw", len(NEW), force=force) as file:
        file.write(0, NEW)
        os.chdir("elsewhere")
        file.publish()
    assert (tmp_path / "w.thaw").read_bytes() == NEW
    os.chdir(tmp_path)
    with StagedFile("v.thaw", 1, force=force):
        os.chdir("elsewhere")
    assert not parts(tmp_path) and not os.listdir(tmp_path / "elsewhere")


def test_living_writer_keeps_its_file(target):
    with StagedFile(target, len(NEW)) as first:
        first.write(0, NEW)
        assert staged(target.parent, target.name) == [first.path]
        assert remove_stale(target.parent, target.name) == []
        write(target, OLD)
        with pytest.raises(ExistsError):
            first.publish()
    assert target.read_bytes() == OLD


def test_stale_names_that_are_no_files_of_ours_stay(target, tmp_path):
    (tmp_path / ".w.thaw.00000000.thaw-part").mkdir()
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / ".w.thaw.00000001.thaw-part").symlink_to("precious")
    os.mkfifo(tmp_path / ".w.thaw.00000002.thaw-part")
    write(target)
    assert (tmp_path / ".w.thaw.00000000.thaw-part").is_dir()
    assert (tmp_path / "precious").read_bytes() == OLD


def test_taken_for_stale_before_it_was_locked(target, monkeypatch, parts):
    """The other writer holds the lock already, or has removed the file already; then it is made again."""
    flock, calls = fcntl.flock, []

    def lock(fd, operation):
        calls.append(fd)
        if len(calls) == 1:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        if len(calls) == 2:
            for path in target.parent.glob(".w.thaw.*"):
                path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    write(target)
    assert len(calls) == 3
    assert target.read_bytes() == NEW
    assert not parts(target.parent)


def test_file_system_without_locks(target, monkeypatch, parts):
    """Nobody can tell a living writer from a killed one there, so nothing is removed."""
    left = target.with_name(".w.thaw.00000000.thaw-part")
    left.write_bytes(OLD)
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    write(target)
    assert target.read_bytes() == NEW
    assert parts(target.parent) == [left.name]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.soak
def test_writers_of_one_target_at_once(soak, force, tmp_path, parts):
    """Each writes its own bytes; one of them wins, whole, and without force exactly one."""
    for case in soak(small=5, full=200):
        target = tmp_path / f"{case.number}.thaw"
        contents = [bytes([65 + n]) * case.random.randint(1, 100_000) for n in range(4)]
        published, refused, wrong = [], [], []

        def work(data, target=target, published=published, refused=refused, wrong=wrong):
            try:
                write(target, data, force=force)
                published.append(data)
            except ExistsError:
                refused.append(data)
            except ThawError as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(data,)) for data in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, case
        assert len(published) == (4 if force else 1), case
        assert target.read_bytes() in published, case
        assert not parts(tmp_path), case


def test_names_with_patterns_are_escaped_by_the_caller(tmp_path):
    """``remove_stale`` takes a pattern: ``*`` is every target."""
    for name in ("a", "b"):
        (tmp_path / f".{name}.00000000.thaw-part").write_bytes(b"")
    assert remove_stale(tmp_path, glob.escape("*")) == []
    assert len(remove_stale(tmp_path, "*")) == 2
