"""Caches as a file: the same bytes for the same files, and back again whole; nothing that is there is touched."""

import errno
import fcntl
import hashlib
import json
import os
import types
from pathlib import Path

import pytest
from tests.transport.calls import WRITERS, Calls, in_child

from thaw_vllm.caches import groups, packing, staging, unpacking
from thaw_vllm.caches.archive import read
from thaw_vllm.caches.packing import pack
from thaw_vllm.caches.places import Place, empty, files, places
from thaw_vllm.caches.unpacking import Unpacked, unpack
from thaw_vllm.errors import ExistsError, SpaceError, StorageError, UsageError

pytestmark = pytest.mark.usefixtures("no_leaks")

AOT = "vllm/torch_compile_cache/torch_aot_compile/thaw-" + "a" * 64
FILES = {
    f"{AOT}/rank_0_0/model": b"compiled" * 500,
    "vllm/modelinfos/llama.json": b"{}",
    "triton/K/k.cubin": bytes(range(256)) * 40,
    "triton/K/empty": b"",
    "flashinfer/0.2/sm90/x.so": b"\x7fELF" * 100,
}
KEY = {"gpu": "NVIDIA H200", "torch": "2.13.0"}
MADE = {"thaw": "1.0", "variables": {"A": "1"}}


def lay(root, contents=FILES):
    """Lay files below a directory, a place a name; returns the places."""
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return at(root, {name.partition("/")[0] for name in contents})


def at(root, names=("vllm", "triton", "flashinfer")):
    return {name: Place(name, root / name) for name in names}


def found(there):
    return [item for place in there.values() for item in files(place)]


def tree(root):
    """Every file below a directory, by path, but for those that killed writers leave and nobody reads."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and ".thaw-part" not in str(path)]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture
def here(memory_path):
    memory_path.chmod(0o700)
    return memory_path


@pytest.fixture
def file(here):
    pack(here / "a.thawcaches", found(lay(here / "source")), KEY, MADE)
    return here / "a.thawcaches"


def test_it_comes_back(file, here):
    caches = read(file)
    data = file.read_bytes()
    assert (caches.sha256, caches.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (caches.manifest.key, caches.manifest.made) == (KEY, MADE)
    told = {m.path: (m.size, m.sha256) for m in caches.manifest.members}
    assert told == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    size = caches.manifest.size
    assert size == sum(map(len, FILES.values()))
    assert unpack(caches, at(here / "target")) == Unpacked(written=5, present=0, bytes=size, unwanted=0)
    assert tree(here / "target") == FILES
    modes = {path.stat().st_mode & 0o777 for path in [file, *(here / "target").rglob("*")] if path.is_file()}
    assert modes == {0o600}


def test_it_comes_back_where_a_start_looks(here):
    """Through the directories of a start with nothing in them, to those of another."""
    source, target = (places(empty(here / name)) for name in ("packing", "start"))
    for name, place in source.items():
        place.directory.mkdir(parents=True)
        (place.directory / "f").write_text(name)
    pack(here / "a", found(source), KEY, MADE)
    assert unpack(read(here / "a"), target).written == len(source) == 6
    assert {name: (place.directory / "f").read_text() for name, place in target.items()} == {n: n for n in source}


def test_the_same_files_are_the_same_bytes(file, here):
    there = lay(here / "other", dict(reversed(FILES.items())))
    for _, path in found(there):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    written = pack(here / "b.thawcaches", reversed(found(there)), dict(reversed(KEY.items())), MADE)
    assert (here / "b.thawcaches").read_bytes() == file.read_bytes()
    caches = read(file)
    assert (written.manifest, written.sha256, written.size) == (caches.manifest, caches.sha256, caches.size)
    pack(here / "c.thawcaches", found(there), KEY | {"gpu": "none"}, MADE)
    assert (here / "c.thawcaches").read_bytes() != file.read_bytes()


@pytest.mark.parametrize("umask", [0, 0o002, 0o027, 0o077])
def test_directories_are_private_whatever_the_umask(file, here, umask):
    before = os.umask(umask)
    try:
        unpack(read(file), at(here / "target"))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (here / "target").rglob("*") if path.is_dir()}
    assert modes == {0o700} and tree(here / "target") == FILES


def test_what_is_there_stays(file, here):
    lay(here / "target", {"triton/K/k.cubin": b"mine"})
    (here / "target/triton/K/empty").symlink_to("nowhere")
    assert unpack(read(file), at(here / "target")).present == 2
    assert tree(here / "target") == {name: data for name, data in FILES.items() if name != "triton/K/empty"} | {
        "triton/K/k.cubin": b"mine"
    }
    again = unpack(read(file), at(here / "target"))
    assert again == Unpacked(written=0, present=5, bytes=0, unwanted=0)
    assert os.readlink(here / "target/triton/K/empty") == "nowhere"


def test_one_that_another_start_brings_meanwhile(file, here, monkeypatch):
    link = os.link

    def late(source, target):
        Path(target).write_bytes(b"of another")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    done = unpack(read(file), at(here / "target"))
    assert done == Unpacked(written=0, present=5, bytes=0, unwanted=0)
    assert set(tree(here / "target").values()) == {b"of another"}


def test_places_that_nobody_has_here(file, here):
    done = unpack(read(file), at(here / "target", ["triton"]))
    assert (done.written, done.unwanted) == (2, 3)
    assert sorted(path.name for path in (here / "target").iterdir()) == ["triton"]
    assert unpack(read(file), {}) == Unpacked(written=0, present=0, bytes=0, unwanted=5)


def kernel(directory, named=None):
    """A kernel as Triton keeps it, its list naming its files below ``named``; returns the list's own path."""
    directory.mkdir(parents=True)
    for name in ("k.cubin", "k.json"):
        (directory / name).write_text(f"{name} of {directory.name}")
    children = {name: str((named or directory) / name) for name in ("k.cubin", "k.json")}
    (directory / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
    return directory / "__grp__k.json"


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("place", ["triton", "inductor"])
def test_lists_of_triton_name_the_new_directory(here, place, linked):
    (here / "real").mkdir()
    (here / "link").symlink_to("real")
    named = here / ("link" if linked else "real") / "triton/0/KERNEL"
    kernel(here / "real/triton/0/KERNEL", named)
    pack(here / "a", files(Place(place, here / "real")), KEY, MADE)
    caches = read(here / "a")
    assert all(str(here).encode() not in caches.read(member) for member in caches.manifest.members)
    target = here / "target"
    assert unpack(caches, {place: Place(place, target)}).written == 3
    children = json.loads((target / "triton/0/KERNEL/__grp__k.json").read_text())["child_paths"]
    assert children == {name: str(target / "triton/0/KERNEL" / name) for name in ("k.cubin", "k.json")}
    assert Path(children["k.cubin"]).read_text() == "k.cubin of KERNEL"


NO_LISTS = {
    "another name": ("triton/K/group.json", {"child_paths": {"a": "/x/K/a"}}),
    "another ending": ("triton/K/__grp__k.txt", {"child_paths": {"a": "/x/K/a"}}),
    "a file elsewhere": ("triton/K/__grp__k.json", {"child_paths": {"a": "/x/K/a", "b": "/x/L/b"}}),
    "paths that are none": ("triton/K/__grp__k.json", {"child_paths": {"a": 1}}),
    "no paths": ("triton/K/__grp__k.json", {"child_paths": ["/x/K/a"]}),
    "no object": ("triton/K/__grp__k.json", ["child_paths"]),
    "a number": ("triton/K/__grp__k.json", 1),
}


@pytest.mark.parametrize("what", NO_LISTS)
def test_what_is_no_such_list_is_packed_as_it_is(what):
    path, document = NO_LISTS[what]
    data = json.dumps(document).encode()
    assert groups.relative(path, data, Path("/x/K")) == data
    assert groups.absolute(path, data, Path("/y/K")) == data


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_list_that_is_not_json(data):
    assert groups.relative("triton/K/__grp__k.json", data, Path("/x/K")) == data
    assert groups.absolute("triton/K/__grp__k.json", data, Path("/x/K")) == data


@pytest.mark.parametrize("child", ["../../k", "/etc/passwd", "..", ".", ""])
def test_a_list_that_names_what_is_not_beside_it_is_not_completed(child):
    data = json.dumps({"child_paths": {"a": "a", "b": child}}).encode()
    assert groups.absolute("triton/K/__grp__k.json", data, Path("/y/K")) == data


def test_links_and_pipes_are_not_packed(here):
    there = lay(here / "source")
    (here / "secret").write_text("secret")
    (here / "secrets").mkdir()
    (here / "secrets/other").write_text("secret")
    (here / "source/triton/K/link").symlink_to(here / "secret")
    (here / "source/triton/K/gone").symlink_to(here / "none")
    (here / "source/vllm/folder").symlink_to(here / "secrets")
    os.mkfifo(here / "source/triton/K/pipe")
    written = pack(here / "a", found(there), KEY, MADE)
    assert {member.path for member in written.manifest.members} == FILES.keys()


def test_nothing_to_pack(here):
    (here / "source/vllm/folder").mkdir(parents=True)
    for there in ({}, at(here / "source"), at(here / "none")):
        with pytest.raises(UsageError, match="nothing to pack"):
            pack(here / "a", found(there), KEY, MADE)
    assert not (here / "a").exists()


@pytest.mark.parametrize("limit", ["MAX_MEMBERS", "MAX_BYTES", "MAX_MEMBER", "MAX_FILE"])
def test_too_much_to_pack(here, monkeypatch, limit):
    monkeypatch.setattr(packing, limit, 4)
    with pytest.raises(UsageError, match="too many, or too large"):
        pack(here / "a", found(lay(here / "source")), KEY, MADE)
    assert not (here / "a").exists()


def test_names_that_are_too_long_to_pack(here, monkeypatch):
    monkeypatch.setattr(packing, "MAX_MANIFEST", 100)
    with pytest.raises(UsageError, match="too long"):
        pack(here / "a", found(lay(here / "source")), KEY, MADE)
    assert not (here / "a").exists()


def test_what_may_not_travel_is_not_packed(here):
    (here / "f").touch()
    for name in ("vllm/a.lock", "f", "../f", "vllm/gpu_p2p_access_cache_for_0.json"):
        with pytest.raises(UsageError):
            pack(here / "a", [(name, here / "f")], KEY, MADE)
    assert sorted(tree(here)) == ["f"]


def test_an_existing_file_stays(file, here, parts):
    before = file.read_bytes()
    there = lay(here / "source", {"triton/K/new": b"new"})
    with pytest.raises(ExistsError):
        pack(file, found(there), KEY, MADE)
    assert file.read_bytes() == before
    pack(file, found(there), KEY, MADE, force=True)
    assert {member.path for member in read(file).manifest.members} == {
        f"triton/K/{n}" for n in ("k.cubin", "empty", "new")
    }
    assert parts(here) == []


def test_what_cannot_be_read_or_written(here):
    there = lay(here / "source")
    with pytest.raises(StorageError, match="does not exist"):
        pack(here / "none" / "a", found(there), KEY, MADE)
    with pytest.raises(StorageError, match="cannot be read"):
        pack(here / "a", [("triton/K/x", here / "none")], KEY, MADE)
    assert not (here / "a").exists()


def fill(monkeypatch, call, after=0):
    """The disk is full after so many calls of this name."""
    real, done = getattr(os, call), []

    def write(*arguments):
        if len(done) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(os, call, write)


def test_packing_onto_a_full_disk(file, here, monkeypatch, parts):
    before = file.read_bytes()
    fill(monkeypatch, "posix_fallocate")
    with pytest.raises(SpaceError):
        pack(file, found(at(here / "source")), KEY, {}, force=True)
    assert file.read_bytes() == before and parts(here) == []


def test_unpacking_onto_a_disk_with_too_little_room(file, here, monkeypatch):
    caches = read(file)
    status = types.SimpleNamespace(f_bavail=caches.manifest.size - 1, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    with pytest.raises(SpaceError, match="make room"):
        unpack(caches, at(here / "target"))
    assert tree(here / "target") == {}
    status.f_bavail += 1
    unpack(caches, at(here / "target"))
    assert tree(here / "target") == FILES


@pytest.mark.parametrize("after", range(4))
def test_a_disk_that_is_full_meanwhile(file, here, monkeypatch, after):
    """Nothing is there, nor is anything left behind."""
    monkeypatch.setattr(unpacking, "THREADS", 1)
    with monkeypatch.context() as patch:
        fill(patch, "pwrite", after)
        with pytest.raises(SpaceError, match="No space left"):
            unpack(read(file), at(here / "target"))
    assert not [path for path in (here / "target").rglob("*") if path.is_file()]
    unpack(read(file), at(here / "target"))
    assert tree(here / "target") == FILES


def group_writable(place, monkeypatch):
    place.mkdir(parents=True)
    place.chmod(0o770)


def writable_by_all(place, monkeypatch):
    place.mkdir(parents=True)
    place.chmod(0o1777)


def of_another_user(place, monkeypatch):
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)


def read_only(place, monkeypatch):
    place.mkdir(parents=True)
    place.chmod(0o500)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))  # also for root


def a_file(place, monkeypatch):
    place.parent.mkdir(parents=True)
    place.touch()


def below_a_file(place, monkeypatch):
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    place.parent.touch()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (group_writable, "others may write to"),
        (writable_by_all, "others may write to"),
        (of_another_user, "others may write to"),
        (read_only, "may not be written to"),
        (a_file, "nothing can be kept in"),
        (below_a_file, "nothing can be kept in"),
    ],
)
def test_a_place_that_will_not_do(file, here, monkeypatch, prepare, said):
    """Nothing is written, also not to the other places."""
    bad = here / "target" / "x" / "y"
    prepare(bad, monkeypatch)
    before = tree(here)
    with pytest.raises(StorageError, match=said) as raised:
        unpack(read(file), at(here / "good") | {"triton": Place("triton", bad)})
    assert type(raised.value) is StorageError
    assert tree(here) == before and not any((here / "good").rglob("*/*"))


def test_a_file_where_a_directory_is_needed(file, here):
    lay(here / "target", {"triton/K": b"mine"})
    with pytest.raises(StorageError, match="cannot be written"):
        unpack(read(file), at(here / "target"))
    left = tree(here / "target")
    assert left.pop("triton/K") == b"mine" and left.items() <= FILES.items()


def trace(caches, target):
    """The calls to the system that unpacking makes, in order."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, calls=[*WRITERS, (os, "mkdir")])
        unpack(caches, at(target))
        return list(calls.names)


def test_killed_at_each_call(here, monkeypatch):
    """What is left is whole, a list of kernels not there before them; and the next start brings the rest."""
    monkeypatch.setattr(unpacking, "THREADS", 1)
    listed = "triton/K/__grp__a.json"
    contents = {"triton/K/a": b"a" * 100, listed: b"{}", "vllm/c": b"c"}
    pack(here / "a", found(lay(here / "source", contents)), KEY, MADE)
    caches = read(here / "a")
    names = trace(caches, here / "trace")
    assert names.count("link") == 3 and names.count("fsync") == 5  # of two directories
    written = set()
    for number, name in enumerate(names):
        target = here / "targets" / str(number)

        def work(number=number, target=target):
            Calls(pytest.MonkeyPatch(), number, "before", lambda: os._exit(9), calls=[*WRITERS, (os, "mkdir")])
            unpack(caches, at(target))

        assert in_child(work) == 9, name
        left = tree(target)
        assert left.items() <= contents.items(), (number, name)
        assert listed not in left or "triton/K/a" in left, (number, name)
        written.add(len(left))
        assert unpack(caches, at(target)).present == len(left)
        assert tree(target) == contents and not [*target.rglob("*.thaw-part")], (number, name)
    assert written == {0, 1, 2, 3}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_failed_at_each_call(here, monkeypatch, error):
    monkeypatch.setattr(unpacking, "THREADS", 1)
    contents = {"triton/K/a": b"a" * 100, "vllm/c": b"c"}
    pack(here / "a", found(lay(here / "source", contents)), KEY, MADE)
    caches = read(here / "a")
    names = trace(caches, here / "trace")

    def fail():
        raise error

    published = len(names) - 1 - names[::-1].index("fsync")
    failed = 0
    for number, name in enumerate(names):
        if name in ("unlink", "close"):
            continue  # of what is thrown away
        target = here / "targets" / str(number)
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, number, "before", fail, calls=[*WRITERS, (os, "mkdir")])
            try:
                unpack(caches, at(target))
            except StorageError:
                assert isinstance(error, OSError), (number, name)
                failed += 1
            except type(error):
                failed += 1
        assert tree(target).items() <= contents.items(), (number, name)
        left = [*target.rglob("*.thaw-part")]
        assert not left or number > published, (number, name)
    assert failed > 8


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_directory_that_another_takes_for_stale(file, here, monkeypatch, call):
    """Before it is locked, another start may remove it, or hold its lock while it does."""
    module = os if call == "open" else fcntl
    real, taken = getattr(module, call), []

    def removed(first, *arguments, **options):
        if not taken and (call == "flock" or str(first).endswith(".thaw-part")):
            taken.extend((here / "target").rglob("*.thaw-part"))
            staging.remove_stale(taken[0].parent)
        return real(first, *arguments, **options)

    monkeypatch.setattr(module, call, removed)
    unpack(read(file), at(here / "target"))
    assert tree(here / "target") == FILES and len(taken) == 1
    assert not [*(here / "target").rglob("*.thaw-part")]


def test_a_directory_that_is_locked_meanwhile(here, monkeypatch):
    real, refused = fcntl.flock, []

    def locked(descriptor, how):
        if not refused:
            refused.append(descriptor)
            raise BlockingIOError
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    with staging.Staging(here) as stage:
        assert [*here.iterdir()] == [stage.path]
        staging.remove_stale(here)  # a living one stays
        assert stage.path.is_dir()
    assert refused and [*here.iterdir()] == []


def test_a_file_system_without_locks(here, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with staging.Staging(here) as stage:
        stage.write("0", b"a")
        staging.remove_stale(here)
        assert stage.publish("0", here / "a") and not stage.publish("0", here / "a")
    assert tree(here) == {"a": b"a"}


@pytest.mark.parametrize("name", ["n" * 236, "ü" * 118, "a\udcff", "a\nb", "a\\b"])
def test_names_that_no_machine_takes_are_left_out(here, name):
    """Written under a longer name first, one must be shorter than a file system's limit."""
    place = lay(here / "source", {"vllm/a": b"a"})
    (here / "source/vllm" / name).write_bytes(b"b")
    assert [path for path, _ in found(place)] == ["vllm/a"]
    with pytest.raises(UsageError, match="no path in a cache"):
        pack(here / "a", [(f"vllm/{name}", here / "source/vllm/a")], KEY, MADE)


def test_the_longest_name(here):
    place = lay(here / "source", {"vllm/" + "n" * 235: b"a"})
    pack(here / "a", found(place), KEY, MADE)
    assert unpack(read(here / "a"), at(here / "target")).written == 1


@pytest.mark.parametrize(("key", "made"), [({"gpu": "x" * 1001}, {}), ({}, {"a": float("nan")})])
def test_what_could_not_be_read_is_not_published(here, key, made):
    with pytest.raises(UsageError, match="this cannot be packed"):
        pack(here / "a", found(lay(here / "source")), key, made)
    assert not (here / "a").exists()
