"""The directory: made and found, sessions published, named, pinned and forgotten, by several processes at once."""

import errno
import os
import threading
import time

import pytest
from tests.sessions.made import context, resumes, save, session

from thaw_vllm.errors import (
    CorruptionError,
    FormatError,
    StorageError,
    UnknownSessionError,
    UsageError,
    VersionError,
)
from thaw_vllm.sessions import store as store_module
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.store import Store, default_directory


def test_it_is_made_once_and_private(tmp_path):
    place = tmp_path / "a" / "b"
    with pytest.raises(StorageError, match="does not exist: thaw checkpoint"):
        Store(place)
    Store(place, create=True)
    Store(place, create=True)
    found = Store(place)
    assert found.directory == place and place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        Store(place)


def test_another_directory_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StorageError, match="other files in it"):
        Store(tmp_path, create=True)
    assert [*tmp_path.iterdir()] == [tmp_path / "thesis.tex"]


def test_one_that_was_killed_while_it_was_made_is_finished(tmp_path):
    (tmp_path / "blocks").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    Store(tmp_path, create=True)
    assert Store(tmp_path).listed() == ([], {})


def test_one_that_is_made_twice_at_once(tmp_path, monkeypatch):
    listdir = os.listdir

    def late(path):
        monkeypatch.undo()
        Store(tmp_path, create=True)
        return listdir(path)

    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "listdir", late)
    Store(tmp_path, create=True)


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ('{"holds":"sessions","version":2}', VersionError, "version 2"),
        ('{"holds":"cats","version":1}', FormatError, "no store"),
        ("{", FormatError, "bad .*store.json"),
    ],
)
def test_other_stores_are_refused(store, text, error, why):
    (store.directory / "store.json").write_text(text)
    with pytest.raises(error, match=why):
        Store(store.directory)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("THAW_SESSIONS_DIR", "here")
    monkeypatch.chdir(tmp_path)
    assert default_directory() == tmp_path / "here"
    monkeypatch.delenv("THAW_SESSIONS_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "thaw" / "sessions"


def test_a_session_comes_back(store):
    made = session(range(10), prompt=4, labels=("a",))
    id_, added = save(store, made)
    assert added == 2 and store.read(id_) == made and resumes(store, id_)
    (one,), bad = store.listed()
    assert (one.id, one.head, one.pinned, bad) == (id_, made.head, False, {})
    for path in store.directory.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path


def test_blocks_are_shared(store):
    first, added = save(store, session(range(16)))
    assert added == 4
    second, added = save(store, session([*range(12), 99, 98, 97, 96, 5]))
    assert added == 1 and resumes(store, first) and resumes(store, second)
    assert save(store, session(range(16), salt="s"))[1] == 4


def test_of_a_window_only_its_end_is_kept(store):
    two = context(groups=2)
    id_, added = save(store, session(range(16), contexts=[two], kept=(0, 2)), [two])
    assert added == 6 and resumes(store, id_)


def test_every_rank_has_its_blocks(store):
    ranks = [context(rank=rank, world=2) for rank in range(2)]
    id_, added = save(store, session(range(8), contexts=ranks), ranks)
    assert added == 4 and resumes(store, id_)
    wrong, _ = session(range(8), contexts=ranks[::-1]), None
    with store.use():
        id_ = store.publish(wrong, ranks)
    with pytest.raises(FormatError, match="of its ranks"):
        [*store.names(store.read(id_))]


def test_contexts_of_another_model_or_shape(store):
    for found, why in (
        (session(range(8), model="tensors-blake3:" + "7" * 64), "another model"),
        (session(range(8), kept=(0, 0)), "other groups"),
        (session(range(8), block_size=2), "other groups or blocks"),
    ):
        with store.use():
            id_ = store.publish(found, [context()])
        with pytest.raises(FormatError, match=why):
            [*store.names(store.read(id_))]


def test_names(store):
    first, second = (save(store, session([1, 2, 3, 4, number], labels=("both", f"n{number}")))[0] for number in (5, 6))
    assert store.find(first) == first and store.find(first[:6]) == first and store.find("n6") == second
    for word, why in (
        ("both", "means 2 sessions"),
        ("", "no session"),
        (first[:3], "no session"),
        ("../x", "no session"),
    ):
        with pytest.raises(UsageError, match=why):
            store.find(word)
    with pytest.raises(UsageError, match="no session"):
        store.read("0" * 32)


def test_a_label_like_the_beginning_of_an_id_is_not_guessed(store):
    first, _ = save(store, session([1]))
    second, _ = save(store, session([2], labels=(first[:4], first[:6])))
    for word in (first[:4], first[:6]):
        with pytest.raises(UsageError, match="means 2 sessions"):
            store.find(word)
    assert store.find(first) == first and store.find(second[:8]) == second


def test_pins_and_removal(store):
    id_, _ = save(store, session(range(8)))
    store.pin(id_)
    assert store.listed()[0][0].pinned and store.pinned(id_)
    store.pin(id_, False)
    store.pin(id_, False)
    assert not store.pinned(id_)
    store.pin(id_)
    store.remove(id_)
    store.remove(id_)
    with pytest.raises(UsageError, match="no session"):
        store.pin(id_)
    assert store.listed() == ([], {}) and not store.pinned(id_)


def test_of_several_none_is_forgotten_where_one_is_pinned(store):
    ids = [save(store, session([number]))[0] for number in range(3)]
    store.pin(ids[1])
    with pytest.raises(UsageError, match="is pinned; thaw pin --off"):
        store.forget(ids)
    assert len(store.listed()[0]) == 3
    store.pin(ids[1], False)
    store.forget(ids[:2])
    assert [one.id for one in store.listed()[0]] == ids[2:]


def test_one_that_is_being_forgotten_is_not_pinned(store, monkeypatch):
    """Else one that was said to be kept would be gone."""
    id_, _ = save(store, session(range(8)))
    pinned, told = store.pinned, []

    def pin():
        try:
            store.pin(id_)
        except UnknownSessionError:
            told.append("gone")

    def meanwhile(which):
        found = pinned(which)
        thread.start()
        thread.join(0.2)
        return found

    thread = threading.Thread(target=pin)
    monkeypatch.setattr(store, "pinned", meanwhile)
    store.forget([id_])
    thread.join()
    assert told == ["gone"] and store.listed() == ([], {}) and [*(store.directory / "pins").iterdir()] == []


def test_a_damaged_record_does_not_hide_the_others(store):
    good, _ = save(store, session(range(8)))
    bad, _ = save(store, session(range(4)))
    path = store.record(bad)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    found, errors = store.listed()
    assert [one.id for one in found] == [good] and "damaged" in str(errors[bad])
    path.write_bytes(data[:-1] + b"\1")  # of the right length: only the digest tells
    with pytest.raises(CorruptionError, match="not those that its name says"):
        store.read(bad)
    assert resumes(store, good)


def test_a_damaged_context(store):
    id_, _ = save(store, session(range(8)))
    (path,) = (store.directory / "contexts").iterdir()
    whole = path.read_text()
    path.write_text(whole.replace("bfloat16", "float16"))
    again = Store(store.directory)
    with pytest.raises(CorruptionError, match="not the context"):
        [*again.names(again.read(id_))]
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        [*again.names(again.read(id_))]
    path.write_text("damaged")
    save(store, session(range(12)))  # by an engine of the same context
    assert path.read_text() == whole and resumes(Store(store.directory), id_)


def test_a_long_head_is_listed(store):
    id_, _ = save(store, session(range(8), sampling={"stop": ["x" * 100] * 100}))
    assert [one.id for one in store.listed()[0]] == [id_]


def test_a_branch_takes_no_blocks(store):
    id_, _ = save(store, session(range(18), prompt=6, finished="stop", labels=("trunk",), random={"generator": "A"}))
    before = {path for path in store.block_files()}
    whole, early = branch(store, "trunk", labels=["w"]), branch(store, id_, 9)
    assert {path for path in store.block_files()} == before
    found = store.read(early)
    assert [*found.tokens] == [*range(9)] and (found.head.parent, found.head.fork) == (id_, 9)
    assert (found.head.blocks, found.head.finished, found.head.random) == (2, None, None)
    same = store.read(whole).head
    assert (same.finished, same.random, same.labels, same.prompt) == ("stop", {"generator": "A"}, ("w",), 6)
    assert store.read(branch(store, id_, -16)).head.count == 2
    assert all(resumes(store, one) for one in (whole, early))
    for at in (0, 19, -18):
        with pytest.raises(UsageError, match="has 18 tokens"):
            branch(store, id_, at)


def test_whoever_removes_is_alone(store):
    order = []

    def remove():
        with store.alone():
            order.append("alone")

    with store.use():
        with store.use():  # others may use it, too
            thread = threading.Thread(target=remove)
            thread.start()
            time.sleep(0.1)
        assert order == []
        later = threading.Thread(target=lambda: (store.use().__enter__(), order.append("use")))
        later.start()
        time.sleep(0.1)
        assert order == []  # who comes later waits for whoever waits already
    thread.join()
    later.join()
    assert order == ["alone", "use"]


def test_a_fork_does_not_keep_the_lock(store):
    """A process that was forked meanwhile shares the lock's descriptor."""
    for held in (store.use, store.alone):
        with held():
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
        try:
            taken = store.try_use()
            assert taken is not None
            taken.close()
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_those_that_were_used_last(store):
    ids = [save(store, session(range(8), created=float(at)))[0] for at in range(5)]
    for at, id_ in enumerate(ids):
        os.utime(store.record(id_), (9 - at, 9 - at))
    store.record(ids[1]).write_bytes(b"x")
    store.record(ids[4]).write_bytes(b"x")
    os.utime(store.record(ids[1]), (8, 8))
    os.utime(store.record(ids[4]), (5, 5))
    found, bad, others = store.latest(3)
    assert ([one.id for one in found], [*bad], others) == ([ids[0], ids[2]], [ids[1]], 2)
    found, bad, others = store.latest(9)
    assert found == store.listed()[0] and bad.keys() == {ids[1], ids[4]} and others == 0


def test_a_window_that_a_branch_lacks_leaves_it_without_blocks(store):
    two = context(groups=2)
    id_, _ = save(store, session(range(40), contexts=[two], kept=(0, 7)), [two])
    late, early = (store.read(branch(store, id_, at)).head for at in (38, 20))
    assert (late.blocks, late.kept) == (9, (0, 7)) and (early.blocks, early.kept) == (0, (0, 0))


def test_no_descriptor_is_left(store, no_leaks):
    save(store, session(range(8)))
    store.listed()
    with store.alone():
        pass


def test_a_full_disk_publishes_nothing(store, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with store.use(), pytest.raises(StorageError, match="no room"):
        store.publish(session([1]), [context()])
    assert store.listed() == ([], {}) and store_module.Store(store.directory).context_ids() == set()


def test_nobody_is_pinned_in_a_store_that_may_only_be_read(store, monkeypatch):
    """Nor waits for ever: without lock files whoever uses it holds its directory."""
    id_, _ = save(store, session([1, 2, 3, 4]))
    for lock in store.directory.glob("*.lock"):
        lock.unlink()
    opened = os.open

    def refusing(path, flags, *more, **options):
        if flags & os.O_CREAT and str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    with store.use():
        assert store.read(id_)
        for change in (lambda: store.pin(id_), lambda: store.forget([id_])):
            with pytest.raises(StorageError, match=r"pins\.lock"):
                change()
