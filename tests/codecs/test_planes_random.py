"""Codec 1 over random bytes of every kind: whoever encodes gives the same frame, whoever decodes the same bytes."""

import contextlib

import numpy as np
import pytest
import torch

from thaw_vllm.codecs import planes, planes_numba
from thaw_vllm.errors import FormatError
from thaw_vllm.transport.coded_torch import decode
from thaw_vllm.transport.cuda import Context, Stream
from thaw_vllm.transport.encoder import Encoder

KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32)
LONGEST = 3 * planes.BLOCK + 7


def made(rng):
    """Bytes of some elements, cut anywhere, and how many bytes an element is said to have."""
    kind = rng.choice(KINDS)
    normal = torch.randn(rng.randrange(1, LONGEST), generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    data = (normal * 10 ** rng.uniform(-3, 3)).to(kind).view(torch.uint8).numpy().copy()
    for _ in range(rng.randrange(4)):  # runs of other bytes
        at = rng.randrange(len(data))
        size = min(rng.randrange(1, 5000), len(data) - at)
        data[at : at + size] = np.frombuffer(rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)]), np.uint8)
    data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data
    return data.tobytes(), rng.choice([kind.itemsize, kind.itemsize, 1, 2, 4, 8])


@pytest.mark.soak
def test_everybody_agrees(soak, driver):
    for case in soak(small=40, full=2000):
        data, width = made(case.random)
        frame = planes.encode(memoryview(data), width)
        assert planes.encode(memoryview(data), width, planes_numba) == frame, case
        assert by_gpu(data, width) == frame, case
        if frame is None:
            continue
        assert len(frame) <= (1 - planes.GAIN) * len(data), case
        for tools in (planes, planes_numba):
            out = bytearray(b"\xee" * len(data))
            planes.decode(memoryview(frame), memoryview(out), tools)
            assert out == data, case
        out = torch.empty(len(data), dtype=torch.uint8)
        decode(torch.frombuffer(bytearray(frame), dtype=torch.uint8), out)
        assert out.numpy().tobytes() == data, case


def by_gpu(data, width):
    """A made-up one; the bytes lie where a GPU's allocator puts them."""
    room = np.zeros(len(data) + 256, np.uint8)
    first = -room.ctypes.data % 256
    room[first : first + len(data)] = np.frombuffer(data, np.uint8)
    out = bytearray(len(data))
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(Context(0))
        encoder = stack.enter_context(contextlib.closing(Encoder(context, len(data), 1)))
        stream = stack.enter_context(contextlib.closing(Stream(context)))
        size = encoder.encode(room.ctypes.data + first, len(data), width, memoryview(out), stream.handle)
    return None if size is None else bytes(out[:size])


@pytest.mark.soak
def test_damage(soak):
    """An error, or bytes, and these are everybody's."""
    for case in soak(small=60, full=5000):
        rng, frame = case.random, None
        while frame is None:
            data, width = made(rng)
            frame = planes.encode(memoryview(data), width)
        damaged = bytearray(frame)
        for _ in range(1 << rng.randrange(6)):
            at = rng.choice(
                [rng.randrange(len(damaged)), rng.randrange(planes.HEAD), rng.randrange(600) % len(damaged)]
            )
            damaged[at] = rng.randrange(256)
        if rng.random() < 0.2:
            damaged = damaged[: rng.randrange(len(damaged))]
        found = [decoded(damaged, len(data), how) for how in (planes, planes_numba, None)]
        assert found[0] == found[1] == found[2], case


def decoded(frame, length, tools):
    """None for an error."""
    out = bytearray(length)
    try:
        if tools is None:
            room = torch.zeros(length, dtype=torch.uint8)
            decode(torch.tensor(list(frame), dtype=torch.uint8), room)
            return room.numpy().tobytes()
        planes.decode(memoryview(bytes(frame)), memoryview(out), tools)
    except FormatError:
        return None
    return bytes(out)
