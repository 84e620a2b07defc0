"""What ranks hold alike is stored once; every rank's tensors come back all the same, or are refused before copying."""

import contextlib
import dataclasses
import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.format import independent
from tests.weights import test_reshard
from tests.weights.worlds import MODEL, Gather, Lost, failed, freeze_processes
from tests.weights.worlds import freeze_one as freeze_small

from thaw_vllm.errors import CorruptionError, MismatchError
from thaw_vllm.format.chunks import KEPT
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.format.index import Kept
from thaw_vllm.format.snapshot import front
from thaw_vllm.weights import once, reshard
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.freeze import FreezeOptions
from thaw_vllm.weights.open import open_memory, open_rank, open_snapshot
from thaw_vllm.weights.pinned import pin
from thaw_vllm.weights.ranks import MAX_MESSAGE, _Ranks, freeze_rank
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore, sort
from thaw_vllm.weights.verify import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

LARGE = 9 << 20
"""Bytes: three chunks of 4 MiB."""


def noise(seed, size=LARGE):
    """Bytes that no other seed gives."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def alike(rank):
    """What every rank has, what it has alone, and what is too small to be left to others."""
    return {"own": noise(100 + rank, 300_000 + rank), "same": noise(1), "small": noise(2, 4096)}


def freeze(target, world, tensors=alike, exchange=None, **options):
    """A set whose rank ``n`` holds ``tensors(n)``; returns what each thread returned or raised."""
    gather, outcomes = exchange or Gather(world), [None] * world
    options = FreezeOptions(force=True, chunk_size=4 << 20, workers=2, **{"once": True} | options)

    def run(rank):
        parallel = Parallel(tp_rank=rank, tp_size=world)
        header = Header(Identity("raw", engine="vllm", parallel=parallel), writer="a test")
        files = [("config.json", b"{}" * 40_000)] if rank == 0 else []
        captured = capture([(name, "parameter", tensor) for name, tensor in tensors(rank).items()], files)
        try:
            outcomes[rank] = freeze_rank(target, header, captured, options, gather.of(rank), lambda: MODEL)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def thawed(target, rank, like):
    """The tensors of a rank."""
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with open_rank(target, rank) as opened:
        restore(opened.source, opened.snapshot, found, found, RestoreOptions(workers=2))
    return found


def equal(target, world, tensors=alike):
    """Whether every rank gets back what it froze."""
    return all(
        torch.equal(tensor, thawed(target, rank, tensors(rank))[name])
        for rank in range(world)
        for name, tensor in tensors(rank).items()
    )


def kept(target, rank):
    """What a rank leaves to others."""
    with open_rank(target, rank, with_chunks=False) as opened:
        return opened.snapshot.index.kept


@pytest.fixture
def target(tmp_path):
    return tmp_path / "w.thaw"


@pytest.fixture
def three(target):
    assert not failed(freeze(target, 3))
    return target


def member(target, rank):
    """The file of a rank above 0."""
    return target.with_name(os.readlink(target.with_name(f"w.rank{rank}.thaw")))


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
def test_stored_once_and_ids_as_ever(target, tmp_path, compress):
    reports = freeze(target, 3, compress=compress)
    assert not failed(reports)
    assert [report.kept for report in reports] == [0, LARGE, LARGE]
    assert reports[0].file_size > LARGE
    assert all(report.file_size < 400_000 for report in reports[1:])
    assert [kept(target, rank) for rank in range(3)] == [(), (Kept(1, 0, 1),), (Kept(1, 0, 1),)]
    assert equal(target, 3)
    plain = freeze(tmp_path / "plain.thaw", 3, once=False)
    assert [report.kept for report in plain] == [0, 0, 0]
    assert [report.content for report in plain] == [report.content for report in reports]


def test_read_by_the_second_reader(target):
    def little(rank):
        return {"same": noise(1, 70_000), "own": noise(2 + rank, 500)}

    assert not failed(freeze(target, 2, little))
    _, index, tensors, _ = independent.read(member(target, 1).read_bytes(), {0: target.read_bytes()})
    assert index["kept"] == [{"storage": 0, "rank": 0, "there": 0}]
    assert {name: data for name, (_, _, data) in tensors.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in little(1).items()
    }


def any_set(random, world):
    """For each rank tensors of which some ranks hold the same, under one name or another."""
    seeds = [random.randrange(1 << 30) for _ in range(6)]
    made = {seed: noise(seed, random.choice([1, 5000, 70_000, 300_000, LARGE // 2, LARGE])) for seed in seeds}
    ranks = [
        {f"t{number}": made[random.choice(seeds)].clone() for number in range(random.randint(1, 6))}
        for _ in range(world)
    ]
    for tensors in ranks:
        for tensor in tensors.values():
            if random.random() < 0.15:  # alike but for one byte, perhaps where no sample is taken
                tensor[random.randrange(len(tensor))] ^= 1
    return ranks


@pytest.mark.soak
def test_any_set(soak, memory_path):
    """Every rank gets back what it froze, nobody leaves bytes to one who does not have them, and no chain is made."""
    for case in soak(small=6, full=300):
        world = case.random.randint(2, 6)
        ranks = any_set(case.random, world)
        target = memory_path / f"{case.number}.thaw"
        outcomes = freeze(target, world, ranks.__getitem__, compress=case.random.random() < 0.3)
        assert not failed(outcomes), (case, outcomes)
        assert equal(target, world, ranks.__getitem__), case
        for rank in range(world):
            for one in kept(target, rank):
                assert one.rank < rank and all(other.storage != one.there for other in kept(target, one.rank)), case
        verify(target, content=True)
        for path in memory_path.iterdir():
            path.unlink()


def test_nothing_alike_is_a_set_as_ever(target):
    reports = freeze(target, 2, lambda rank: {"own": noise(rank)})
    assert [report.kept for report in reports] == [0, 0]
    assert [kept(target, rank) for rank in (0, 1)] == [(), ()]
    with open_snapshot(member(target, 1)) as opened:  # alone, too
        assert {chunk.codec for chunk in opened.snapshot.chunks} == {0}


def test_groups_of_ranks(target):
    """As with fewer KV heads than ranks: the lower half has one, the upper half the other."""

    def heads(rank):
        return {"layer": noise(rank // 2), "own": noise(10 + rank, 100_000)}

    assert not failed(freeze(target, 4, heads))
    assert [kept(target, rank) for rank in range(4)] == [(), (Kept(0, 0, 0),), (), (Kept(0, 2, 0),)]
    assert equal(target, 4, heads)
    assert verify(target, content=True).chunks == 2 * 3 + 4 + 1  # of heads, own ones, and the carried file


def test_several_alike_within_a_rank(target):
    """Each goes with another one there: a place in a file is read once."""

    def zeros(rank):
        return {name: torch.zeros(1 << 17) for name in "ab"} | ({"c": torch.zeros(1 << 17)} if rank else {})

    assert not failed(freeze(target, 3, zeros))
    assert kept(target, 1) == (Kept(0, 0, 0), Kept(1, 0, 1))
    assert kept(target, 2) == (Kept(0, 0, 0), Kept(1, 0, 1), Kept(2, 1, 2))
    assert equal(target, 3, zeros)


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
def test_bytes_that_differ_between_samples_are_written(target, compress):
    def nearly(rank):
        tensor = noise(1)
        tensor[LARGE // 3] ^= rank == 1
        return {"other": noise(5), "same": tensor}

    reports = freeze(target, 3, nearly, compress=compress)
    assert [report.kept for report in reports] == [0, LARGE, 2 * LARGE]
    assert [kept(target, rank) for rank in (1, 2)] == [(Kept(0, 0, 0),), (Kept(0, 0, 0), Kept(1, 0, 1))]
    assert equal(target, 3, nearly)
    assert len(list(target.parent.iterdir())) == 5


def test_samples_alike_and_every_byte_checked(target, monkeypatch):
    """Whatever a mark says, digests of all bytes decide."""
    monkeypatch.setattr(once, "SMALLEST", 1)

    def each(rank):
        return {"a": noise(rank, 50_000), "b": noise(7, 50_000)}

    gather, reports = Gather(2), [None, None]

    def run(rank):
        header = Header(Identity("raw", engine="vllm", parallel=Parallel(tp_rank=rank, tp_size=2)))
        captured = capture([(name, "parameter", tensor) for name, tensor in each(rank).items()], [])
        options = FreezeOptions(workers=1, once=True)
        reports[rank] = freeze_rank(
            target, header, captured, options, gather.of(rank), lambda: MODEL, None, lambda *_: b"all alike"
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.kept for report in reports] == [0, 50_000]
    assert equal(target, 2, each)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=6), min_size=1, max_size=5))
def test_hopes_are_never_chained(ranks):
    """Whatever is alike: bytes are left to a lower rank that writes them, and no place is named twice by a file."""
    told = [
        b"".join(
            once._RECORD.pack(number, 1 << 20 | length, bytes([mark] * 16)) for number, (length, mark) in enumerate(own)
        )
        for own in ranks
    ]
    everyone = once.hopes(told)
    for rank, own in enumerate(everyone):
        assert len({(kept.rank, kept.there) for kept in own.values()}) == len(own)
        for number, kept in own.items():
            assert kept.storage == number and kept.rank < rank
            assert ranks[kept.rank][kept.there] == ranks[rank][number]
            assert kept.there not in everyone[kept.rank]
            assert kept.there in once.compared(everyone, kept.rank) and number in once.compared(everyone, rank)


def test_other_chunk_sizes_are_not_left_to_one_another():
    captured = capture([("a", "parameter", noise(1))], [])
    told = [once.marks(captured, size << 20, once.sampled) for size in (4, 4, 8)]
    assert [len(own) for own in once.hopes(told)] == [0, 1, 0]


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (MAX_MESSAGE, MAX_MESSAGE + 1), (3 * MAX_MESSAGE, 5)])
def test_messages_of_any_length(sizes):
    gather, told = Gather(2), [None, None]
    sent = [os.urandom(size) for size in sizes]

    def run(rank):
        told[rank] = _Ranks(gather.of(rank), rank).tell(sent[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [sent, sent]


# --- whoever reads it -------------------------------------------------------------------------------------------------


def test_a_member_alone_is_refused(three):
    own = member(three, 1)
    for call in (
        lambda: verify(own),
        lambda: pin(own, "cpu"),
        lambda: open_memory(own.read_bytes()).__enter__(),
        lambda: open_rank(own, 1).__enter__(),
    ):
        with pytest.raises(MismatchError, match="has part of its bytes in the files of other ranks; give the manifest"):
            call()
    with pin(three, "cpu") as pinned:  # of rank 0 nothing is elsewhere
        assert pinned.bytes == three.stat().st_size


def test_a_reader_without_codec_2_refuses(three, monkeypatch):
    from thaw_vllm.errors import VersionError
    from thaw_vllm.format import snapshot

    monkeypatch.setattr(snapshot, "_KINDS", {0: "raw", 1: "compressed"})
    with pytest.raises(VersionError, match="codec 2 is not known"), open_rank(three, 1):
        pass


@pytest.mark.parametrize("compress", [True, False])
def test_rewritten(three, tmp_path, compress):
    reports = rewrite(three, tmp_path / "other.thaw", compress=compress)
    assert [report.kept for report in reports] == [0, LARGE, LARGE]
    assert equal(tmp_path / "other.thaw", 3)
    assert verify(tmp_path / "other.thaw", content=True).content == verify(three, content=True).content


def test_read_in_order_of_place(three):
    """What is elsewhere lies behind what is not; a GPU is sent ranges in order."""
    like = alike(1)
    with open_rank(three, 1) as opened:
        assert opened.snapshot.elsewhere.keys() == {1} and opened.alone.chunks[1].codec == KEPT
        mixed = dataclasses.replace(opened.snapshot, chunks=opened.snapshot.chunks[::-1])
        offsets = [piece.offset for piece in sort(mixed, like).host]
    assert offsets == sorted(offsets) and len(offsets) == 5


def test_reshaped(tmp_path, monkeypatch):
    """From a set of two ranks, whose second one has what both hold in the first one's file."""
    monkeypatch.setattr(once, "SMALLEST", 1)
    target = tmp_path / "w.thaw"
    assert not failed(freeze(target, 2, lambda rank: test_reshard.state(2, rank)))
    assert {one.rank for one in kept(target, 1)} == {0} and len(kept(target, 1)) >= 2
    for new in (1, 2, 4):
        for rank in range(new):
            divisions = test_reshard.DIVISIONS | {"head": test_reshard.DIVISIONS["words"]}
            found, wanted = reshard.plan(divisions, reshard.Ranks(2, new, rank)), test_reshard.state(new, rank)
            targets = test_reshard.empty(new, rank)
            with contextlib.ExitStack() as stack:
                files = {old: stack.enter_context(open_rank(target, old)) for old in found.files}
                reshard.check(found, files, targets, set(targets))
                reshard.fill(found, files, targets, RestoreOptions())
            assert all(torch.equal(targets[name], wanted[name]) for name in wanted), (new, rank)


def test_rewritten_for_each_and_once_again(three, tmp_path):
    each, again = tmp_path / "each.thaw", tmp_path / "again.thaw"
    assert [report.kept for report in rewrite(three, each, compress=False, once=False)] == [0, 0, 0]
    assert equal(each, 3)
    with pin(each.with_name(os.readlink(tmp_path / "each.rank1.thaw")), "cpu") as pinned:
        assert pinned.bytes > LARGE
    assert [report.kept for report in rewrite(each, again, once=True)] == [0, LARGE, LARGE]
    assert equal(again, 3)
    assert verify(again, content=True).content == verify(three).content


def test_verified_once_each(three):
    report = verify(three, content=True)
    assert report.bytes == sum(member(three, rank).stat().st_size for rank in (1, 2)) + three.stat().st_size
    assert report.chunks == 3 + 1 + 3 * 2


def test_damage_is_named_by_its_file(three):
    with open_snapshot(three) as opened:
        chunk = next(c for c in opened.snapshot.chunks if c.storage == 1 and c.at)
        place = opened.snapshot.preamble.payload_at + chunk.stored_at
    with three.open("r+b") as file:
        file.seek(place + 5)
        (byte,) = file.read(1)
        file.seek(place + 5)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptionError, match=f"w.thaw' is damaged: .*'same' .bytes {place} to"):
        thawed(three, 1, alike(1))
    with pytest.raises(CorruptionError, match="is damaged"):
        verify(three)


# --- sets that are mixed up -------------------------------------------------------------------------------------------


def refused(target, rank, error, words):
    """Nothing is copied."""
    with pytest.raises(error, match=words), open_rank(target, rank):
        raise AssertionError("it was opened")


def test_keeper_missing_swapped_or_truncated(target, tmp_path):
    def heads(rank):
        return {"layer": noise(rank // 2), "own": noise(10 + rank, 100_000)}

    other = tmp_path / "other" / "w.thaw"
    other.parent.mkdir()
    for place in (target, other):
        assert not failed(freeze(place, 4, heads))
    keeper = member(target, 2)
    data = keeper.read_bytes()
    keeper.unlink()
    refused(target, 3, CorruptionError, "rank 2 of .* is missing")
    keeper.write_bytes(member(other, 2).read_bytes())
    refused(target, 3, CorruptionError, "is not the file that .* names as its rank 2")
    keeper.write_bytes(data[:-4096])
    refused(target, 3, CorruptionError, "truncated")
    keeper.write_bytes(data)
    assert equal(target, 4, heads)
    manifest = target.read_bytes()
    target.write_bytes(other.read_bytes())
    for rank in (1, 3):
        refused(target, rank, CorruptionError, "rank . of .* is missing")
    target.write_bytes(manifest[:-4096])
    refused(target, 1, CorruptionError, "truncated")


def sealed(path, change):
    """A file whose index was changed, with digests that agree."""
    data = path.read_bytes()
    with open_snapshot(path, whole=False) as opened:
        snapshot = opened.snapshot
    head, preamble = front(snapshot.header, change(snapshot.index), snapshot.chunks, snapshot.preamble.header)
    assert preamble.payload_at == snapshot.preamble.payload_at
    path.write_bytes(head + data[preamble.payload_at :])


@pytest.mark.parametrize("there", [0, 2, 3, 77], ids=["of another length", "small", "carried", "not there"])
def test_what_the_keeper_does_not_have(three, there):
    sealed(member(three, 1), lambda index: dataclasses.replace(index, kept=(Kept(1, 0, there),)))
    refused(three, 1, CorruptionError, "does not have, as its storage")


def test_other_bytes_of_the_same_length(target):
    assert not failed(freeze(target, 2, lambda rank: {"a": noise(1), "b": noise(2 + rank), "c": noise(8)}))
    sealed(member(target, 1), lambda index: dataclasses.replace(index, kept=(Kept(0, 0, 1), Kept(2, 0, 2))))
    refused(target, 1, CorruptionError, "does not have, as its storage 1")


def test_never_chained(three):
    sealed(member(three, 2), lambda index: dataclasses.replace(index, kept=(Kept(1, 1, 1),)))
    refused(three, 2, CorruptionError, "does not have, as its storage 1")


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_lose_each_other(target, rank):
    """In any round: the old set or the new one."""

    def tensors(value):
        return lambda rank: {"same": noise(value), "own": noise(100 * value + rank, 70_000)}

    assert not failed(freeze(target, 2, tensors(1)))
    for number in range(12):
        gather = Gather(2, lambda who, at, number=number: (who, at) == (rank, number))
        outcomes = freeze(target, 2, tensors(2), gather)
        if not any(isinstance(outcome, Lost) for outcome in outcomes):
            break
        assert equal(target, 2, tensors(1)) or equal(target, 2, tensors(2)), number
        assert not failed(freeze(target, 2, tensors(1)))
        assert len(list(target.parent.iterdir())) == 3
    else:
        raise AssertionError("it never went through")
    assert number > 6


def test_rank_that_cannot_be_read(target):
    """All fail together, in the step in which they look at their storages."""
    outcomes = freeze(target, 2, lambda rank: {"a": noise(1)})
    assert not failed(outcomes)
    before = {path.name for path in target.parent.iterdir()}
    with pytest.MonkeyPatch.context() as patch:

        def broken(captured, storage):
            raise OSError(5, "Input/output error")

        patch.setattr(once, "marks", lambda captured, size, mark: broken(captured, 0))
        outcomes = freeze(target, 2)
    assert [type(outcome) for outcome in outcomes] == [OSError, OSError]
    assert {path.name for path in target.parent.iterdir()} == before


def test_rank_killed_while_it_writes(target):
    """Its hidden file is all that is left, and the next freeze removes it."""
    from thaw_vllm.transport.writer import StagedFile

    def prepare(rank):
        from tests.weights import worlds

        def frozen(path, value, number, world, exchange):
            options = FreezeOptions(force=True, workers=1, once=True)
            header = Header(Identity("raw", engine="vllm", parallel=Parallel(tp_rank=number, tp_size=world)))
            captured = capture([("w", "parameter", noise(int(value))), ("own", "parameter", noise(50 + number))], [])
            return freeze_rank(path, header, captured, options, exchange, lambda: MODEL)

        worlds.freeze_one = frozen
        if rank == 1:
            write = StagedFile.write_bulk

            def killed(self, *arguments):
                write(self, *arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            StagedFile.write_bulk = killed

    assert -signal.SIGKILL in freeze_processes(target, 1, 2, prepare)
    assert not target.exists()
    for path in target.parent.iterdir():
        assert path.name.startswith(".") and path.name.endswith(".thaw-part")
    assert not failed(freeze(target, 2))
    assert equal(target, 2)
    assert len(list(target.parent.iterdir())) == 3
    assert freeze_small(target, 1.0, 0, 1, lambda message: [message]).kept == 0
