import pytest
import torch

from thaw_vllm.bench.digest import digests
from thaw_vllm.bench.llama import FULL_GB, Shape, poisoned, random, shape_for

CPU = torch.device("cpu")


def test_full_size_is_llama_3_8b():
    shape = shape_for(FULL_GB)
    assert shape == Shape()
    assert len(shape.tensors()) == 291 and round(shape.bytes / 1e9, 2) == FULL_GB


@pytest.mark.parametrize("size", [0.001, 0.01, 0.3, 1.0, 3.0, 8.0, 32.0])
def test_other_sizes_are_near(size):
    assert abs(shape_for(size).bytes / 1e9 - size) < max(0.3 * size, 0.0012)


def test_model_has_the_names_and_shapes():
    shape = shape_for(0.003)
    model = poisoned(shape, CPU)
    assert {name: tuple(tensor.shape) for name, tensor in model.tensors.items()} == shape.tensors()
    assert set(model.state_dict()) == set(shape.tensors())


def test_random_is_the_same_each_time_and_nowhere_repeated():
    shape = shape_for(0.02)
    one = digests(random(shape, CPU).tensors)
    assert one == digests(random(shape, CPU).tensors)
    assert one != digests(random(shape, CPU, seed=1).tensors)
    large = [name for name, size in shape.tensors().items() if len(size) == 2]
    assert len({one[name] for name in large}) == len(large)
