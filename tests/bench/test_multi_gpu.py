"""``thaw bench multi-gpu`` without GPUs: ranks that restore into host memory, at once."""

import dataclasses
import os
import signal
import time

import pytest

from thaw_vllm.bench import ceilings, multi_gpu, together
from thaw_vllm.bench.process import ChildError
from thaw_vllm.bench.record import Record
from thaw_vllm.bench.rounds import Entry


@pytest.fixture
def settings(memory_path):
    limits = ceilings.Settings("cpu", 1 << 20, 1, 1)
    return multi_gpu.Settings(("cpu", "cpu"), (memory_path,), ("h2d", "restore"), 0.01, 2, 1, False, limits)


@pytest.fixture
def children():
    """Those that this test has left; others, such as a zygote of other tests, may be there already."""

    def now():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = now()

    def left():
        deadline = time.monotonic() + 30
        while (found := now() - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        return sorted(found)

    return left


def test_all_ranks_and_one(settings, memory_path):
    said = []
    outcome = multi_gpu.measure(settings, said.append)
    assert [m.work for m in outcome.missed] == ["h2d"]
    one, both = outcome.records
    assert (one.work, one.route, both.route) == ("tp2-restore", "tmpfs, 1 rank", "tmpfs, 2 ranks")
    assert both.bytes == 2 * one.bytes and one.equal is both.equal is True and both.verified
    assert len(one.seconds) == len(both.seconds) == 2
    assert [len(ranks) for ranks in both.extra["rank_seconds"]] == [2, 2]
    assert all(max(ranks) <= whole for ranks, whole in zip(both.extra["rank_seconds"], both.seconds, strict=True))
    assert min(both.extra["residency"]) > 0.99 and both.extra["devices"] == ["cpu", "cpu"]
    assert [*memory_path.iterdir()] == [] and any("round 2 of 2" in line for line in said)


def test_files_that_are_kept_are_found_again(settings, memory_path):
    kept = dataclasses.replace(settings, keep=True, runs=1, works=("restore",))
    multi_gpu.measure(kept, lambda _: None)
    before = {path: path.stat().st_mtime_ns for path in memory_path.rglob("*.thaw")}
    assert len(before) == 2
    said = []
    multi_gpu.measure(kept, said.append)
    assert {path: path.stat().st_mtime_ns for path in memory_path.rglob("*.thaw")} == before
    assert not any("making" in line for line in said)


def test_a_rank_of_other_bytes(settings, memory_path):
    kept = dataclasses.replace(settings, keep=True, runs=1, works=("restore",))
    multi_gpu.measure(kept, lambda _: None)
    _, second = sorted(memory_path.rglob("*.thaw"))
    data = bytearray(second.read_bytes())
    data[-5000] ^= 1
    times = second.stat()
    second.write_bytes(data)
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    outcome = multi_gpu.measure(kept, lambda _: None)
    assert [record.route for record in outcome.records] == ["tmpfs, 1 rank"]
    (missed,) = outcome.missed
    assert missed.route == "tmpfs, 2 ranks" and "damaged" in missed.why


def test_how_much_faster_all_are_together():
    def record(work, ranks, seconds, **extra):
        return Record(
            work, "thaw", f"{ranks}", ranks * 10**9, [seconds], "warm", True, True, None, {"ranks": ranks} | extra
        )

    outcome = multi_gpu.Outcome(
        [
            record("h2d", 1, 1.0),
            record("h2d", 4, 1.25),
            record("tp4-restore", 1, 1.0, medium="tmpfs"),
            record("tp4-restore", 4, 2.0, medium="tmpfs"),
            record("tp4-restore", 1, 1.0, medium="disk"),
        ]
    )
    grown = {("h2d", ""): pytest.approx(3.2), ("tp4-restore", "tmpfs"): pytest.approx(2.0)}
    assert multi_gpu.growth(outcome) == grown
    shown = {row[0]: row[6] for row in multi_gpu.rows(outcome)[1:]}
    assert shown == {"h2d: 1": "", "h2d: 4": "3.20", "tp4-restore: 1": "", "tp4-restore: 4": "2.00"}


def test_what_all_have_of_one_read():
    """Four have it in 1.25 times the time of one: 3.2 times as much."""
    records = [
        Record("broadcast", "thaw", "1 rank", 10**9, [1.0], "warm", True, True, None, {"ranks": 1}),
        Record("broadcast", "thaw", "4 ranks", 10**9, [1.25], "warm", True, True, None, {"ranks": 4}),
    ]
    assert multi_gpu.growth(multi_gpu.Outcome(records)) == {("broadcast", ""): pytest.approx(3.2)}


def test_a_peer_and_one_read_for_all(settings, memory_path, children):
    outcome = multi_gpu.measure(
        dataclasses.replace(settings, works=("peer", "tcp", "broadcast"), runs=1), lambda _: None
    )
    assert outcome.missed == []
    found = [(record.work, record.route, record.equal, record.verified) for record in outcome.records]
    assert found == [
        ("peer-cpu", "cpu → cpu", True, True),
        ("tcp-loopback", "8 connections", None, False),
        ("tcp", "cpu → cpu, loopback", True, True),
        ("broadcast", "one read, 1 rank", True, True),
        ("broadcast", "one read, 2 ranks", True, True),
    ]
    assert outcome.records[0].extra["way"].startswith("peer: ") and "gloo" in outcome.records[4].extra["way"]
    assert " over TCP → " in outcome.records[2].extra["way"] and outcome.records[1].bytes == 1 << 20
    assert [*memory_path.iterdir()] == [] and children() == []


def test_a_peer_that_cannot_be_started(settings, memory_path, monkeypatch):
    """The others go on."""
    real = multi_gpu.Child

    def child(task, request):
        return real(task, request | {"shape": {"nonsense": 1}})

    monkeypatch.setattr(multi_gpu, "Child", child)
    outcome = multi_gpu.measure(dataclasses.replace(settings, works=("peer", "broadcast"), runs=1), lambda _: None)
    assert [missed.work for missed in outcome.missed] == ["peer"] and len(outcome.records) == 2


@pytest.mark.parametrize(
    ("names", "count", "visible", "found"),
    [
        (None, None, 3, ("cuda:0", "cuda:1", "cuda:2")),
        (None, 2, 3, ("cuda:0", "cuda:1")),
        (["cpu", "cpu"], None, 0, ("cpu", "cpu")),
    ],
)
def test_which_devices(names, count, visible, found):
    assert multi_gpu.devices(names, count, visible) == found


@pytest.mark.parametrize(("count", "visible", "said"), [(None, 0, "--device cpu"), (4, 2, "a smaller --gpus")])
def test_devices_that_are_not_there(count, visible, said):
    with pytest.raises(ValueError, match=said):
        multi_gpu.devices(None, count, visible)


def test_one_that_fails_ends_the_others(settings, memory_path, children):
    entries = [
        Entry("a", "a", "disk-read", {"path": str(memory_path / "none"), "bytes": 1, "runs": 1, "threads": 1}),
        Entry("b", "b", "disk-read", {"path": str(memory_path / "none"), "bytes": 1, "runs": 1, "threads": 1}),
    ]
    with pytest.raises(ChildError):
        together.run(entries, lambda _: None)
    assert children() == []


def test_an_interruption(settings, memory_path, monkeypatch, children):
    """What was measured stays, the files do not."""
    real, calls = together.run, []

    def run(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(together, "run", run)
    outcome = multi_gpu.measure(dataclasses.replace(settings, works=("restore",)), lambda _: None)
    assert outcome.interrupted and [*memory_path.iterdir()] == [] and children() == []
