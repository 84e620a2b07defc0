import pytest
import torch

from thaw_vllm.bench import digest as digests
from thaw_vllm.bench.digest import digest, first_difference


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(digests, "WORDS", 64)


def bits(count, dtype=torch.bfloat16, seed=0):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 511, 512, 513, 5000])
def test_equal_bytes_give_equal_digests(count):
    tensor = bits(2 * count)
    assert digest(tensor) == digest(tensor.clone())


def test_every_single_bit_counts():
    tensor = bits(1204)
    whole = tensor.view(torch.uint8)
    before = digest(tensor)
    for at in range(0, whole.numel(), 7):
        whole[at] ^= 1 << at % 8
        assert digest(tensor) != before
        whole[at] ^= 1 << at % 8
    assert digest(tensor) == before


def test_order_counts():
    tensor = bits(8 * 512)
    words = tensor.view(torch.int64)
    for one, other in ((0, 1), (0, 64), (3, 511), (64, 128)):
        swapped = words.clone()
        swapped[[one, other]] = words[[other, one]]
        assert digest(swapped.view(torch.bfloat16)) != digest(tensor)


def test_dtype_and_shape_count():
    tensor = bits(64)
    assert len({digest(tensor), digest(tensor.view(torch.int16)), digest(tensor.view(4, 8))}) == 3


def test_strides_and_alignment_do_not_count():
    tensor = bits(2 * 600).view(20, 30)
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    room = torch.empty(1203, dtype=torch.uint8)
    for offset in (2, 1):
        part = room[offset : offset + 1200]
        part.copy_(tensor.view(torch.uint8).reshape(-1))
        assert digest(part) == digest(part.clone())


def test_first_difference():
    assert first_difference({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) is None
    assert first_difference({"a": "1"}, {"a": "1", "b": "2"}) == "b"
    assert first_difference({"a": "1", "c": "2"}, {"a": "1"}) == "c"
    assert first_difference({"a": "1"}, {"a": "2"}) == "a"
