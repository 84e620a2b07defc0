"""Room is made of what nobody needs, and of sessions when a budget says so; nothing that is needed ever goes."""

import os
import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made import SIZE, context, resumes, save, session

from thaw_vllm.errors import StorageError, UsageError
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.collect import collect, limit
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.lineage import forest
from thaw_vllm.sessions.store import Store

BLOCK = 4096 + context().page


def tokens(number, blocks):
    return [1, 2, 3, 4, *[number] * (SIZE * (blocks - 1))]


def used(store, id_, when):
    os.utime(store.record(id_), (when, when))


def test_only_what_nobody_names_goes(store):
    kept, _ = save(store, session(tokens(5, 3)))
    gone, _ = save(store, session(tokens(6, 4)))
    assert collect(store).blocks == 0
    store.remove(gone)
    assert fsck(store).unneeded == 3
    dry = collect(store, dry_run=True)
    assert dry.blocks == 3 and len([*store.block_files()]) == 6
    found = collect(store)
    assert found == dry and (found.freed, found.left, found.sessions) == (3 * BLOCK, 3 * BLOCK, ())
    assert resumes(store, kept) and fsck(store).sound and collect(store).blocks == 0


def test_a_budget_takes_the_sessions_used_longest_ago(store):
    ids = [save(store, session(tokens(number, 3)))[0] for number in range(5, 9)]
    for when, id_ in zip((30, 10, 20, 40), ids, strict=True):
        used(store, id_, when)
    found = collect(store, 6 * BLOCK)  # each has two blocks of its own, and one is everybody's
    assert found.sessions == (ids[1], ids[2]) and found.left == 5 * BLOCK and found.over == 0
    assert [one.id for one in store.listed()[0]] == [ids[0], ids[3]]
    assert resumes(store, ids[0]) and resumes(store, ids[3]) and fsck(store).sound


def test_one_whose_record_is_deleted_meanwhile_is_not_needed(store, monkeypatch):
    gone, stays = (save(store, session(tokens(number, 3)))[0] for number in (5, 6))
    used(store, gone, 0)
    read = store.read

    def late(id_):
        if id_ == gone:
            store.record(id_).unlink()
        return read(id_)

    monkeypatch.setattr(store, "read", late)
    assert collect(store, 3 * BLOCK).left == 3 * BLOCK
    assert [one.id for one in store.listed()[0]] == [stays] and resumes(store, stays) and fsck(store).sound


def test_what_fits_after_all_stays(store):
    """Three that share all that they have; room for the smallest, and no more."""
    trunk, _ = save(store, session(tokens(5, 4)))
    parts = [branch(store, trunk, SIZE * count) for count in (3, 2)]
    for when, id_ in enumerate([trunk, *parts]):
        used(store, id_, when)
    found = collect(store, 2 * BLOCK)
    assert found.sessions == (trunk, parts[0]) and found.left == 2 * BLOCK and resumes(store, parts[1])
    used(store, parts[1], 0)  # what is left over goes first, and would fit where nothing else does
    other, _ = save(store, session(tokens(6, 4)))
    found = collect(store, 2 * BLOCK)
    assert found.sessions == (other,) and resumes(store, parts[1])


def test_branching_off_is_a_use(store):
    first, _ = save(store, session(tokens(5, 3)))
    second, _ = save(store, session(tokens(6, 3)))
    used(store, first, 10)
    used(store, second, 20)
    branch(store, first, 4)
    assert collect(store, 4 * BLOCK).sessions == (second,)


def test_pinned_ones_stay(store):
    pinned, _ = save(store, session(tokens(5, 3)))
    other, _ = save(store, session(tokens(6, 3)))
    store.pin(pinned)
    found = collect(store, 0)
    assert found.sessions == (other,) and found.left == found.over == 3 * BLOCK
    assert resumes(store, pinned)


def test_what_has_expired_goes(store):
    """However lately it was used; what is still to live, and what is pinned, stays."""
    stays, _ = save(store, session(tokens(5, 3), expires=time.time() + 1000))
    first, last = (save(store, session(tokens(number, 3), created=float(number), expires=9.0))[0] for number in (6, 7))
    pinned, _ = save(store, session(tokens(8, 3), expires=9.0))
    store.pin(pinned)
    for id_ in (first, last, pinned):
        store.touch(id_)
        assert resumes(store, id_)
    dry = collect(store, dry_run=True)
    assert dry.sessions == dry.expired == (first, last) and len(store.listed()[0]) == 4
    assert collect(store) == dry and (dry.blocks, dry.freed, dry.left) == (4, 4 * BLOCK, 5 * BLOCK)
    assert {one.id for one in store.listed()[0]} == {stays, pinned} and fsck(store).sound
    assert resumes(store, stays) and resumes(store, pinned) and collect(store).sessions == ()
    store.pin(pinned, False)
    assert collect(store).expired == (pinned,)


def test_what_branches_off_an_expired_one_stays(store):
    trunk, _ = save(store, session(tokens(5, 4), expires=9.0))
    early, whole, brief = branch(store, trunk, 9), branch(store, trunk), branch(store, trunk, 5, ttl=1000)
    heads = [store.read(id_).head for id_ in (early, whole, brief)]
    assert [head.expires and round(head.expires - head.created, 3) for head in heads] == [None, None, 1000]
    assert collect(store).sessions == (trunk,) and len([*store.block_files()]) == 4
    assert all(resumes(store, id_) for id_ in (early, whole, brief))
    assert [(node.one.id, node.orphan) for node in forest(store.listed()[0])] == [
        (early, True),
        (whole, True),
        (brief, True),
    ]
    store.remove(whole)
    assert collect(store).blocks == 2 and resumes(store, early)


def test_a_budget_counts_from_what_has_expired(store):
    """What that leaves is enough, so nothing else goes; one that takes no room of its own goes all the same."""
    stays, _ = save(store, session(tokens(5, 3)))
    used(store, stays, 0)
    gone, _ = save(store, session(tokens(6, 3), expires=9.0))
    without, _ = save(store, session([1, 2], expires=9.0))
    found = collect(store, 3 * BLOCK)
    assert {*found.sessions} == {*found.expired} == {gone, without} and found.left == 3 * BLOCK
    other, _ = save(store, session(tokens(7, 3), expires=9.0))
    found = collect(store, 0)
    assert (found.sessions, found.expired, found.left) == ((other, stays), (other,), 0)


def test_a_ttl_that_is_none_publishes_nothing(store):
    trunk, _ = save(store, session(tokens(5, 3)))
    with pytest.raises(UsageError, match="ttl must be"):
        branch(store, trunk, ttl=0)
    assert [one.id for one in store.listed()[0]] == [trunk]


def test_those_that_would_make_no_room_stay(store):
    pinned, _ = save(store, session(tokens(5, 3)))
    store.pin(pinned)
    without, _ = save(store, session([1, 2, 3]))
    inside = branch(store, pinned, 8)
    assert collect(store, 0).sessions == () and len(store.listed()[0]) == 3
    assert resumes(store, inside) and store.read(without).head.count == 3


def test_branches_keep_what_they_share(store):
    trunk, _ = save(store, session(tokens(5, 4)))
    early = branch(store, trunk, 9)
    store.remove(trunk)
    assert collect(store).blocks == 2 and resumes(store, early)


def test_contexts_go_with_the_last_session(store):
    other = context(page=64)
    id_, _ = save(store, session(range(8), contexts=[other]), [other])
    save(store, session(range(8)))
    store.remove(id_)
    collect(store)
    assert store.context_ids() == {context().id}


def test_nothing_goes_while_a_record_cannot_be_read(store):
    good, _ = save(store, session(tokens(5, 3)))
    bad, _ = save(store, session(tokens(6, 3)))
    path = store.record(bad)
    for damage in (b"", path.read_bytes()[:-1] + b"\1"):
        path.write_bytes(damage)
        with pytest.raises(StorageError, match="nothing was removed"):
            collect(store, 0)
    assert len([*store.block_files()]) == 5 and len(store.listed()[0]) == 2
    assert fsck(store, repair=True).broken.keys() == {bad}
    assert (store.directory / "lost" / path.name).exists()
    assert collect(store).blocks == 2 and resumes(store, good)


def test_files_of_killed_writers_go(store):
    save(store, session(tokens(5, 2)))
    below = next(store.block_files()).parent
    for directory in (below, store.directory / "sessions"):
        (directory / ".x.block.0123abcd.thaw-part").touch()
    assert fsck(store).unfinished == 2 and fsck(store).sound
    collect(store)
    assert fsck(store).unfinished == 0


@pytest.mark.parametrize(("given_", "variable", "found"), [(None, "", None), (None, "1.5", 1.5e9), (0, "7", 0)])
def test_the_limit(monkeypatch, given_, variable, found):
    monkeypatch.setenv("THAW_SESSIONS_GB", variable)
    assert limit(given_) == found


@pytest.mark.parametrize("variable", ["x", "-1", "nan", "inf"])
def test_a_limit_that_is_none(monkeypatch, variable):
    monkeypatch.setenv("THAW_SESSIONS_GB", variable)
    with pytest.raises(UsageError, match="THAW_SESSIONS_GB"):
        limit(None)


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.lists(st.integers(0, 1), min_size=1, max_size=5)),
        st.tuples(st.just("branch"), st.integers(0, 9), st.integers(1, 20)),
        st.tuples(st.just("remove"), st.integers(0, 9)),
        st.tuples(st.just("collect"), st.none() | st.integers(0, 8)),
    ),
    max_size=14,
)


@given(acts=ACTS)
def test_whatever_happens_every_session_resumes(tmp_path_factory, acts):
    store = Store(tmp_path_factory.mktemp("s") / "store", create=True)
    known = []
    for what, *arguments in acts:
        if what == "save":
            known.append(save(store, session([one for one in arguments[0] for _ in range(SIZE)]))[0])
        elif known and what == "branch":
            one = known[arguments[0] % len(known)]
            known.append(branch(store, one, min(arguments[1], store.read(one).head.count)))
        elif known and what == "remove":
            store.remove(known.pop(arguments[0] % len(known)))
        elif what == "collect":
            budget = None if arguments[0] is None else arguments[0] * BLOCK
            found = collect(store, budget)
            known = [one for one in known if one not in found.sessions]
            assert budget is None or found.left <= budget
            assert found.left == sum(path.stat().st_size for path in store.block_files())
    assert {one.id for one in store.listed()[0]} == {*known}
    assert fsck(store).sound and all(resumes(store, one) for one in known)


def test_a_store_that_lost_its_empty_directories_is_one_still(store):
    """As git does, and whoever copies files alone."""
    kept, _ = save(store, session(tokens(5, 3)))
    shutil.rmtree(store.blocks)
    (store.directory / "pins").rmdir()
    found = collect(Store(store.directory))
    assert (found.sessions, found.blocks, found.left) == ((), 0, 0)
    with store.use():
        store.pin(kept)
    assert store.pinned(kept) and (store.directory / "pins").stat().st_mode & 0o777 == 0o700
    again, _ = save(store, session(tokens(6, 3)))
    assert resumes(store, again)


def test_a_store_that_lost_all_of_them_has_no_sessions(store):
    for part in ("blocks", "pins", "sessions", "contexts"):
        (store.directory / part).rmdir()
    found = collect(Store(store.directory))
    assert found.blocks == 0 and fsck(store).sound
