import random

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from thaw_vllm.transport.checksum import LANES, weight, wordsum, xxh3

MASK = (1 << 64) - 1
ROW = 4 * LANES
"""Bytes of one row of words."""


def defined(data):
    """The sum as its definition says it, word by word."""
    data = data + bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    return sum(x * weight(i % LANES) * weight(LANES + i // LANES) for i, x in enumerate(words)) & MASK


def noise(length, seed=0):
    return random.Random(seed).randbytes(length)


@given(st.binary(max_size=100))
@example(b"")
@example(b"\xff" * 7)
def test_wordsum_is_what_its_definition_says(data):
    assert wordsum(memoryview(data)) == defined(data)


@pytest.mark.parametrize("length", [ROW - 4, ROW - 1, ROW, ROW + 1, ROW + 4, 2 * ROW + 5])
def test_wordsum_across_rows(length):
    assert wordsum(memoryview(noise(length))) == defined(noise(length))
    assert wordsum(memoryview(b"\xff" * length)) == defined(b"\xff" * length)


@pytest.mark.parametrize(
    ("data", "expected_xxh3", "expected_wordsum"),
    [
        (b"", 0x2D06800538D394C2, 0),
        (b"\1", 0xE12EF9D2EB86CEEB, 0x43DB6810A1A6EC61),
        (b"thaw", 0xEC3F213C0E8E3DDB, 0x0B23C155B76B83F4),
        (bytes(range(256)) * 5, 0x4844B009E164352E, 0x6B68CC152EBA3B18),
        (bytes(i % 251 for i in range(200_001)), 0xF68DCA0E6F46865D, 0xCB06BE315ECD732D),
    ],
    ids=["nothing", "one byte", "thaw", "1280 bytes", "two rows"],
)
def test_known_values(data, expected_xxh3, expected_wordsum):
    """Files hold these numbers, so they never change."""
    assert (xxh3(memoryview(data)), wordsum(memoryview(data))) == (expected_xxh3, expected_wordsum)


def test_known_weights():
    assert weight(0) == 0xE220A8397B1DCDAF
    assert weight(LANES - 1) == 0xC6C34E584B71BAF5
    assert weight(LANES) == 0x8C7EB7905639FAEF


def test_weights_are_odd():
    """So each is invertible modulo 2**64, and a change of one word cannot cancel."""
    assert all(weight(position) & 1 for position in range(10_000))


@given(st.binary(min_size=1, max_size=64), st.data())
def test_every_single_flip_shows(data, draw):
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    assert wordsum(memoryview(changed)) != wordsum(memoryview(data))
    assert xxh3(memoryview(changed)) != xxh3(memoryview(data))


@pytest.mark.soak
def test_flips_swaps_and_shifts_show_in_a_large_chunk(soak):
    data = noise(3 * ROW + 6)
    sums = wordsum(memoryview(data)), xxh3(memoryview(data))
    for case in soak(small=30, full=2000):
        rng, changed = case.random, bytearray(data)
        kind = rng.choice(("flip", "swap words", "swap rows", "zero", "shift"))
        a, b = sorted(rng.sample(range(len(data) // 4), 2))
        if kind == "flip":
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "swap words":
            changed[4 * a : 4 * a + 4], changed[4 * b : 4 * b + 4] = data[4 * b : 4 * b + 4], data[4 * a : 4 * a + 4]
        elif kind == "swap rows":
            changed[:ROW], changed[ROW : 2 * ROW] = data[ROW : 2 * ROW], data[:ROW]
        elif kind == "zero":
            changed[4 * a : 4 * b] = bytes(4 * (b - a))
        else:
            changed[4 * a : 4 * b] = data[4 * b - 4 : 4 * b] + data[4 * a : 4 * b - 4]
        assert len(changed) == len(data)
        assert changed != data
        assert wordsum(memoryview(changed)) != sums[0], case
        assert xxh3(memoryview(changed)) != sums[1], case


def test_zeros_at_the_end_count_for_xxh3_alone():
    """The word sum pads with zeros, so lengths are the index's business; both sums are always of the same length."""
    assert wordsum(memoryview(b"thaw\0")) == wordsum(memoryview(b"thaw"))
    assert xxh3(memoryview(b"thaw\0")) != xxh3(memoryview(b"thaw"))


@given(st.binary(max_size=200), st.integers(0, 8))
def test_any_buffer_that_is_contiguous(data, skip):
    view = memoryview(bytearray(data))[skip:]
    assert wordsum(view) == defined(data[skip:])
    assert xxh3(view) == xxhash.xxh3_64_intdigest(data[skip:])
