import random

import pytest
import torch

from thaw_vllm.transport import wordsum_torch
from thaw_vllm.transport.checksum import LANES, wordsum

ROW = LANES * 4
DATA = random.Random(5).randbytes(3 * ROW + 64)


def around(*places):
    return sorted({place + more for place in places for more in range(-5, 6) if place + more >= 0})


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Two rows at a time, so that steps end within the data."""
    monkeypatch.setattr(wordsum_torch, "ROWS", 2)


@pytest.mark.parametrize("length", [*range(13), *around(ROW, 2 * ROW, 3 * ROW)])
def test_lengths(length):
    found = wordsum_torch.wordsum(torch.frombuffer(bytearray(DATA[:length] or b"."), dtype=torch.uint8)[:length])
    assert found == wordsum(memoryview(DATA)[:length])


@pytest.mark.parametrize("begin", range(1, 9))
@pytest.mark.parametrize("length", [1, 3, 4, 16, ROW - 1, ROW, ROW + 1, 2 * ROW, 2 * ROW + 5])
def test_addresses(begin, length):
    expected = wordsum(memoryview(DATA)[begin : begin + length])
    tensor = torch.frombuffer(bytearray(DATA), dtype=torch.uint8)
    assert wordsum_torch.wordsum(tensor[begin : begin + length]) == expected


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_storage_at_an_odd_address_seen_from_an_even_one(odd):
    storage = torch.frombuffer(bytearray(DATA), dtype=torch.uint8, offset=odd)
    begin = -storage.data_ptr() % 4
    view = storage[begin : begin + 2 * ROW]
    assert view.data_ptr() % 4 == 0
    assert wordsum_torch.wordsum(view) == wordsum(memoryview(DATA)[odd + begin : odd + begin + 2 * ROW])


@pytest.mark.parametrize("length", around(wordsum_torch.ROWS * ROW)[::5])
def test_whole_steps(length, monkeypatch):
    monkeypatch.undo()
    data = random.Random(6).randbytes(length)
    assert wordsum_torch.wordsum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == wordsum(memoryview(data))


@pytest.mark.parametrize("byte", [0, 1, 0x7F, 0x80, 0xFF])
def test_bytes_of_every_sign(byte):
    data = bytes([byte]) * (ROW + 7)
    assert wordsum_torch.wordsum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == wordsum(memoryview(data))


def test_what_is_summed_is_left_alone():
    tensor = torch.frombuffer(bytearray(DATA), dtype=torch.uint8)
    wordsum_torch.wordsum(tensor)
    assert tensor.numpy().tobytes() == DATA
    assert wordsum_torch.wordsum(tensor) == wordsum(memoryview(DATA))


def test_inference_tensors_and_default_devices():
    with torch.inference_mode():
        tensor = torch.frombuffer(bytearray(DATA), dtype=torch.uint8).clone()
    with torch.device("meta"):
        assert wordsum_torch.wordsum(tensor[:ROW]) == wordsum(memoryview(DATA)[:ROW])
