"""Codec 1, held against itself, against numba's, and against a decoder that docs/format.md alone describes."""

import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from tests.codecs.data import DATA

from thaw_vllm.codecs import NAMES, decode, encode, planes, planes_numba
from thaw_vllm.errors import FormatError
from thaw_vllm.format.chunks import PLANES, RAW

BOTH = [planes, planes_numba]


@pytest.mark.parametrize("tools", BOTH)
@pytest.mark.parametrize("kind", DATA)
def test_there_and_back(kind, tools):
    data, width, share = DATA[kind]
    frame = planes.encode(memoryview(data), width, tools)
    assert frame == planes.encode(memoryview(data), width)  # whoever makes it
    if share is None or frame is None:
        assert frame is None and share in (None, 1)
        return
    assert len(frame) <= share * len(data)
    room = bytearray(b"\xee" * len(data))
    planes.decode(memoryview(frame), memoryview(room), tools)
    assert room == data


@pytest.mark.parametrize("kind", [kind for kind, (_, _, share) in DATA.items() if share])
def test_the_document(kind):
    """A decoder written from docs/format.md, one symbol after another."""
    data, width, _ = DATA[kind]
    if frame := planes.encode(memoryview(data), width):
        assert by_the_document(frame, len(data)) == data


def by_the_document(frame, length):
    width, turn, mask, _, *counts = struct.unpack_from("<BBBB4I", frame)
    elements = length // (128 * width) * 128
    blocks, at, parts = -(-elements // 16384), 32, []
    for plane in range(width):
        if not mask >> plane & 1:
            parts.append(frame[at : at + elements])
            at += elements
        else:
            frequency = struct.unpack_from("<256H", frame, at)
            symbols = [symbol for symbol in range(256) for _ in range(frequency[symbol])]
            first = [sum(frequency[:symbol]) for symbol in range(256)]
            ends = struct.unpack_from(f"<{blocks}I", frame, at + 512)
            at += -(-(512 + 4 * blocks) // 16) * 16
            states = struct.unpack_from(f"<{32 * blocks}I", frame, at)
            at += 128 * blocks
            words = struct.unpack_from(f"<{counts[plane]}H", frame, at)
            at += 2 * counts[plane]
            found, next_ = bytearray(elements), 0
            for block in range(blocks):
                state = list(states[32 * block : 32 * block + 32])
                for row in range(block * 16384, min(block * 16384 + 16384, elements), 128):
                    for place in range(4):
                        for coder in range(32):
                            low = state[coder] & 4095
                            symbol = symbols[low]
                            found[row + 4 * coder + place] = symbol
                            state[coder] = frequency[symbol] * (state[coder] >> 12) + low - first[symbol]
                            if state[coder] < 65536:
                                state[coder] = state[coder] << 16 | words[next_]
                                next_ += 1
                assert next_ == ends[block] and set(state) == {65536}
            parts.append(bytes(found))
        at = -(-at // 16) * 16
    out, bits = bytearray(), 8 * width
    for element in zip(*parts, strict=True):
        number = int.from_bytes(bytes(element), "little")
        number = number >> turn | number << (bits - turn) & (1 << bits) - 1
        out += number.to_bytes(width, "little")
    return bytes(out + frame[at:])


def test_the_table():
    data = memoryview(DATA["bfloat16"][0])
    codec, stored = encode(data, 2)
    assert codec == PLANES and NAMES[codec] == "planes"
    room = bytearray(len(data))
    decode(codec, memoryview(stored), memoryview(room))
    assert room == data
    noise = memoryview(DATA["random"][0])
    codec, stored = encode(noise, 2)
    assert codec == RAW and stored is noise
    room = bytearray(len(noise))
    decode(codec, noise, memoryview(room))
    assert room == noise


@pytest.mark.parametrize("seed", range(40))
def test_frequencies(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1 << rng.integers(1, 40), 256) * (rng.random(256) < rng.random())
    counts[rng.integers(256)] += 1
    found = planes.frequencies(counts)
    assert found.sum() == planes.TOTAL and ((found > 0) == (counts > 0)).all()


def bad(change):
    """A sound frame, changed: ``change(frame, layout)``."""
    data, width, _ = DATA["bfloat16"]
    frame = bytearray(planes.encode(memoryview(data), width))
    changed = change(frame, planes.layout(bytes(frame), len(data), len(frame)))
    return bytes(frame if changed is None else changed), len(data)


def put(at, kind, value):
    return lambda frame, _: struct.pack_into(kind, frame, at, value)


def at_plane(field, kind, value, more=0):
    def change(frame, found):
        struct.pack_into(kind, frame, getattr(found.planes[1], field) + more, value)

    return change


BAD = {
    "empty": lambda *_: b"",
    "only a head": lambda frame, _: frame[: planes.HEAD],
    "cut": lambda frame, _: frame[:-1],
    "longer": lambda frame, _: frame + b"\0",
    "width 0": put(0, "B", 0),
    "width 3": put(0, "B", 3),
    "width 8": put(0, "B", 8),
    "width 1, turned": put(0, "B", 1),
    "turned by 2": put(1, "B", 2),
    "no plane": put(2, "B", 0),
    "a plane beyond": put(2, "B", 6),
    "another plane": put(2, "B", 1),
    "reserved": put(3, "B", 1),
    "words of a raw plane": put(4, "<I", 1),
    "words of no plane": put(12, "<I", 1),
    "more words than elements": put(8, "<I", 0xFFFFFFFF),
    "fewer words": lambda frame, found: struct.pack_into("<I", frame, 8, found.planes[1].count - 1),
    "behind the head": put(31, "B", 1),
    "frequencies": at_plane("at", "<H", 4096),
    "ends that go back": at_plane("ends", "<I", 0xFFFFFFF0),
    "ends too early": lambda frame, found: struct.pack_into("<I", frame, found.planes[1].ends + 12, 5),
    "between parts": lambda frame, found: struct.pack_into("B", frame, planes.gaps(found)[-1][0], 1),
}


@pytest.mark.parametrize("tools", BOTH)
@pytest.mark.parametrize("change", BAD)
def test_hostile_frame(change, tools):
    frame, length = bad(BAD[change])
    with pytest.raises(FormatError):
        planes.decode(memoryview(frame), memoryview(bytearray(length)), tools)


@pytest.mark.parametrize("tools", BOTH)
def test_words_that_ask_for_more(tools):
    """Nothing is read beyond them, whatever the states are."""

    def states(frame, found):
        frame[found.planes[1].states : found.planes[1].words] = bytes(found.planes[1].words - found.planes[1].states)

    frame, length = bad(states)
    with pytest.raises(FormatError, match="do not end"):
        planes.decode(memoryview(frame), memoryview(bytearray(length)), tools)
    data = bytes(length)
    frame = bytearray(planes.encode(memoryview(data), 1))
    found = planes.layout(bytes(frame), length, len(frame))
    assert not found.planes[0].count
    frame[found.planes[0].states : found.planes[0].words] = bytes(found.planes[0].words - found.planes[0].states)
    with pytest.raises(FormatError, match="do not end"):
        planes.decode(memoryview(bytes(frame)), memoryview(bytearray(length)), tools)


@pytest.mark.parametrize("seed", range(20))
def test_noise_instead_of_a_frame(seed):
    """Refused, or decoded to something, within the memory of so many bytes."""
    rng = random.Random(seed)
    data, width, _ = DATA["float32"]
    frame = bytearray(planes.encode(memoryview(data), width))
    for _ in range(rng.randrange(1, 200)):
        frame[rng.randrange(32 if rng.random() < 0.02 else 600, len(frame))] = rng.randrange(256)
    sound = []
    for tools in BOTH:
        room = bytearray(b"\xa5" * (len(data) + 128))
        try:
            planes.decode(memoryview(bytes(frame)), memoryview(room)[64:-64], tools)
            sound.append(True)
        except FormatError:
            sound.append(False)
        assert room[:64] == room[-64:] == b"\xa5" * 64
    assert sound[0] == sound[1]


def test_chosen_by_more_than_how_it_begins():
    """A chunk that begins with noise, and one that ends with it."""
    noise, zeros = random.Random(3).randbytes(1 << 20), bytes(15 << 20)
    for data in (noise + zeros, zeros + noise):
        frame = planes.encode(memoryview(data), 2, planes_numba)
        assert len(frame) < 0.2 * len(data)
        room = bytearray(len(data))
        planes.decode(memoryview(frame), memoryview(room), planes_numba)
        assert room == data


def test_a_cache_that_cannot_be_written(tmp_path):
    """As of a full home; in a process of its own, which may write no file at all."""
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from thaw_vllm.codecs import decode, encode, tools
assert tools().__name__.endswith("planes_numba")
data = memoryview(bytes(range(8)) * 200_000)
codec, stored = encode(data, 2)
room = bytearray(len(data))
decode(codec, memoryview(stored), memoryview(room))
assert codec == 1 and room == data
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
