"""The way out of a GPU against a made-up driver (driver.py); tests/gpu holds it against a real one."""

import mmap
import random

import pytest
import torch
from tests.transport.driver import OTHERS

from thaw_vllm.errors import DeviceError
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.drain import Drain, Run
from thaw_vllm.transport.plan import BLOCK

pytestmark = pytest.mark.usefixtures("no_leaks")


DATA = torch.frombuffer(bytearray(random.Random(5).randbytes(9 * BLOCK)), dtype=torch.uint8)


def run_of(device, begin, length):
    return Run(device, DATA.data_ptr() + begin, length), DATA.numpy()[begin : begin + length].tobytes()


RUNS = [run_of(number % 2, 1000 * number, 1 + 700 * number) for number in range(12)]


def test_bytes_of_two_devices_and_of_the_host_through_one_slot(driver):
    with Drain(1, 8000, [0, 1]) as drain, drain.lane() as lane:
        for run, data in RUNS:
            for view in (lane.bring(run), lane.hold(memoryview(data))):
                assert bytes(view[: len(data)]) == data
                assert len(view) % BLOCK == 0 and not any(view[len(data) :])
    driver.current.context = OTHERS


def test_sums_leave_the_thread_on_its_own_device(driver):
    """torch takes the thread's context for the current GPU."""
    with Drain(1, 8000, [0, 1]) as drain:
        assert drain.sums([run for run, _ in RUNS]) == [wordsum(memoryview(data)) for _, data in RUNS]
    assert driver.current.context == OTHERS


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 64 << 10])
def test_large_pages(size, monkeypatch, driver):
    """No two slots share a page of 64 KiB: each is page-locked on its own."""
    monkeypatch.setattr(mmap, "PAGESIZE", 64 << 10)
    with Drain(3, size) as drain:
        assert all(slot.address % (64 << 10) == 0 for slot in drain._spare)
        assert all(slot.view.nbytes >= size for slot in drain._spare)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuDeviceGetPCIBusId", 0),
        ("cuStreamCreate", 0),
        ("cuStreamCreate", 1),
        ("cuMemcpyDtoHAsync_v2", 1),
        ("cuStreamSynchronize", 2),
    ],
)
def test_everything_is_given_back_when_the_driver_refuses(call, number, driver):
    driver.refuse[call] = number
    with pytest.raises(DeviceError, match="CUDA_ERROR_MADE_UP"), Drain(1, 8000, [0, 1]) as drain, drain.lane() as lane:
        for run, _ in RUNS:
            lane.bring(run)
    assert driver.idle()


def test_slot_that_may_not_be_locked_is_used_as_it_is(driver):
    driver.refuse["cuMemHostRegister_v2"] = 0
    with Drain(1, 8000, [0, 1]) as drain, drain.lane() as lane:
        for run, data in RUNS:
            assert bytes(lane.bring(run)[: run.length]) == bytes(data)
    assert driver.idle()


def test_slot_is_unlocked_although_a_gpu_refuses_to_be_waited_for(driver):
    with pytest.raises(DeviceError, match="CUDA_ERROR_MADE_UP"), Drain(1, 8000, [0, 1]) as drain, drain.lane() as lane:
        for run, _ in RUNS:
            lane.bring(run)
        driver.refuse["cuStreamSynchronize"] = 0
    assert driver.idle()
