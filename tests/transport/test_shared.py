"""A GPU's memory shared with other processes, with a made-up driver: what is asked of it, and what a failure leaves."""

import ctypes

import pytest
import torch

from thaw_vllm.errors import DeviceError, MismatchError
from thaw_vllm.transport import shared

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def made_up(driver, monkeypatch):
    """Its memory is the host's, and so are tensors."""

    def tensor(address, size, device):
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)

    monkeypatch.setattr(shared, "by_driver", lambda device: device.type == "cuda")
    monkeypatch.setattr(shared, "_tensor", tensor)


def test_made_and_mapped(driver):
    made = shared.Made(5000, GPU)
    made.tensor.copy_(torch.arange(5000) % 251)
    assert made.tensor.shape == (5000,) and made.told.keys() == {"bytes", "gpu", "handle"}
    (memory,) = driver.memory.values()
    assert len(memory) == 2 << 20, "CUDA shares whole blocks, which are of 2 MiB"
    found = shared.mapped(made.told, GPU)
    assert torch.equal(found, made.tensor) and found.data_ptr() == made.tensor.data_ptr()
    driver.contexts -= 1  # what is mapped stays so, and its context with it
    with pytest.raises(MismatchError, match=r"are on the GPU 0000:ff:00\.0, this engine is on"):
        shared.mapped(made.told | {"gpu": "0000:ff:00.0"}, GPU)
    driver.contexts -= 1
    with pytest.raises(MismatchError, match="in a GPU's memory"):
        shared.mapped(made.told, torch.device("cpu"))
    made.close()
    made.close()


@pytest.mark.parametrize("name", ["cuMemAlloc_v2", "cuIpcGetMemHandle"])
def test_what_cannot_be_shared_leaves_nothing(name, driver):
    driver.refuse[name] = 0
    with pytest.raises(DeviceError, match=name.partition("_")[0]):
        shared.Made(5000, GPU)
    assert driver.idle()


def test_what_cannot_be_mapped(driver):
    driver.refuse["cuIpcOpenMemHandle_v2"] = 0
    made = shared.Made(5000, GPU)
    with pytest.raises(DeviceError, match="cannot be mapped: CUDA's cuIpcOpenMemHandle failed"):
        shared.mapped(made.told, GPU)
    driver.contexts -= 1
    made.close()
