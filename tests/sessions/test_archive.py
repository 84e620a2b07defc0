"""A session as a file: all of it, and nothing that is not sound becomes a session again."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made import context, resumes, save, session

from thaw_vllm.errors import ExistsError, FormatError, StorageError, ThawError, UsageError
from thaw_vllm.format.document import canonical
from thaw_vllm.sessions.archive import bring, export
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store

RANKS = [context(groups=2, rank=rank, world=2) for rank in range(2)]


@pytest.fixture
def other(memory_path):
    return Store(memory_path / "other", create=True)


@pytest.fixture
def file(store, memory_path):
    """Of a session of two ranks with a window."""
    made = session(range(18), contexts=RANKS, kept=(0, 2), labels=("trunk",), salt="s")
    save(store, made, RANKS)
    export(store, "trunk", memory_path / "a.thawsession")
    return memory_path / "a.thawsession"


def test_it_comes_back_elsewhere(store, other, file):
    (one,), _ = store.listed()
    assert bring(other, file) == (one.id, 12)
    assert other.read(one.id) == store.read(one.id) and resumes(other, one.id) and fsck(other).sound
    assert bring(other, file) == (one.id, 0) and file.stat().st_mode & 0o777 == 0o600
    again = file.with_name("b.thawsession")
    assert export(other, one.id, again) == (one.id, again.stat().st_size)
    assert again.read_bytes() == file.read_bytes()


def test_what_is_there_is_not_written_again(store, memory_path, other):
    id_, _ = save(store, session(range(16)))
    early = branch(store, id_, 9)
    for name in (id_, early):
        export(store, name, memory_path / f"{name}.thawsession")
    assert bring(other, memory_path / f"{early}.thawsession")[1] == 2
    assert bring(other, memory_path / f"{id_}.thawsession")[1] == 2
    assert fsck(other).sound


def test_progress(store, other, file, memory_path):
    seen = []
    export(store, "trunk", memory_path / "c", progress=lambda *numbers: seen.append(numbers))
    bring(other, file, progress=lambda *numbers: seen.append(numbers))
    assert seen[11] == seen[-1] == (12 * RANKS[0].page,) * 2


def test_what_is_damaged_there_is_healed(store, other, file):
    id_, _ = bring(other, file)
    path = next(other.block_files())
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    other.record(id_).write_bytes(b"x")
    assert not fsck(other).sound
    assert bring(other, file) == (id_, 1) and fsck(other).sound and resumes(other, id_)


def test_an_existing_file_stays(store, file):
    before = file.read_bytes()
    with pytest.raises(ExistsError):
        export(store, "trunk", file)
    export(store, "trunk", file, force=True)
    assert file.read_bytes() == before
    with pytest.raises(UsageError):
        export(store, "none", file.with_name("d"))
    with pytest.raises(StorageError):
        bring(store, file.with_name("none"))


def test_a_damaged_block_is_not_exported(store, file, parts):
    path = next(store.block_files())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        export(store, "trunk", file.with_name("d.thawsession"))
    assert not file.with_name("d.thawsession").exists() and parts(file.parent) == []


@given(data=st.data())
def test_every_flipped_bit_is_noticed_or_means_nothing(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("a")
    store, other = (Store(place / name, create=True) for name in ("s", "t"))
    id_, _ = save(store, session(range(9), created=1.0, nonce="0"))
    export(store, id_, place / "f")
    whole = bytearray((place / "f").read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    (place / "f").write_bytes(whole)
    try:
        found, _ = bring(other, place / "f")
    except ThawError:
        assert other.listed() == ([], {})
    else:  # of the tar itself: modes, times, padding
        assert found == id_ and resumes(other, id_)
    assert fsck(other).sound


@pytest.mark.parametrize("keep", [0, 100, 512, 1500, 5000, 20000])
def test_a_cut_file(other, file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ThawError):
        bring(other, file)
    assert other.listed() == ([], {})


def rewritten(file, change):
    """The file with its members changed: ``change(members)`` gets and gives names and bytes, or TarInfos."""
    with tarfile.open(file) as tar:
        members = [(one.name, tar.extractfile(one).read()) for one in tar]
    with tarfile.open(file, "w") as tar:
        for name, data in change(members):
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def sparse(name, **headers):
    info = tarfile.TarInfo(name)
    info.pax_headers = {f"GNU.sparse.{key}": value for key, value in headers.items()}
    return info


HOSTILE = {
    "another file": lambda m: [*m, ("../../evil", b"x")],
    "an absolute path": lambda m: [*m, ("/tmp/evil", b"x")],
    "a link in place of a block": lambda m: [*m[:-1], (link(m[-1][0]), b"")],
    "a link in place of the record": lambda m: [(link(m[0][0]), b""), *m[1:]],
    "a block twice": lambda m: [*m, m[-1]],
    "a block of another session": lambda m: [*m, ("blocks/" + "a" * 64 + "-0", m[-1][1])],
    "a block under another's name": lambda m: [*m[:-2], (m[-1][0], m[-2][1]), (m[-2][0], m[-1][1])],
    "a block too short": lambda m: [*m[:-1], (m[-1][0], m[-1][1][:-1])],
    "a block too few": lambda m: m[:-1],
    "no record": lambda m: m[1:],
    "no context": lambda m: [m[0], *m[2:]],
    "contexts that are mixed up": lambda m: [m[0], (m[1][0], m[2][1]), (m[2][0], m[1][1]), *m[3:]],
    "a record that is none": lambda m: [(m[0][0], b"x"), *m[1:]],
    "a record under another's name": lambda m: [("sessions/" + "a" * 32, m[0][1]), *m[1:]],
    "nothing": lambda m: [],
    "a sparse file of a strange size": lambda m: [(sparse(m[0][0], size="xyz", major="0", minor="1"), m[0][1]), *m[1:]],
    "a sparse file of a strange map": lambda m: [(sparse(m[0][0], size="9", map="a,b"), m[0][1]), *m[1:]],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file(other, file, what):
    rewritten(file, HOSTILE[what])
    with pytest.raises(ThawError, match=r"a\.thawsession"):
        bring(other, file)
    assert other.listed() == ([], {}) and fsck(other).sound


def test_a_file_that_promises_more_than_it_has(other, memory_path):
    """Before room is made for it, or an address is hashed."""
    huge = context(page=1 << 39)
    made = session(range(8), contexts=[huge])
    with tarfile.open(memory_path / "x", "w") as tar:
        for name, data in ((f"sessions/{made.id}", made.encode()), (f"contexts/{huge.id}", canonical(huge.to_json()))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(FormatError, match="is cut: it has"):
        bring(other, memory_path / "x")


def test_a_file_that_is_something_else(other, memory_path):
    for data in (b"", b"x" * 5000, b"\0" * 20000):
        (memory_path / "x").write_bytes(data)
        with pytest.raises(FormatError):
            bring(other, memory_path / "x")
