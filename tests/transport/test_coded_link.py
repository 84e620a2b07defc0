"""Compressed ranges on their way to a GPU; the GPU is made up (driver.py), its kernels are numpy."""

import contextlib
import ctypes
import random

import numpy as np
import pytest
import torch
from tests.transport.test_reading_helpers import kill, no_children, unmoved  # noqa: F401 - fixtures

from thaw_vllm.codecs import planes
from thaw_vllm.errors import CorruptionError, DeviceError
from thaw_vllm.transport import coded_link, cuda, parallel
from thaw_vllm.transport.checksum import damaged, wordsum
from thaw_vllm.transport.coded_link import CodedLink, Scratch
from thaw_vllm.transport.cuda import Stream
from thaw_vllm.transport.pipeline import Range, deliver
from thaw_vllm.transport.plan import BLOCK
from thaw_vllm.transport.readers import Cached, choose
from thaw_vllm.transport.reading_helpers import Helpers
from thaw_vllm.transport.resident import Resident
from thaw_vllm.transport.source import FileSource, MemorySource
from thaw_vllm.transport.staging import address_of

pytestmark = pytest.mark.usefixtures("no_leaks", "no_children")

ROOM = 4 * BLOCK


def data_of(kind, elements, seed):
    """Bytes that some of the planes of are coded."""
    normal = np.random.default_rng(seed).normal(0, 0.02, elements).astype(np.float32)
    halves = (normal.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "bfloat16":
        return halves.tobytes(), 2
    if kind == "float32":
        return normal.tobytes(), 4
    if kind == "widened":  # two coded planes
        return (halves.astype(np.uint32) << 16).tobytes(), 4
    if kind == "bytes":
        return np.abs(normal * 500).astype(np.uint8).tobytes(), 1
    return random.Random(seed).randbytes(2 * elements), 2


KINDS = ["bfloat16", "raw", "float32", "widened", "bytes"]


class Work:
    """Chunks of each kind in one source, and where they go."""

    def __init__(self, count, elements, kinds=KINDS, shift=0, tail=3, device="cpu"):
        self.data, stored, coded = [], [], []
        for number in range(count):
            data, width = data_of(kinds[number % len(kinds)], elements, number)
            data += bytes(range(tail))
            frame = planes.encode(memoryview(data), width)
            assert (frame is None) == (kinds[number % len(kinds)] == "raw")
            self.data.append(data)
            stored.append(frame or data)
            coded.append(frame is not None)
        self.ranges, self.file, at = [], bytearray(), 0
        for number, (data, bytes_) in enumerate(zip(self.data, stored, strict=True)):
            self.ranges.append(Range(at, len(bytes_), wordsum(memoryview(data)), f"chunk {number}", coded[number]))
            self.file += bytes_ + bytes(-len(bytes_) % BLOCK)
            at = len(self.file)
        self.room = torch.zeros(sum(len(data) + 32 for data in self.data) + 64, dtype=torch.uint8, device=device)
        self.runs, place = [], self.room.data_ptr() + -self.room.data_ptr() % 16 + shift
        for data in self.data:
            self.runs.append((place, len(data)))
            place += len(data) + -len(data) % 16
        self.stored = [found.length if found.coded else 0 for found in self.ranges]

    def damage(self, number):
        found = self.ranges[number]
        return damaged("it", found.label, found.offset, found.length)

    def link(self):
        return CodedLink(0, self.runs, self.stored, self.damage)

    def sent_with_a_flipped_bit(self, send, rng, within=None):
        """Of a compressed chunk, not between the parts of its frame; told, or of no use."""
        number = rng.choice([n for n, found in enumerate(self.ranges) if found.coded])
        found = self.ranges[number]
        head = bytes(self.file[found.offset : found.offset + planes.HEAD])
        gaps = planes.gaps(planes.layout(head, len(self.data[number]), found.length))
        between = {at for low, high in gaps for at in range(low, high)}
        at = rng.choice([at for at in range(within or found.length) if at not in between])
        self.file[found.offset + at] ^= 1 << rng.randrange(8)
        try:
            send(self)
        except CorruptionError as error:
            assert f"chunk {number}" in str(error)
        else:  # as a bit of the last words of a block
            assert self.arrived()

    def arrived(self):
        base = self.room.data_ptr()
        room = bytes(self.room.cpu().numpy())
        return [room[at - base : at - base + size] for at, size in self.runs] == self.data


@pytest.fixture(params=["threads", "helpers"])
def send(request, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "POLL", 0.001)

    def sent(work, **options):
        with contextlib.ExitStack() as stack:
            if request.param == "threads":
                source = stack.enter_context(contextlib.closing(MemorySource(bytes(work.file))))
                reader = Cached(source, "memory", "a test")
            else:
                (tmp_path / "file").write_bytes(work.file)
                source = stack.enter_context(FileSource(tmp_path / "file"))
                reader = stack.enter_context(contextlib.closing(choose(source, "cached")))
                helpers = stack.enter_context(Helpers(0, 3, slot=ROOM))
                stack.enter_context(helpers.reading(source))
                options["helpers"] = helpers
            link = stack.enter_context(contextlib.closing(work.link()))
            return deliver(reader, "it", work.ranges, link, workers=3, slot=ROOM, **options)

    return sent


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
def test_every_kind(shift, verify, send, driver):
    work = Work(20, 40 * planes.ROW, shift=shift)
    told = []
    send(work, verify=verify, progress=told.append)
    assert work.arrived() and sum(told) == sum(found.length for found in work.ranges)


def test_several_blocks(send, driver):
    work = Work(5, 2 * planes.BLOCK + 3 * planes.ROW)
    send(work)
    assert work.arrived()


@pytest.mark.parametrize("room", [1, 2.5, 4])
def test_little_scratch(room, send, driver, monkeypatch):
    """Ranges wait for those before them."""
    work = Work(40, 3 * planes.BLOCK)
    need = max(stored + 2 * length for stored, (_, length) in zip(work.stored, work.runs, strict=True))
    monkeypatch.setattr(coded_link, "SCRATCH", int(room * need))
    send(work)
    assert work.arrived()


def test_more_than_there_are_events_for(send, driver):
    work = Work(150, 40 * planes.ROW, ["bytes"], tail=0)
    send(work)
    assert work.arrived()


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bit(seed, send, driver):
    """Of anything but what lies between the parts of a frame."""
    work, rng = Work(10, 40 * planes.ROW, tail=0), random.Random(seed)
    work.sent_with_a_flipped_bit(send, rng, planes.HEAD if seed <= 4 else None)


@pytest.mark.parametrize("place", range(0, planes.HEAD, 3))
def test_bit_of_a_head(place, send, driver):
    work = Work(10, 40 * planes.ROW, tail=0)
    work.file[work.ranges[5].offset + place] ^= 1
    with pytest.raises(CorruptionError, match="chunk 5"):
        send(work)


def test_nothing_compressed(send, driver):
    work = Work(5, 100, ["raw"])
    send(work)
    assert work.arrived() and not any(name.startswith(b"planes") for name in driver.names.values())


@pytest.fixture
def held(memory_path, driver):
    """``held(work, **options)``: sent from page-locked memory."""

    def sent(work, **options):
        (memory_path / "file").write_bytes(work.file)
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(FileSource(memory_path / "file"))
            context = stack.enter_context(contextlib.closing(cuda.Context(0)))
            reader = stack.enter_context(contextlib.closing(choose(source)))
            found = stack.enter_context(contextlib.closing(Resident(source, reader, context, 2)))
            link = stack.enter_context(contextlib.closing(work.link()))
            found.send_coded(link, work.ranges, **options)

    return sent


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("room", [1, 300])
@pytest.mark.parametrize("shift", [0, 2])
def test_from_page_locked_memory(shift, room, verify, held, monkeypatch):
    work, told = Work(90, 40 * planes.ROW, shift=shift), []
    need = max(stored + 2 * length for stored, (_, length) in zip(work.stored, work.runs, strict=True))
    monkeypatch.setattr(coded_link, "SCRATCH", int(room * need))
    held(work, verify=verify, progress=told.append)
    assert work.arrived() and sum(told) == sum(found.length for found in work.ranges)


@pytest.mark.parametrize("place", [0, 20, 3000])
def test_damage_in_page_locked_memory(place, held):
    work = Work(40, 40 * planes.ROW, tail=0)
    work.file[work.ranges[32].offset + place] ^= 1
    with pytest.raises(CorruptionError, match="chunk 32"):
        held(work, verify=True)


@pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuModuleLoadData", "cuLaunchKernel", "cuStreamCreate"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_driver_refuses(call, number, send, driver):
    """Nothing is left (see the fixtures)."""
    work = Work(20, 40 * planes.ROW)
    driver.refuse[call] = number
    try:
        send(work)
    except DeviceError:
        assert driver.refuse[call] < 0
    else:  # it was never called so often, or less memory did as well
        assert work.arrived() and (driver.refuse[call] >= 0 or call == "cuMemAlloc_v2")


@pytest.mark.parametrize("refusals", [1, 3, 30])
def test_less_memory_than_wanted(refusals, send, driver, monkeypatch):
    """Half of it, and half of that; less than one range takes is too little."""
    work, real = Work(40, 40 * planes.ROW), driver.functions["cuMemAlloc_v2"]
    asked = []

    def refusing(handle, size):
        asked.append(size)
        return 2 if len(asked) <= refusals else real(handle, size)

    monkeypatch.setitem(driver.functions, "cuMemAlloc_v2", refusing)
    if refusals < 30:
        send(work)
        assert work.arrived() and asked[0] > asked[1] and asked[refusals] < asked[0] / 1.9**refusals + 256
    else:
        with pytest.raises(DeviceError):
            send(work)
        assert asked == sorted(asked, reverse=True) and len(asked) < 10


def test_one_that_is_late_keeps_nobody_waiting(driver, monkeypatch):
    """Room for three: while the first is on its way, others take one another's place."""
    work = Work(8, 40 * planes.ROW, ["bfloat16"])
    link = work.link()
    monkeypatch.setattr(coded_link, "SCRATCH", 3 * link._need(0))
    link.close()
    with (
        contextlib.closing(work.link()) as link,
        link.context.entered(),
        contextlib.closing(Stream(link.context)) as up,
    ):
        assert link.admits(0)
        for number in range(1, 8):
            while not link.admits(number):
                assert number > 2
            found = work.ranges[number]
            stored = memoryview(bytes(work.file[found.offset : found.offset + found.length]))
            link.seen(number, stored)
            driver.call("cuMemcpyHtoDAsync_v2", link.runs[number][0], address_of(stored), len(stored), up.handle)
            up.synchronize()
            link.landed(number)
        link.settle()
    address, length = work.runs[0]
    assert not any(ctypes.string_at(address, length))
    ctypes.memmove(address, work.data[0], length)
    assert work.arrived()


@pytest.mark.parametrize("seed", range(20))
def test_scratch(seed):
    """No two parts overlap, and all of it is one part again in the end."""
    rng, scratch, taken = random.Random(seed), Scratch(1000), {}
    for _ in range(500):
        size = rng.randrange(1, 300)
        if scratch.has(size) and rng.random() < 0.6:
            at = scratch.take(size)
            assert at >= 0 and at + size <= 1000
            assert all(at + size <= other or other + length <= at for other, length in taken.items())
            taken[at] = size
        elif taken:
            at = rng.choice([*taken])
            scratch.give_back(at, taken.pop(at))
        free = 1000 - sum(taken.values())
        assert sum(end - begin for begin, end in scratch._free) == free
        assert scratch._free == sorted(scratch._free)
    for at, size in taken.items():
        scratch.give_back(at, size)
    assert scratch._free == [(0, 1000)]
    assert not Scratch(0).has(1)
