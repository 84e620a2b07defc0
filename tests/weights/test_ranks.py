"""Sets of rank files: published whole or not at all, whatever happens to whichever rank."""

import itertools
import json
import os
import re
import threading
from pathlib import Path

import pytest
from tests.attacks import parts as made
from tests.transport.calls import WRITERS, Calls
from tests.weights.worlds import MODEL, Gather, Lost, failed, freeze_one, freeze_processes, freeze_threads, loaded

from thaw_vllm.errors import CorruptionError, ExistsError, MismatchError, StorageError, UsageError
from thaw_vllm.weights.freeze import FreezeReport
from thaw_vllm.weights.open import open_rank, open_snapshot
from thaw_vllm.weights.rank_names import link_name, member_name
from thaw_vllm.weights.ranks import MAX_MESSAGE, alone, in_step

pytestmark = pytest.mark.usefixtures("no_leaks")

CALLS = [*WRITERS, (os, "symlink"), (os, "scandir")]
WORLD = 3
OLD, NEW = 1.0, 2.0


@pytest.fixture
def target(tmp_path):
    return tmp_path / "w.thaw"


@pytest.fixture
def old(target):
    assert not failed(freeze_threads(target, OLD, WORLD))
    return target


def names(target):
    return {path.name for path in target.parent.iterdir()}


def is_tidy(target, world=WORLD):
    """The directory holds one set, its links, and nothing else."""
    with open_snapshot(target) as opened:
        set_id = opened.snapshot.header.ranks.id
        parallel = opened.snapshot.header.identity.parallel
    assert parallel.world == world
    places = [parallel.at(rank) for rank in range(1, world)]
    members = {member_name(target, set_id, place) for place in places}
    links = {link_name(target, place): member_name(target, set_id, place) for place in places}
    assert names(target) == {target.name} | members | set(links)
    assert {name: os.readlink(target.with_name(name)) for name in links} == links
    return True


@pytest.mark.parametrize("world", [2, 3, 4])
def test_set_is_a_file_a_rank(target, world):
    reports = freeze_threads(target, OLD, world)
    assert all(isinstance(report, FreezeReport) for report in reports)
    assert loaded(target, world) == OLD
    assert is_tidy(target, world)
    with open_snapshot(target) as opened:
        header = opened.snapshot.header
    assert re.fullmatch("[0-9a-f]{32}", header.ranks.id)
    paths = [Path(report.path) for report in reports]
    assert paths == [target] + [
        target.with_name(f"w.{header.ranks.id[:12]}.rank{rank}.thaw") for rank in range(1, world)
    ]
    assert [(m.name, m.size, m.content) for m in header.ranks.members] == [
        (path.name, path.stat().st_size, report.content) for path, report in zip(paths, reports, strict=True)
    ][1:]
    assert {report.model for report in reports} == {MODEL}
    assert len({report.content for report in reports}) == world
    for rank, path in enumerate(paths):
        with open_snapshot(path) as opened:
            found = opened.snapshot.header
        assert (found.identity.parallel.rank, found.identity.model, found.ranks.id) == (rank, MODEL, header.ranks.id)
        assert path.stat().st_mode & 0o777 == 0o600


def test_second_freeze_replaces_the_first_and_removes_it(old):
    before = names(old)
    assert not failed(freeze_threads(old, NEW, WORLD))
    assert loaded(old, WORLD) == NEW
    assert is_tidy(old)
    assert len(names(old) & before) == 3  # the manifest and two links


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 3)])
def test_set_of_another_size(target, before, after):
    assert not failed(freeze_threads(target, OLD, before))
    assert not failed(freeze_threads(target, NEW, after))
    assert loaded(target, after) == NEW
    assert is_tidy(target, after)


def test_single_file_over_a_set_and_back(old):
    report = freeze_one(old, NEW, 0, 1, alone)
    assert report.path == str(old)
    assert names(old) == {"w.thaw"}
    assert loaded(old, 1) == NEW
    assert not failed(freeze_threads(old, OLD, WORLD))
    assert is_tidy(old)


def test_existing_set_is_not_replaced_unasked(old):
    before = names(old)
    errors = failed(freeze_threads(old, NEW, WORLD, force=False))
    assert [type(error) for error in errors] == [ExistsError, StorageError, StorageError]
    assert all("rank 0 could not freeze: ExistsError" in str(error) for error in errors[1:])
    assert (names(old), loaded(old, WORLD)) == (before, OLD)


@pytest.mark.parametrize("name", [".w.thaw", "a\\b.thaw", "w\x07.thaw", "w\x1b[2J.thaw"])
def test_name_that_members_cannot_have_is_refused(name, tmp_path):
    """The manifest that named them could not be opened."""
    errors = failed(freeze_threads(tmp_path / name, NEW, 2))
    assert len(errors) == 2
    assert isinstance(errors[0], UsageError)
    assert not list(tmp_path.iterdir())
    freeze_one(tmp_path / name, NEW, 0, 1, alone)
    assert loaded(tmp_path / name, 1) == NEW


@pytest.mark.parametrize("name", ["w", "a.b.thaw", "w[1].thaw", "*.thaw", "雪.thaw", '"' * 100, "w w.thaw"])
def test_any_other_name(name, tmp_path):
    target = tmp_path / name
    (tmp_path / f"x{name}").write_bytes(b"")
    for value in (OLD, NEW):
        assert not failed(freeze_threads(target, value, WORLD))
        assert loaded(target, WORLD) == value
    assert len(names(target)) == 6


def test_name_too_long_for_members(tmp_path):
    errors = failed(freeze_threads(tmp_path / ("w" * 230 + ".thaw"), NEW, WORLD))
    assert len(errors) == WORLD
    assert not list(tmp_path.iterdir())


# --- what may be removed, and what may not ----------------------------------------------------------------------------


def test_ranks_that_write_to_other_disks(old, tmp_path):
    """As on machines that share no file system: nothing is published that could not be read."""
    before, other = names(old), tmp_path / "other" / "w.thaw"
    other.parent.mkdir()
    outcomes = freeze_threads([old, old, other], NEW, WORLD)
    assert all(isinstance(outcome, StorageError) for outcome in outcomes)
    for outcome in outcomes:
        assert f"what rank 2 wrote is not in '{old.parent}' as rank 0 sees it; give a directory that all" in str(
            outcome
        )
    assert names(old) == before | {"other"} and names(other) == set() and loaded(old, WORLD) == OLD


def test_hostile_manifest_does_not_choose_what_is_removed(target):
    """Its members are any files in the directory; none of them is this target's by its name."""
    victims = ["id_rsa", "model.safetensors", "v.000000000000.rank1.thaw", "w.thaw.bak", "w.rank1.thaw"]
    for name in victims:
        target.with_name(name).write_bytes(b"precious")
    members = [made.member(name) for name in victims]
    target.write_bytes(made.Parts(header=made.manifest(members, len(members) + 1)).bytes())
    assert not failed(freeze_threads(target, NEW, WORLD))
    assert loaded(target, WORLD) == NEW
    assert all(target.with_name(name).read_bytes() == b"precious" for name in victims)


@pytest.mark.parametrize("how", ["renamed", "copied", "linked"])
@pytest.mark.parametrize("name", ["kept.thaw", "w.thaw.bak", "kept"])
def test_set_whose_manifest_has_another_name_stays(old, how, name):
    """Its members are still called after the old name, and are all that a person kept by keeping the manifest."""
    kept = old.with_name(name)
    if how == "renamed":
        old.rename(kept)
    elif how == "copied":
        kept.write_bytes(old.read_bytes())
    else:
        os.link(old, kept)
    for value in (NEW, 3.0):
        assert not failed(freeze_threads(old, value, WORLD))
        assert loaded(old, WORLD) == value
        assert loaded(kept, WORLD) == OLD
    assert len(names(old)) == 1 + 2 + 3 + 2
    kept.unlink()
    assert not failed(freeze_threads(old, NEW, WORLD))
    assert is_tidy(old)


def test_nothing_is_removed_when_another_snapshot_cannot_be_read(old, monkeypatch):
    """It may be one that names the members."""
    from thaw_vllm.weights import ranks

    def unreadable(path):
        if path.name == "other.bin":
            raise StorageError("reading failed")
        return members(path)

    members = ranks._members
    monkeypatch.setattr(ranks, "_members", unreadable)
    old.with_name("other.bin").write_bytes(b"x")
    assert not failed(freeze_threads(old, NEW, WORLD))
    assert len(names(old)) == 1 + 1 + 2 + 2 + 2
    monkeypatch.undo()
    old.with_name("other.bin").unlink()
    assert not failed(freeze_threads(old, OLD, WORLD))
    assert is_tidy(old)


def test_file_under_a_link_s_name_stays(target):
    link = target.with_name("w.rank1.thaw")
    link.write_bytes(b"precious")
    for world in (WORLD, 1):
        assert not failed(freeze_threads(target, NEW, world))
        assert loaded(target, world) == NEW
    assert link.read_bytes() == b"precious"


def test_file_system_without_symbolic_links(target, monkeypatch):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    assert not failed(freeze_threads(target, NEW, WORLD))
    assert loaded(target, WORLD) == NEW
    assert len(names(target)) == WORLD


def test_left_by_killed_ranks_of_any_set(target):
    """Hidden files, published members and links of sets that never had a manifest."""
    left = [f".w.{digit * 12}.rank{rank}.thaw.00000000.thaw-part" for digit in "0a" for rank in (1, 2)]
    left += [f"w.{'b' * 12}.rank{rank}.thaw" for rank in (1, 2, 3)]
    for name in left:
        target.with_name(name).write_bytes(b"left")
    target.with_name(".w.rank1.thaw.0000000a.thaw-part").symlink_to("w.thaw")
    target.with_name("w.rank9.thaw").symlink_to(left[-1])
    others = [
        ".v.000000000000.rank1.thaw.00000000.thaw-part",
        "w.b.rank1.thaw",
        "w.rank10.thaw",
        f"w.{'g' * 12}.rank1.thaw",
    ]
    for name in others:
        target.with_name(name).write_bytes(b"other")
    assert not failed(freeze_threads(target, NEW, WORLD))
    for name in others:
        assert target.with_name(name).read_bytes() == b"other"
        target.with_name(name).unlink()
    assert is_tidy(target)


@pytest.mark.soak
def test_sets_written_at_once(soak, memory_path):
    """Two engines freeze to one target: one of the sets is there in the end, every rank of it."""
    for case in soak(small=4, full=100):
        target = memory_path / f"{case.number}" / "w.thaw"
        target.parent.mkdir()
        if case.number % 2:
            assert not failed(freeze_threads(target, OLD, WORLD))
        outcomes = {}

        def run(value, world, target=target, outcomes=outcomes):
            outcomes[value] = freeze_threads(target, value, world)

        worlds = {2.0: 2, 3.0: 3, 4.0: 4}
        threads = [threading.Thread(target=run, args=item) for item in worlds.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(failed(found) for found in outcomes.values()), (case, outcomes)
        with open_snapshot(target) as opened:
            world = opened.snapshot.header.identity.parallel.world
        assert loaded(target, world) in worlds, case
        assert not failed(freeze_threads(target, NEW, WORLD))
        assert is_tidy(target), case


# --- failures ---------------------------------------------------------------------------------------------------------


def whole(target, before, outcomes):
    """What may be there after a failure: the old set or the new one, whole, and the ranks of one mind."""
    value = loaded(target, WORLD)
    if not failed(outcomes):
        assert value == NEW
    elif value == OLD:
        assert names(target) == before
    else:
        assert value == NEW
    return value


def count(tmp_path, rank, world=WORLD):
    """The calls that a rank makes when it freezes over an old set."""
    target = tmp_path / "count" / "w.thaw"
    target.parent.mkdir()
    assert not failed(freeze_threads(target, OLD, world))
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, calls=CALLS, counts=lambda: threading.current_thread().name == f"rank-{rank}")
        assert not failed(freeze_threads(target, NEW, world))
    return calls.names


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("rank", range(WORLD))
def test_rank_that_fails_at_each_call(rank, error, memory_path):
    def fail():
        raise error

    trace = count(memory_path, rank)
    assert len(trace) >= 12
    seen = set()
    for number, name in enumerate(trace):
        target = memory_path / str(number) / "w.thaw"
        target.parent.mkdir()
        assert not failed(freeze_threads(target, OLD, WORLD))
        before = names(target)
        with pytest.MonkeyPatch.context() as patch:
            Calls(
                patch,
                number,
                "after" if name == "close" else "before",
                fail,
                calls=CALLS,
                counts=lambda: threading.current_thread().name == f"rank-{rank}",
            )
            outcomes = freeze_threads(target, NEW, WORLD)
        assert len(failed(outcomes)) in (0, WORLD), (number, name, outcomes)
        seen.add(whole(target, before, outcomes))
        assert not failed(freeze_threads(target, 3.0, WORLD))
        assert is_tidy(target), (number, name)
    assert seen in ({OLD, NEW}, {OLD} if rank else {OLD, NEW})


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("rank", range(2))
def test_rank_that_is_killed_at_each_call(rank, moment, memory_path):
    trace = count(memory_path, rank, world=2)
    seen = set()
    for number, name in enumerate(trace):
        target = memory_path / str(number) / "w.thaw"
        target.parent.mkdir()
        assert not failed(freeze_threads(target, OLD, 2))

        def prepare(mine, number=number):
            if mine == rank:
                Calls(pytest.MonkeyPatch(), number, moment, lambda: os._exit(9), calls=CALLS)

        statuses = freeze_processes(target, NEW, 2, prepare)
        assert statuses[rank] == 9, (number, name, statuses)
        assert all(status in (3, 4) for other, status in enumerate(statuses) if other != rank), (number, name, statuses)
        value = loaded(target, 2)
        assert value in (OLD, NEW), (number, name)
        seen.add(value)
        assert not failed(freeze_threads(target, 3.0, 2))
        assert is_tidy(target, 2), (number, name)
    assert seen == ({OLD, NEW} if rank == 0 else {OLD})


@pytest.mark.parametrize("first", [True, False])
def test_nothing_stays_of_a_first_set_that_failed(first, target):
    """There is no old one to keep."""
    with pytest.MonkeyPatch.context() as patch:

        def fail():
            raise OSError(5, "Input/output error")

        counts = lambda: threading.current_thread().name == "rank-0"  # noqa: E731
        calls = [(os, "fsync")] if first else [(os, "link")]
        Calls(patch, 0, "before", fail, calls=calls, counts=counts)
        if not first:
            Calls(patch, 0, "before", fail, calls=[(os, "rename")], counts=counts)
        outcomes = freeze_threads(target, NEW, WORLD, force=False)
    assert len(failed(outcomes)) == WORLD
    assert names(target) == set()


@pytest.mark.parametrize("number", range(4))
def test_ranks_that_lose_each_other(number, memory_path):
    """Some get the answers of a round and go on, some do not: whatever is published is complete."""
    for lost in itertools.chain.from_iterable(itertools.combinations(range(WORLD), n) for n in range(1, WORLD + 1)):
        target = memory_path / "".join(map(str, lost)) / "w.thaw"
        target.parent.mkdir()
        assert not failed(freeze_threads(target, OLD, WORLD))
        outcomes = freeze_threads(target, NEW, WORLD, fails=lambda rank, at, lost=lost: at == number and rank in lost)
        assert all(isinstance(outcomes[rank], Lost) for rank in lost)
        value = loaded(target, WORLD)
        assert value in (OLD, NEW)
        assert value == NEW or all(isinstance(outcome, Lost) for outcome in outcomes)
        assert number < 3 or value == NEW
        assert not failed(freeze_threads(target, 3.0, WORLD))
        assert is_tidy(target)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_others_are_told_what_may_be_in_place(call, old):
    """Rank 0 fails in the step that publishes: the others cannot tell whether before or after the rename."""

    def fail():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        counts = lambda: threading.current_thread().name == "rank-0"  # noqa: E731
        Calls(patch, 0, "after", fail, calls=[(os, call)], counts=counts)
        outcomes = freeze_threads(old, NEW, WORLD)
    assert loaded(old, WORLD) == (NEW if call == "rename" else OLD)
    assert {str(outcome) for outcome in outcomes[1:]} == {
        "rank 0 could not freeze: KeyboardInterrupt: ; the old snapshot or the new one is in place, whole"
    }


def test_model_id_that_cannot_be_computed(old):
    def fail():
        raise MismatchError("the checkpoint changed")

    before = names(old)
    outcomes = freeze_threads(old, NEW, WORLD, model_id=fail)
    assert isinstance(outcomes[0], MismatchError)
    assert {str(outcome) for outcome in outcomes[1:]} == {
        "rank 0 could not freeze: MismatchError: the checkpoint changed; nothing was published"
    }
    assert (names(old), loaded(old, WORLD)) == (before, OLD)


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f9ca", '"', "\0", "\ud800"])
def test_error_of_any_length_fits_a_message(letter, target):
    """A longer one would stop its rank between steps, and the others would wait for it."""

    def fail():
        raise MismatchError(letter * 100_000)

    outcomes = freeze_threads(target, NEW, 2, model_id=fail)
    assert isinstance(outcomes[0], MismatchError)
    assert str(outcomes[1]).startswith(f"rank 0 could not freeze: MismatchError: {letter * 100}")
    assert len(str(outcomes[1])) <= MAX_MESSAGE + 100


def test_exchange_of_one():
    assert alone(b"x") == [b"x"]


def test_answers_are_plain_json(target):
    seen = []

    def exchange(message):
        seen.append(json.loads(message))
        return [message]

    freeze_one(target, NEW, 0, 1, exchange)
    assert [set(message) for message in seen] == [
        {"rank", "sizes", "set"},
        {"name", "size", "content", "model"},
        set(),
        set(),
    ]


def test_members_of_two_sets_mixed_up(tmp_path):
    """Copied together from two freezes of the same model, which differ in nothing but their set."""
    paths = [tmp_path / str(n) / "w.thaw" for n in range(2)]
    for path in paths:
        path.parent.mkdir()
        assert not failed(freeze_threads(path, OLD, 2))
    members = []
    for path in paths:
        with open_snapshot(path) as opened:
            members.append(path.with_name(opened.snapshot.header.ranks.members[0].name))
    members[0].write_bytes(members[1].read_bytes())
    with pytest.raises(CorruptionError, match="the set is mixed up"), open_rank(paths[0], 1):
        pass


def test_freeze_of_one_rank_goes_through_the_same_steps(tmp_path):
    report = freeze_one(tmp_path / "w.thaw", NEW, 0, 1, alone)
    assert report.model == MODEL
    with open_snapshot(tmp_path / "w.thaw") as opened:
        assert opened.snapshot.header.ranks is None
    assert names(tmp_path / "w.thaw") == {"w.thaw"}


def test_links_of_others_stay(target):
    for rank in (1, 8):
        target.with_name(f"w.rank{rank}.thaw").symlink_to("lora-r8")
    assert not failed(freeze_threads(target, NEW, WORLD))
    for rank in (1, 8):
        assert os.readlink(target.with_name(f"w.rank{rank}.thaw")) == "lora-r8"


@pytest.mark.parametrize("damage", ["version", "short"])
def test_members_of_a_manifest_that_cannot_be_read_stay(target, damage):
    assert not failed(freeze_threads(target, OLD, WORLD))
    kept = sorted(target.parent.glob("w.*.rank1.thaw"))
    manifest = bytearray(target.read_bytes())
    if damage == "version":
        manifest[8] = 2
    else:
        del manifest[-1]
    target.with_name("keep.thaw").write_bytes(manifest)
    assert not failed(freeze_threads(target, NEW, WORLD, force=True))
    assert kept and all(path.exists() for path in kept)


def test_work_of_one_rank_that_fails_before_it_freezes():
    """The others are told, rather than left waiting."""
    gather, outcomes = Gather(2), [None] * 2

    def run(rank):
        def work():
            if rank == 1:
                raise StorageError("the tokenizer cannot be read")
            return "captured"

        try:
            outcomes[rank] = in_step(gather.of(rank), rank, work)
        except StorageError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes[1] == "the tokenizer cannot be read"
    assert "rank 1 could not freeze: StorageError: the tokenizer cannot be read" in outcomes[0]
    assert in_step(alone, 0, lambda: "captured") == "captured"
