"""Memory lent to other processes: what is told, what is mapped, and what a failure leaves behind."""

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import random

import pytest
import torch

from thaw_vllm.errors import CorruptionError, DeviceError, MismatchError
from thaw_vllm.transport import cuda, lending
from thaw_vllm.transport.borrowed_gpu import number_of
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.cuda import Context
from thaw_vllm.transport.lending import Lent, borrow, borrow_whole
from thaw_vllm.transport.pipeline import Range
from thaw_vllm.transport.source import read_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = [5000, 1, 70_000, 4096]
PLACES = [(at, size) for at, size in zip(itertools.accumulate([8192, *SIZES]), SIZES, strict=False)]
DATA = random.Random(4).randbytes(sum(SIZES))


def parts():
    return [DATA[at - 8192 : at - 8192 + size] for at, size in PLACES]


def read_all(found):
    return [read_bytes(found, at, size) for at, size in PLACES]


# --- the host's -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lent_host():
    buffers = [ctypes.create_string_buffer(part, len(part)) for part in parts()]
    lent = Lent([(ctypes.addressof(one), len(one)) for one in buffers], CPU)
    told, files = lent.told()
    try:
        yield json.loads(json.dumps(told)), files
    finally:
        for file in files:
            os.close(file)


def test_host(monkeypatch):
    monkeypatch.setattr(lending, "_STEP", 4096)
    with lent_host() as (told, files):
        found = borrow(told, files, PLACES, "weights", CPU)
        assert read_all(found) == parts()
        assert read_bytes(found, PLACES[2][0] + 7, 100) == parts()[2][7:107]
        for at, size in [(0, 1), (8191, 1), (PLACES[0][0], SIZES[0] + 1), (PLACES[-1][0], 4097), (1 << 40, 1)]:
            with pytest.raises(CorruptionError, match="weights have no"):
                read_bytes(found, at, size)
        found.close()
        found.close()
        with pytest.raises(OSError):
            os.ftruncate(files[0], 1)  # a reader of what is cut off would be ended (SIGBUS)


def test_host_of_other_sizes():
    with lent_host() as (told, files):
        for other in ({"bytes": 1}, {"bytes": told["bytes"] + 1}):
            with pytest.raises(MismatchError, match="not as large"):
                borrow(other, files, PLACES, "weights", CPU)
        with pytest.raises(MismatchError, match="not as large"):
            borrow(told, [], PLACES, "weights", CPU)
        with pytest.raises(MismatchError, match="in the host's memory"):
            borrow(told, files, PLACES, "weights", GPU)
    file = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, len(DATA))
    with pytest.raises(MismatchError, match="may be cut off"):
        borrow({"bytes": len(DATA)}, [file], PLACES, "weights", CPU)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    found = borrow({"bytes": len(DATA)}, [file], PLACES, "weights", CPU)
    found.close()
    os.close(file)


def test_a_descriptor_that_is_no_memory():
    ends = os.pipe()
    with pytest.raises(MismatchError, match="cannot be borrowed as they are told of"):
        borrow({"bytes": 0}, [ends[0]], [], "weights", CPU)
    for end in ends:
        os.close(end)


def test_nothing():
    told, files = Lent([], CPU).told()
    found = borrow(told, files, [], "weights", CPU)
    assert found.size == 0
    found.close()
    os.close(files[0])


def test_other_devices():
    with pytest.raises(DeviceError, match="cannot be lent"):
        Lent([], torch.device("meta"))


# --- a GPU's, made up -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(driver, monkeypatch):
    """``gpu()``: what is told of DATA's parts in two allocations, and a target of all bytes."""
    monkeypatch.setattr(lending, "by_driver", lambda device: device.type == "cuda")
    with Context(0) as context:
        blocks = [context.driver.made("cuMemAlloc_v2", size) for size in (90_000, 8192)]
        addresses = [blocks[0] + 16, blocks[1], blocks[0] + 5016, blocks[1] + 4096]
        runs = list(zip(addresses, SIZES, strict=True))
        for (address, size), part in zip(runs, parts(), strict=True):
            ctypes.memmove(address, part, size)
        driver.current.context = 0x107

        def told():
            found, files = Lent(runs, GPU).told()
            assert files == []
            return json.loads(json.dumps(found))

        yield told, runs
        context.enter()
        for block in blocks:
            context.driver.call("cuMemFree_v2", block)
    assert not +driver.opened, "everything is unmapped"
    driver.current.context = 0x107


def ranges():
    found = []
    for (at, size), part in zip(PLACES, parts(), strict=True):
        for begin in range(0, size, 4096):
            length = min(4096, size - begin)
            sum_of = wordsum(memoryview(part)[begin : begin + length])
            found.append(Range(at + begin, length, sum_of, f"tensor of {size}", False))
    return found


def sent(source, leave=(), **options):
    """What arrives of a source; ``leave`` are runs that are not to be copied as a whole."""
    source.target = target = ctypes.create_string_buffer(len(DATA))  # which outlives copies that are under way
    base = ctypes.addressof(target) - 8192
    into = [None if number in leave else base + at for number, (at, _) in enumerate(PLACES)]
    asked = [found for found in ranges() if into[number_of(PLACES, found.offset, 1, "")] is not None]
    source.begin(into, len(asked), None)
    runs = [(base + found.offset, found.length) for found in asked]
    source.send(asked, runs, **({"verify": True} | options))
    return target.raw


def test_gpu(gpu, driver):
    told, _ = gpu
    said = told()
    assert (said["gpu"], said["device"], len(said["handles"])) == ("0000:3b:00.0", 0, 2)
    assert said["runs"] == [[0, 16, 5000], [1, 0, 1], [0, 5016, 70_000], [1, 4096, 4096]]
    found = borrow(said, [], PLACES, "weights", GPU)
    assert "cuIpcOpenMemHandle_v2" not in driver.calls
    counted = []
    assert sent(found, progress=counted.append) == DATA and sum(counted) == len(DATA)
    assert (found.where, found.over) == ("cuda:0", None)
    assert driver.calls.count("cuIpcOpenMemHandle_v2") == 2
    assert driver.current.context == 0x107, "the thread's context is as it was"
    found.close()
    found.close()


def test_a_gpu_into_host_memory(gpu):
    told, _ = gpu
    found = borrow(told(), [], PLACES, "weights", GPU)
    found.map()
    assert read_all(found) == parts()
    found.close()


def test_each_is_copied_before_the_next_is_mapped(gpu, driver):
    told, _ = gpu
    found = borrow(told(), [], PLACES, "weights", GPU)
    sent(found)
    found.close()
    wanted = ("cuIpcOpenMemHandle_v2", "cuMemcpyDtoDAsync_v2", "cuIpcCloseMemHandle")
    opening, copy, closing = wanted
    calls = [name for name in driver.calls if name in wanted]
    assert calls == [opening, copy, opening, copy, copy, copy, closing, closing]


@pytest.mark.parametrize("leave", [{0}, {1, 3}, {0, 1, 2}])
def test_runs_that_are_not_copied_as_a_whole(leave, gpu):
    told, _ = gpu
    found = borrow(told(), [], PLACES, "weights", GPU)
    arrived = sent(found, leave)
    for number, (at, size) in enumerate(PLACES):
        part = parts()[number]
        assert arrived[at - 8192 : at - 8192 + size] == (bytes(size) if number in leave else part)
        if number in leave:
            assert read_bytes(found, at, size) == part
    found.close()


def test_copies_that_nobody_waited_for(gpu):
    """They are done with when it is closed: then their targets may go."""
    told, _ = gpu
    found = borrow(told(), [], PLACES, "weights", GPU)
    target = ctypes.create_string_buffer(len(DATA))
    found.begin([ctypes.addressof(target) + at - 8192 for at, _ in PLACES], 4)
    assert target.raw != DATA
    found.close()
    assert target.raw == DATA


@pytest.mark.parametrize(
    ("others", "reaches", "over"),
    [((b"0000:ff:00.0",), "NVLink", "NVLink"), ((b"0000:ff:00.0",), "PCI", "PCI Express"), ((), None, "peer access")],
)
def test_another_gpu(others, reaches, over, gpu, driver):
    told, _ = gpu
    driver.others, driver.reaches = others, reaches
    found = borrow(told() | {"gpu": "0000:ff:00.0", "device": 3}, [], PLACES, "weights", GPU)
    assert (found.where, found.over) == ("cuda:3", over)
    assert sent(found) == DATA
    found.close()


def test_a_gpu_that_is_not_reached(gpu, driver):
    told, _ = gpu
    driver.others, driver.reaches = (b"0000:ff:00.0",), None
    with pytest.raises(DeviceError, match="cuda:0 has no peer access to the GPU 0000:ff"):
        borrow(told() | {"gpu": "0000:ff:00.0"}, [], PLACES, "weights", GPU)


def test_damage_on_a_gpu_is_found(gpu):
    told, runs = gpu
    ctypes.memset(runs[2][0] + 5000, parts()[2][5000] ^ 1, 1)
    with (
        contextlib.closing(borrow(told(), [], PLACES, "weights", GPU)) as found,
        pytest.raises(CorruptionError, match="the checksum of tensor of 70000 "),
    ):
        sent(found)
    with contextlib.closing(borrow(told(), [], PLACES, "weights", GPU)) as found:
        assert sent(found, verify=False) != DATA


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "call",
    ["cuIpcOpenMemHandle_v2", "cuMemcpyDtoDAsync_v2", "cuStreamCreate", "cuLaunchKernel"],
)
def test_a_driver_that_refuses(call, number, gpu, driver):
    """Everything is given back, and nothing is unmapped under a copy."""
    told, _ = gpu
    said = told()
    driver.refuse[call] = number
    with (
        pytest.raises(DeviceError, match=f"CUDA's {call.partition('_')[0]} failed"),
        contextlib.closing(borrow(said, [], PLACES, "weights", GPU)) as found,
    ):
        sent(found)


def test_memory_without_handles(gpu, driver):
    told, _ = gpu
    driver.refuse["cuIpcGetMemHandle"] = 1
    with pytest.raises(DeviceError, match=r"lends none of this memory .*expandable segments"):
        told()


def test_a_run_across_two_allocations(gpu, driver):
    with pytest.raises(DeviceError, match="reaches from one allocation"):
        Lent([(next(iter(driver.memory)) + 5, 90_000)], GPU)


@pytest.mark.parametrize(
    "change",
    [
        {"handles": ["00"]}, {"handles": 5}, {"runs": [[0, 16, 5000]] * 3 + [[2, 0, 4096]]}, {"runs": [[0, -1, 5000]]},
        {"runs": [[0, True, 5000]]}, {"gpu": None}, {"gpu": "\ud800"}, {"gpu": ""},
        {"device": "0"}, {"runs": None}, {"runs": [[0, 1]]},
    ],
)  # fmt: skip
def test_told_in_other_words(change, gpu):
    told, _ = gpu
    with pytest.raises(MismatchError, match="in other words"):
        borrow(told() | change, [], PLACES, "weights", GPU)


@pytest.mark.parametrize("at", [90_000 - 70_000 + 1, 1 << 70])
def test_told_of_more_than_is_mapped(at, gpu, monkeypatch):
    told, _ = gpu
    said = told()
    said["runs"][2][1] = 90_000 - 70_000
    with contextlib.closing(borrow(said, [], PLACES, "weights", GPU)) as found:
        found.map()
    said["runs"][2][1] = at
    for use in (lambda found: found.map(), sent):
        with (
            contextlib.closing(borrow(said, [], PLACES, "weights", GPU)) as found,
            pytest.raises(MismatchError, match="beyond the memory that is lent"),
        ):
            use(found)
    monkeypatch.setattr(lending, "device_at", lambda bus: 0)
    with pytest.raises(MismatchError, match="beyond the memory that is lent"):
        borrow_whole(said, [], "weights")
    assert cuda.driver().contexts == 1


def test_a_driver_that_does_not_tell_how_much_it_has_mapped(gpu, driver):
    told, _ = gpu
    said = told()
    driver.refuse["cuMemGetAddressRange_v2"] = 0
    found = borrow(said, [], PLACES, "weights", GPU)
    assert sent(found) == DATA
    found.close()


def test_told_of_other_sizes(gpu):
    told, _ = gpu
    said = told()
    with pytest.raises(MismatchError, match="not as large"):
        borrow(said | {"runs": said["runs"][:3]}, [], PLACES, "weights", GPU)
    with pytest.raises(MismatchError, match="in a GPU's memory"):
        borrow(said, [], PLACES, "weights", CPU)
    assert cuda.driver().contexts == 1
