"""Chunks encoded on a GPU are the frames of ``planes.encode``; the GPU is made up (driver.py), its kernels by numpy."""

import contextlib

import numpy as np
import pytest
import torch
from tests.codecs.data import DATA

from thaw_vllm.codecs import planes
from thaw_vllm.errors import DeviceError
from thaw_vllm.transport import encoder, parallel
from thaw_vllm.transport.cuda import Context, Stream
from thaw_vllm.transport.drain import Drain, Run
from thaw_vllm.transport.encoder import Encoder

pytestmark = pytest.mark.usefixtures("no_leaks")


def held(data, device="cpu"):
    """A copy at an address that an encoder takes, as a torch allocator gives it, and that address."""
    room = torch.zeros(len(data) + 512, dtype=torch.uint8, device=device)
    first = -room.data_ptr() % 256
    room[first : first + len(data)] = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return room, room.data_ptr() + first


def encoded(data, width, chunks=1, device="cpu"):
    _room, address = held(data, device)
    out = bytearray(b"\xee" * (len(data) + 64))
    with Context(0) as context, contextlib.closing(Encoder(context, len(data), chunks)) as made:
        stream = Stream(context)
        size = made.encode(address, len(data), width, memoryview(out), stream.handle)
        stream.close()
    if size is None:
        assert out == b"\xee" * len(out)
        return None
    assert out[size:] == b"\xee" * (len(out) - size)
    return bytes(out[:size])


@pytest.mark.parametrize("kind", DATA)
def test_the_same_frame(kind, driver):
    data, width, _ = DATA[kind]
    assert encoded(data, width) == planes.encode(memoryview(data), width)


def test_chosen_by_a_sample(driver):
    """Longer than a sample, and other than it begins."""
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 16, 3 * planes.SAMPLE // 2, np.uint16)
    words[planes.SAMPLE // 4 :] = rng.normal(1000, 20, len(words) - planes.SAMPLE // 4).astype(np.uint16)
    data = words.tobytes() + b"end"
    frame = encoded(data, 2)
    assert frame is not None and frame == planes.encode(memoryview(data), 2)


def test_several_threads_share_what_there_is(driver, monkeypatch):
    kinds = [kind for kind in DATA if DATA[kind][0]]
    longest = max(len(DATA[kind][0]) for kind in kinds)
    monkeypatch.setattr(encoder, "ROOM", 2 * encoder._places(longest)[-1])
    work = parallel.Shared(iter(kinds * 2))
    found = []
    with Drain(5, longest, [0]) as drain:
        drain.compress()
        assert len(drain._encoders[0]._areas) == 2

        def body(stop):
            with drain.lane() as lane:
                for kind in work:
                    data, width, _ = DATA[kind]
                    _room, address = held(data)
                    run = Run(0, address, len(data))
                    assert lane.encodes(run) and not lane.encodes(Run(0, address + 2, len(data)))
                    assert bytes(lane.bring(run)[: len(data)]) == data
                    size = lane.encode(run, width)
                    found.append((kind, bytes(lane.padded(len(data) if size is None else size)), size))

        parallel.crew(body, 5)
    assert len(found) == 2 * len(kinds)
    for kind, view, size in found:
        data, width, _ = DATA[kind]
        frame = planes.encode(memoryview(data), width)
        assert (size is None) == (frame is None)
        frame = frame or data
        assert view == frame + bytes(len(view) - len(frame))


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("cuMemsetD8Async", 0),
        *[("cuMemcpyDtoHAsync_v2", n) for n in range(3)],
        *[("cuLaunchKernel", n) for n in range(9)],
    ],
)
def test_driver_refuses(call, number, driver):
    """The area is there for the next chunk."""
    data, width, _ = DATA["bfloat16"]
    _room, address = held(data)
    out = memoryview(bytearray(len(data)))
    with Context(0) as context, contextlib.closing(Encoder(context, len(data), 1)) as made:
        with contextlib.closing(Stream(context)) as stream:
            driver.refuse[call] = number
            with pytest.raises(DeviceError, match="CUDA_ERROR_MADE_UP"):
                made.encode(address, len(data), width, out, stream.handle)
            size = made.encode(address, len(data), width, out, stream.handle)
        assert bytes(out[:size]) == planes.encode(memoryview(data), width)


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc_v2"])
def test_no_encoder_then(call, driver):
    """A freeze goes on without it."""
    driver.refuse[call] = 0
    with Drain(1, 8000, [0]) as drain:
        drain.compress(for_host=0)
        with drain.lane() as lane:
            assert not lane.encodes(Run(0, 1 << 20, 8000)) and not lane.encodes(None)


@pytest.mark.parametrize("call", ["cuMemHostRegister_v2", "cuMemHostGetDevicePointer_v2"])
def test_less_memory_and_none_to_lock(call, driver):
    driver.refuse["cuMemAlloc_v2"] = 2
    driver.refuse[call] = 0
    data, width, _ = DATA["bfloat16"]
    assert encoded(data, width, chunks=4) == planes.encode(memoryview(data), width)
    assert driver.calls.count("cuMemAlloc_v2") == 3


@pytest.mark.parametrize("left", [0, 1, 2])
def test_others_keep_some_memory(left, driver):
    """A gigabyte stays free, as far as can be known."""
    data = DATA["bfloat16"][0]
    driver.free = encoder.RESERVE + left * encoder._places(len(data))[-1]
    with Context(0) as context:
        if not left:
            with pytest.raises(DeviceError, match="too little"):
                Encoder(context, len(data), 5)
        else:
            with contextlib.closing(Encoder(context, len(data), 5)) as made:
                assert len(made._areas) == left


def test_small_ones_from_the_host_leave_nothing_behind(driver):
    """What they would ask of a stream would come into the next one's place."""
    data, width, _ = DATA["bfloat16"]
    held_ = memoryview(bytearray(data))
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(Context(0))
        made = stack.enter_context(contextlib.closing(Encoder(context, len(data), 1, host=True)))
        first, second = (stack.enter_context(contextlib.closing(Stream(context))) for _ in range(2))
        assert made.encode_held(memoryview(bytearray(100)), width, first.handle) is None
        assert not driver.streams[first.handle]
        size = made.encode_held(held_, width, second.handle)
    assert bytes(held_[:size]) == planes.encode(memoryview(data), width)


def test_memory_that_may_not_be_locked_is_not_sent_from(driver):
    """The copy would wait with the interpreter's lock in its hands."""
    driver.refuse["cuMemHostRegister_v2"] = 1  # the first is the encoder's
    with Drain(1, 8000) as drain:
        drain.compress(for_host=0)
        with drain.lane() as lane:
            assert lane.encodes(None)
            lane.hold(memoryview(bytes(8000)))
            assert not lane.encodes(None)
