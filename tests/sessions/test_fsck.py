"""Damage is found, said of whom, taken out; and what is whole stays."""

import builtins
import io
from pathlib import Path

import pytest
from tests.sessions.made import SIZE, resumes, save, session

from thaw_vllm.errors import StorageError
from thaw_vllm.sessions.collect import collect
from thaw_vllm.sessions.fsck import fsck


@pytest.fixture
def two(store):
    """Two sessions with two blocks in common and one of each one's own."""
    return [save(store, session([*range(8), *[number] * SIZE]))[0] for number in (50, 60)]


def own(store, id_):
    names = [name for _, name in store.names(store.read(id_))]
    return names[-1].path(store.blocks)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_sound_store(store, two):
    seen = []
    found = fsck(store, progress=lambda done, total: seen.append((done, total)))
    assert found.sound and (found.sessions, found.blocks, found.unneeded) == (2, 4, 0)
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize("at", [-1, 20])
def test_a_flipped_bit_hurts_whose_block_it_is(store, two, at):
    path = own(store, two[0])
    flip(path, at)
    found = fsck(store)
    assert not found.sound and [*found.damaged] == [str(path)] and found.missing == {two[0]: 8}
    assert resumes(store, two[1])
    quick = fsck(store, quick=True)
    assert quick.sound == (at == -1)


def test_a_shared_block_hurts_both(store, two):
    flip(next(name.path(store.blocks) for _, name in store.names(store.read(two[0]))))
    assert fsck(store).missing == {id_: 0 for id_ in two}


def test_a_repair_lets_a_checkpoint_bring_it_back(store, two):
    path = own(store, two[0])
    flip(path)
    found = fsck(store, repair=True)
    assert found.repaired == [str(path)] and not path.exists()
    again = fsck(store)
    assert again.missing == {two[0]: 8} and not again.damaged and not again.sound
    assert save(store, store.read(two[0]))[1] == 1
    assert fsck(store).sound and resumes(store, two[0])


def test_a_missing_block(store, two):
    own(store, two[1]).unlink()
    found = fsck(store, quick=True)
    assert not found.sound and found.missing == {two[1]: 8}


def test_a_missing_context(store, two):
    (path,) = (store.directory / "contexts").iterdir()
    path.unlink()
    store._known.clear()
    assert fsck(store).broken.keys() == {*two}


def test_a_damaged_context_is_taken_out_and_comes_back(store, two):
    """Its sessions stay: nothing of theirs is lost."""
    (path,) = (store.directory / "contexts").iterdir()
    assert fsck(store).sound
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    found = fsck(store)
    assert not found.sound and [*found.damaged] == [str(path)] and found.broken.keys() == {*two}
    assert fsck(store, repair=True).repaired == [str(path)] and not path.exists()
    assert fsck(store).broken.keys() == {*two} and len(store.listed()[0]) == 2
    save(store, session(range(20, 28)))
    assert fsck(store).sound and resumes(store, two[0])


def test_a_link_to_nothing_is_a_missing_block(store, two):
    path = own(store, two[0])
    path.unlink()
    path.symlink_to("/nowhere")
    found = fsck(store)
    assert not found.sound and found.missing == {two[0]: 8} and found.strange == [str(path)]


def test_one_that_is_forgotten_meanwhile_is_no_fault(store, two, monkeypatch):
    read = store.read

    def late(id_):
        store.remove(id_)
        return read(id_)

    monkeypatch.setattr(store, "read", late)
    found = fsck(store)
    assert found.sound and found.sessions == 0


def test_what_cannot_be_read_is_no_damage_and_stays(store, two, monkeypatch):
    """Such as a file of somebody else's, or a disk that fails."""
    path, record = own(store, two[0]), store.record(two[1])
    opening = open

    def refusing(file, *arguments, **options):
        if Path(file) in (path, record):
            raise PermissionError(13, "Permission denied")
        return opening(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refusing)
    monkeypatch.setattr(io, "open", refusing)  # pathlib's
    found = fsck(store, repair=True)
    assert not found.sound and found.unread.keys() == {str(path), str(record)}
    assert found.damaged == found.missing == {} and found.repaired == [] and found.unneeded == 0
    with pytest.raises(StorageError, match=r"nothing was removed.*Permission denied; thaw rm"):
        collect(store)
    monkeypatch.undo()
    assert fsck(store).sound


def test_strange_files_are_named_and_left(store, two):
    strange = [store.blocks / "x", store.blocks / "aa" / "b.block", store.directory / "sessions" / "notes.txt"]
    (store.blocks / "aa").mkdir(exist_ok=True)
    for path in strange:
        path.touch()
    found = fsck(store, repair=True)
    assert sorted(found.strange) == sorted(map(str, strange)) and found.sound
    assert all(path.exists() for path in strange)


def test_a_record_of_a_later_version_is_left(store, two):
    """It is sound, and somebody else's to read: neither a repair nor a collection takes it or its blocks away."""
    path = store.record(two[0])
    later = path.read_bytes().replace(b"thaw session 1", b"thaw session 9", 1)
    path.write_bytes(later)
    found = fsck(store, repair=True)
    assert not found.sound and [*found.broken] == [two[0]] and not found.repaired and str(path) in found.unread
    with pytest.raises(StorageError, match=f"later version.*use that version, or forget it .thaw rm {two[0]}"):
        collect(store)
    assert path.read_bytes() == later and len([*store.block_files()]) == 4
