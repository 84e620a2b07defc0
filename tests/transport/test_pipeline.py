import _thread
import contextlib
import os
import random
import threading

import pytest
import torch

from thaw_vllm.errors import CorruptionError, DeviceError, StorageError
from thaw_vllm.transport import links, medium, pipeline
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.links import Place, TorchLink, link_to
from thaw_vllm.transport.pipeline import SLOT, Range, deliver
from thaw_vllm.transport.plan import BLOCK
from thaw_vllm.transport.readers import Cached, Direct, choose
from thaw_vllm.transport.source import FileSource, MemorySource
from thaw_vllm.transport.staging import Staging, address_of

pytestmark = pytest.mark.usefixtures("no_leaks")

ROOM = 5 * BLOCK
"""Bytes of a slot here: three blocks and the margin of direct reads."""

LAYOUTS = {
    "one byte": [(0, 1)],
    "one byte after a gap": [(12_345, 1)],
    "thousands of tiny ones": [(number % 7, 1 + number % 29) for number in range(4000)],
    "larger than every slot": [(100, 40 * ROOM + 3)],
    "blocks": [(0, BLOCK)] * 50,
    "gaps": [(BLOCK * (number % 4) + 1, 3000) for number in range(60)],
    "empty ones": [(0, 0), (5, 0), (1, 100), (0, 0), (9000, 10), (0, 0)],
    "of every kind": [(0, 3), (61, 7 * ROOM), (0, 1), (0, 1), (3 * ROOM, ROOM), (1, 2 * ROOM + 1), (0, 0), (0, 5)],
    "none": [],
}


class Work:
    """Ranges of a source's bytes, and where they go: one tensor, the ranges in reverse order with gaps of their own."""

    def __init__(self, layout, seed=0):
        at, spans = 0, []
        for gap, length in layout:
            spans.append((at + gap, length))
            at += gap + length
        self.data = bytearray(random.Random(seed).randbytes(at + 999))
        self.ranges = [
            Range(offset, length, wordsum(memoryview(self.data)[offset : offset + length]), f"tensor {number}")
            for number, (offset, length) in enumerate(spans)
        ]
        self.total = sum(length for _, length in spans)
        self.target = torch.zeros(self.total + 3 * len(spans) + 3, dtype=torch.uint8)
        self.places, end = [], self.target.numel()
        for _, length in spans:
            end -= length + 3
            self.places.append(Place(self.target, end, length))

    def expected(self):
        found = torch.zeros_like(self.target)
        for found_range, place in zip(self.ranges, self.places, strict=True):
            data = self.data[found_range.offset : found_range.offset + place.length]
            if data:
                found[place.begin : place.begin + place.length] = torch.frombuffer(data, dtype=torch.uint8)
        return found

    def arrived(self):
        return torch.equal(self.target, self.expected())


def host(work):
    """The link to its places."""
    return TorchLink(work.places, "cpu")


@pytest.fixture(params=["memory", "cached", "chosen", "direct", "direct, plainly", "peek", "peek, plainly"])
def opened(request, tmp_path, memory_path, monkeypatch):
    """``opened(work)``: a reader of its bytes, of each kind."""
    kind = request.param
    with contextlib.ExitStack() as stack:

        def make(work):
            if kind == "memory":
                source = stack.enter_context(contextlib.closing(MemorySource(work.data)))
                return Cached(source, "memory", "a test")
            directory = tmp_path if kind in ("chosen", "direct", "peek") else memory_path
            (directory / "source.bin").write_bytes(work.data)
            source = stack.enter_context(FileSource(directory / "source.bin"))
            if kind == "cached":
                return Cached(source, "page cache", "a test")
            if kind == "chosen":
                return stack.enter_context(contextlib.closing(choose(source)))
            if kind.endswith("plainly"):
                monkeypatch.setattr(medium, "_DIRECT", 0)
            try:
                return stack.enter_context(Direct(source, "a test", peek=kind.startswith("peek")))
            except OSError as refused:
                pytest.skip(f"no direct I/O here: {refused.strerror}")

        yield make


@pytest.fixture
def reader():
    """``reader(work)``: of its bytes in memory."""
    with contextlib.ExitStack() as stack:

        def make(work):
            return Cached(stack.enter_context(contextlib.closing(MemorySource(work.data))), "memory", "a test")

        yield make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_arrives(layout, opened, monkeypatch):
    # torch's sum takes a millisecond for the smallest range; test_wordsum_torch.py holds it against this one.
    monkeypatch.setattr(links, "wordsum", lambda view: wordsum(memoryview(view.numpy())))
    work = Work(LAYOUTS[layout])
    reader = opened(work)
    for workers in (1, 3):
        work.target.zero_()
        counted = []
        deliver(reader, "it", work.ranges, host(work), workers=workers, slot=ROOM, progress=counted.append)
        assert work.arrived()
        assert sum(counted) == work.total
        assert all(count > 0 for count in counted)


def test_slots_of_their_usual_size(opened):
    work = Work([(10, 4 * SLOT + 1), (5000, 100), (0, SLOT)])
    deliver(opened(work), "it", work.ranges, host(work), workers=2)
    assert work.arrived()


def test_link_for_the_host():
    work = Work([(0, 10)])
    assert isinstance(link_to(work.places), TorchLink)
    assert link_to(work.places).name == "torch copies to cpu"


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_byte_is_found_and_named(seed, reader):
    work, rng = Work(LAYOUTS["of every kind"]), random.Random(seed)
    number = rng.choice([n for n, found in enumerate(work.ranges) if found.length])
    hurt = work.ranges[number]
    at = hurt.offset + rng.choice([0, hurt.length - 1, rng.randrange(hurt.length)])
    work.data[at] ^= 1 << rng.randrange(8)
    words = rf"'it' is damaged: the checksum of tensor {number} \(bytes {hurt.offset} to {hurt.offset + hurt.length}\) "
    with pytest.raises(CorruptionError, match=words + "does not agree; copy the file again or freeze again"):
        deliver(reader(work), "it", work.ranges, host(work), workers=3, slot=ROOM)
    deliver(reader(work), "it", work.ranges, host(work), workers=3, slot=ROOM, verify=False)
    assert work.arrived()


def test_first_of_several_damaged_is_named(reader):
    work = Work([(0, ROOM)] * 20)
    for number in (17, 4, 9):
        work.data[work.ranges[number].offset] ^= 1
    with pytest.raises(CorruptionError, match="checksum of tensor 4 "):
        deliver(reader(work), "it", work.ranges, host(work), workers=4, slot=ROOM)


def test_bytes_between_ranges_do_not_matter(reader):
    work = Work([(10, 100), (10, 100)])
    work.data[0] ^= 1
    work.data[115] ^= 1
    deliver(reader(work), "it", work.ranges, host(work), workers=2, slot=ROOM)
    assert work.arrived()


def test_sum_is_taken_where_the_bytes_arrived(reader):
    """A copy that goes wrong is found, not only a file that is."""

    class Wrong(TorchLink):
        @contextlib.contextmanager
        def lane(self, slot):
            with super().lane(slot) as lane:
                real = lane.send

                def send(step, head):
                    real(step, head)
                    if step.cuts[0].range == 0:
                        work.places[0].bytes()[3] ^= 4

                lane.send = send
                yield lane

    work = Work([(0, 100), (90_000, 100)])
    with pytest.raises(CorruptionError, match="checksum of tensor 0 "):
        deliver(reader(work), "it", work.ranges, Wrong(work.places, "cpu"), workers=2, slot=ROOM)


def test_source_that_ends_early(opened):
    work = Work([(0, 40 * ROOM)])
    reader = opened(work)
    ranges = [Range(0, len(work.data) + 1, 0, "tensor")]
    target = torch.zeros(len(work.data) + 1, dtype=torch.uint8)
    with pytest.raises(CorruptionError, match="bytes were needed"):
        deliver(reader, "it", ranges, TorchLink([Place(target, 0, len(target))], "cpu"), workers=3, slot=ROOM)


def test_file_that_is_cut_meanwhile(tmp_path):
    work = Work([(0, 40 * ROOM)])
    (tmp_path / "f").write_bytes(work.data)
    with FileSource(tmp_path / "f") as source, contextlib.closing(choose(source)) as reader:
        real = reader.read

        def read(offset, length, view):
            os.truncate(tmp_path / "f", 10 * ROOM + 5)
            return real(offset, length, view)

        reader.read = read
        with pytest.raises(CorruptionError, match=r"ends at \d+, \d+ bytes were needed"):
            deliver(reader, "it", work.ranges, host(work), workers=3, slot=ROOM)


# --- errors -----------------------------------------------------------------------------------------------------------


class Failing:
    """A reader, a link, its lanes and its sums, one of which fails at the nth call of one of its methods."""

    margin, route, why = 0, "", ""

    def __init__(self, where, error, number, reader, link):
        self.where, self.error, self.left, self.reader, self.link = where, error, number, reader, link
        self.lock, self.inside = threading.Lock(), 0

    def count(self, where):
        with self.lock:
            if where == self.where:
                self.left -= 1
                if self.left < 0:
                    raise self.error

    def read(self, offset, length, view):
        self.count("read")
        return self.reader.read(offset, length, view)

    @contextlib.contextmanager
    def lane(self, slot):
        self.count("lane")
        with self.lock:
            self.inside += 1
        try:
            with self.link.lane(slot) as lane:
                yield Watched(self, lane, ("send",))
        finally:
            with self.lock:
                self.inside -= 1

    def admits(self, number):
        self.count("admits")
        return self.link.admits(number)

    def landed(self, number):
        self.count("landed there")
        self.link.landed(number)

    def settle(self):
        self.count("settle")
        self.link.settle()

    @contextlib.contextmanager
    def sums(self, count):
        self.count("sums")
        with self.link.sums(count) as sums:
            yield Watched(self, sums, ("add", "results"))


class Watched:
    def __init__(self, owner, real, names):
        for name in names:
            setattr(self, name, self.watched(owner, name, getattr(real, name)))

    def watched(self, owner, name, real):
        def call(*arguments):
            owner.count(name)
            return real(*arguments)

        return call


@pytest.mark.parametrize("error", [StorageError("device"), DeviceError("device"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize(
    "where",
    [
        *("read", "lane", "send", "sums", "add", "results", "progress", "admit", "landed"),
        *("admits", "landed there", "settle"),
    ],
)
def test_error_is_raised_once_everything_has_ended(where, number, error, reader):
    work = Work([(0, 30_000)] * 40)
    failing = Failing(where, error, number, reader(work), host(work))
    seen = []

    def progress(count):
        seen.append(count)
        failing.count("progress")

    def go():
        calls = {where: lambda _, where=where: failing.count(where) or True for where in ("admit", "landed")}
        deliver(failing, "it", work.ranges, failing, workers=3, slot=ROOM, progress=progress, **calls)

    # These are called a number of times that depends on the threads' luck, or once.
    rare = {"lane": 3, "settle": 1, "sums": 1, "add": 1, "results": 1, "progress": 1}
    if number >= rare.get(where, 100):
        with contextlib.suppress(type(error)):
            go()
    else:
        with pytest.raises(type(error)) as raised:
            go()
        assert raised.value is error
    assert failing.inside == 0
    assert not any(thread.name.startswith("thaw-") for thread in threading.enumerate())


def test_error_stops_the_rest(reader):
    work = Work([(0, ROOM)] * 400)
    failing = Failing("read", StorageError("device"), 3, reader(work), host(work))
    with pytest.raises(StorageError):
        deliver(failing, "it", work.ranges, failing, workers=3, slot=ROOM)
    assert -failing.left <= 3  # at most one more of each other thread


def test_ctrl_c_while_threads_read(reader, interruptible):
    work = Work([(0, ROOM)] * 400)
    source, begun = reader(work), []

    class Slow:
        margin = 0

        def read(self, offset, length, view):
            begun.append(offset)
            if len(begun) == 5:
                _thread.interrupt_main()
            return source.read(offset, length, view)

    link = Failing("", None, 0, source, host(work))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):  # the signal may come when one round has ended
            deliver(Slow(), "it", work.ranges, link, workers=3, slot=ROOM)
    assert link.inside == 0


@pytest.mark.parametrize("ranges", [[Range(10, 10, 0, "a"), Range(0, 10, 0, "b")]])
def test_ranges_out_of_order(ranges, reader):
    work = Work([(0, 10), (0, 10)])
    with pytest.raises(ValueError, match="range 1 begins at 0"):
        deliver(reader(work), "it", ranges, host(work), workers=2, slot=ROOM)


@pytest.mark.parametrize("slot", [BLOCK, ROOM + 1])
def test_slot_size(slot, reader):
    work = Work([(0, 10)])
    with pytest.raises(ValueError, match="bytes"):
        deliver(reader(work), "it", work.ranges, host(work), workers=2, slot=slot)


def test_places_need_be_known_only_when_their_ranges_begin(reader):
    """In order, each once, and each is told to have landed once it is in place."""
    work = Work(LAYOUTS["of every kind"])
    known, places, told, refused = [], work.places, [], []
    work.places = known

    def admit(number):
        assert number == len(known)
        refused.append(number)
        if number % 3 == 0 and refused.count(number) < 3:
            return False
        known.append(places[number])
        return True

    def landed(number):
        found = work.ranges[number]
        assert places[number].bytes().numpy().tobytes() == work.data[found.offset : found.offset + found.length]
        told.append(number)

    deliver(reader(work), "it", work.ranges, host(work), workers=3, slot=ROOM, admit=admit, landed=landed)
    assert work.arrived()
    assert sorted(told) == list(range(len(work.ranges)))


def test_room_that_comes_only_when_what_was_admitted_has_landed(reader):
    """Ranges that would share a read are read apart then, and nothing waits for itself."""
    work = Work([(0, 100)] * 50)
    under_way, most = set(), []

    def admit(number):
        if len(under_way) >= 2:
            return False
        under_way.add(number)
        most.append(len(under_way))
        return True

    deliver(reader(work), "it", work.ranges, host(work), workers=3, slot=ROOM, admit=admit, landed=under_way.discard)
    assert work.arrived()
    assert max(most) == 2 and not under_way


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "total", "slots"), [(1, 50, 1), (4, 50, 4), (16, 3, 3), (16, 1, 1), (0, 9, 1), (16, 50, 6)]
)
def test_staging_memory_is_bounded(workers, total, slots, reader, monkeypatch):
    made, used = [], set()

    class Counted(Staging):
        def __init__(self, count, size):
            made.append((count, size))
            super().__init__(count, size)

    monkeypatch.setattr(pipeline, "Staging", Counted)
    monkeypatch.setattr(pipeline, "RING", 7 * ROOM - 1)
    work = Work([(0, ROOM)] * total)
    source = reader(work)

    class Watching:
        margin = 0

        def read(self, offset, length, view):
            used.add(address_of(view))
            assert view.nbytes == ROOM
            return source.read(offset, length, view)

    deliver(Watching(), "it", work.ranges, host(work), workers=workers, slot=ROOM)
    assert work.arrived()
    assert made == [(slots, ROOM)]
    assert len(used) <= slots
