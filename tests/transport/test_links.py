"""The way to a GPU against a made-up driver (driver.py); tests/gpu holds it against a real one."""

import contextlib
import random

import pytest
import torch
from tests.transport.driver import OTHERS
from tests.transport.test_pipeline import LAYOUTS, ROOM, Work

from thaw_vllm.errors import CorruptionError, DeviceError, StorageError
from thaw_vllm.transport import cuda, resident
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.links import CudaLink
from thaw_vllm.transport.pipeline import deliver
from thaw_vllm.transport.readers import Cached, choose
from thaw_vllm.transport.resident import Resident
from thaw_vllm.transport.source import FileSource, MemorySource
from thaw_vllm.transport.wordsum_cuda import CudaSums, Kernel

pytestmark = pytest.mark.usefixtures("no_leaks")

OURS = 0x100


@pytest.fixture(autouse=True)
def unmoved(driver):
    """The calling thread stays in the context that it was in."""
    yield
    assert driver.current.context == OTHERS


def runs_of(work):
    return [(place.view.data_ptr() + place.begin, place.length) for place in work.places]


def sent(work, kernel=None, **options):
    with (
        contextlib.closing(MemorySource(work.data)) as source,
        contextlib.closing(CudaLink(0, runs_of(work), kernel)) as link,
    ):
        deliver(Cached(source, "memory", "a test"), "it", work.ranges, link, slot=ROOM, **options)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "none"])
def test_every_byte_arrives(layout, workers, verify, driver):
    work, counted = Work(LAYOUTS[layout]), []
    sent(work, workers=workers, verify=verify, progress=counted.append)
    assert work.arrived()
    assert sum(counted) == work.total
    assert ("cuLaunchKernel" in driver.calls) == verify


@pytest.mark.parametrize("seed", range(10))
def test_flipped_byte_is_found(seed, driver):
    work, rng = Work(LAYOUTS["of every kind"]), random.Random(seed)
    hurt = rng.choice([found for found in work.ranges if found.length])
    work.data[hurt.offset + rng.randrange(hurt.length)] ^= 1 << rng.randrange(8)
    with pytest.raises(CorruptionError, match=f"checksum of {hurt.label} "):
        sent(work, workers=3)
    assert driver.idle()


def test_a_kernel_is_borrowed_again_and_again(driver):
    with contextlib.closing(Kernel(0)) as kernel:
        for damage in (False, True):
            work = Work(LAYOUTS["of every kind"])
            if damage:
                work.data[next(found.offset for found in work.ranges if found.length)] ^= 1
            with pytest.raises(CorruptionError) if damage else contextlib.nullcontext():
                sent(work, kernel, workers=3)
    assert driver.calls.count("cuModuleLoadData") == 1
    assert driver.idle()


CALLS = ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuStreamCreate", "cuMemAlloc_v2"]
CALLS += ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuMemsetD8Async", "cuMemcpyDtoHAsync_v2"]
CALLS += ["cuDeviceGetPCIBusId", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("call", CALLS)
def test_driver_that_refuses(call, number, driver):
    """Everything is given back, and nothing is unlocked or freed under a copy."""
    if number and call not in ("cuMemcpyHtoDAsync_v2", "cuStreamSynchronize", "cuStreamCreate"):
        pytest.skip("called once, or as luck has it")
    driver.refuse[call] = number
    work = Work([(0, ROOM)] * 30)
    with pytest.raises(DeviceError, match=f"CUDA's {call.partition('_')[0]} failed: CUDA_ERROR_MADE_UP"):
        sent(work, workers=3)
    assert driver.idle()


@pytest.mark.parametrize("number", [0, 1, 100])
def test_memory_that_may_not_be_locked(number, driver):
    """The bytes arrive all the same, and the name tells."""
    driver.refuse["cuMemHostRegister_v2"] = number
    work = Work(LAYOUTS["of every kind"])
    with (
        contextlib.closing(MemorySource(work.data)) as source,
        contextlib.closing(CudaLink(0, runs_of(work))) as link,
    ):
        deliver(Cached(source, "memory", "a test"), "it", work.ranges, link, workers=3, slot=ROOM)
        assert ("not page-locked" in link.name) == (driver.refuse["cuMemHostRegister_v2"] < 0)
    assert work.arrived()


@pytest.mark.parametrize("error", [StorageError("device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["read", "progress"])
def test_what_is_under_way_is_waited_for_after_an_error(where, error, driver):
    work = Work([(0, ROOM)] * 60)
    calls = []

    class Reader:
        margin = 0

        def read(self, offset, length, view):
            view[:length] = work.data[offset : offset + length]
            calls.append(offset)
            if where == "read" and len(calls) == 20:
                raise error
            return 0

    def progress(count):
        if where == "progress":
            raise error

    link = CudaLink(0, runs_of(work))
    with contextlib.closing(link), pytest.raises(type(error)):
        deliver(Reader(), "it", work.ranges, link, workers=3, slot=ROOM, progress=progress)
    assert driver.idle()


def test_sums_in_groups(driver):
    data = torch.frombuffer(bytearray(random.Random(3).randbytes(5000)), dtype=torch.uint8)
    runs = [(data.data_ptr() + number, 7 * number) for number in range(50)]
    with cuda.Context(0) as context, CudaSums(context, len(runs)) as sums:
        sums.add([])
        sums.add(runs[:1])
        sums.add(runs[1:40])
        with pytest.raises(ValueError, match="50 sums were announced, 51 are asked for"):
            sums.add(runs[:11])
        sums.add(runs[40:])
        expected = [wordsum(memoryview(data.numpy())[n : n + 7 * n]) for n in range(50)]
        assert sums.results() == expected
        sums.close()
    driver.current.context = OTHERS


# --- memory that is locked as a whole ---------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def held(request, tmp_path, memory_path, driver, monkeypatch):
    """``held(work)``: a Resident of its bytes, locked in parts of four pages."""
    monkeypatch.setattr(resident, "LOCK", 4 * 4096)
    with contextlib.ExitStack() as stack:

        def make(work, workers=2):
            path = (memory_path if request.param == "memory" else tmp_path) / "f"
            path.write_bytes(work.data)
            file = stack.enter_context(FileSource(path))
            context = stack.enter_context(contextlib.closing(cuda.Context(0)))
            with contextlib.closing(choose(file)) as reader:
                found = Resident(file, reader, context, workers)
            stack.callback(found.close)
            return found, context

        yield make


@pytest.mark.parametrize("layout", ["thousands of tiny ones", "of every kind", "blocks"])
@pytest.mark.parametrize("verify", [True, False])
def test_sent_from_locked_memory(layout, verify, held, driver):
    work, counted = Work(LAYOUTS[layout]), []
    found, context = held(work)
    for _ in range(2):
        work.target.zero_()
        counted.clear()
        found.send(context, work.ranges, runs_of(work), verify=verify, progress=counted.append)
        assert work.arrived()
        assert sum(counted) == work.total
    assert driver.current.context == OTHERS


def test_damage_in_locked_memory_is_named(held):
    work = Work(LAYOUTS["blocks"])
    work.data[work.ranges[40].offset + 5] ^= 2
    found, context = held(work)
    with pytest.raises(CorruptionError, match="checksum of tensor 40 "):
        found.send(context, work.ranges, runs_of(work), verify=True)
    found.send(context, work.ranges, runs_of(work), verify=False)
    assert work.arrived()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_copies_have_ended_when_an_error_is_raised(error, held, driver):
    work = Work(LAYOUTS["blocks"])
    found, context = held(work)

    def progress(count):
        raise error

    with pytest.raises(error):
        found.send(context, work.ranges, runs_of(work), verify=True, progress=progress)
    found.close()
    assert not driver.locked


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("number", [0, 2])
def test_memory_that_cannot_be_locked(number, workers, held, driver):
    """A mapping is read into memory of its own then; when that cannot be locked either, nothing is held."""
    work = Work(LAYOUTS["larger than every slot"])
    driver.refuse["cuMemHostRegister_v2"] = number
    try:
        found, context = held(work, workers)
    except DeviceError:
        assert not driver.locked
        return
    assert "memory of its own" in found.why
    found.send(context, work.ranges, runs_of(work), verify=True)
    assert work.arrived()


@pytest.mark.parametrize("number", [0, 3])
def test_ctrl_c_leaves_nothing_locked(number, held, driver):
    found, _ = held(Work(LAYOUTS["larger than every slot"]))
    unlock, calls = driver["cuMemHostUnregister"], []

    def interrupted(address):
        calls.append(address)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return unlock(address)

    driver.functions["cuMemHostUnregister"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        found.close()
    assert not driver.locked
    found.close()
