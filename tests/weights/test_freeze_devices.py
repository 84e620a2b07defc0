"""A model partly on GPUs and partly on the host, with carried files, against a made-up driver (tests/transport)."""

import dataclasses

import pytest
import torch
from tests.transport.driver import OTHERS
from tests.weights.modules import state

from thaw_vllm import restore_model
from thaw_vllm.errors import DeviceError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.transport import bulk
from thaw_vllm.transport.drain import Run
from thaw_vllm.weights.capture import capture, module_tensors
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.read_storage import filled
from thaw_vllm.weights.verify import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
HEADER = Header(identity=Identity(stage="module", architecture="Module"), writer="a test")
FILES = [("config.json", b"{}" * 3000), ("vocab.txt", b"")]


@pytest.fixture(autouse=True)
def unmoved(driver):
    """The calling thread stays in the context that it was in."""
    yield
    assert driver.current.context == OTHERS


class Elsewhere:
    """A storage of a host tensor that says it lies on a GPU, and cannot be read in another way."""

    def __init__(self, storage, tensor, device):
        self.length, self._at, self._device = storage.length, tensor.data_ptr(), device

    def read(self, at, length):
        raise AssertionError("read on the host")

    def run(self, at, length):
        return Run(self._device, self._at + at, length)


def model(seed):
    generator, found = torch.Generator().manual_seed(seed), torch.nn.Module()
    for number, size in enumerate((9 * MIB + 3, 1, 4096, 100, 5 * MIB, 33)):
        found.register_buffer(f"t{number}", torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator))
    found.register_buffer("gaps", torch.randn(300, 70, generator=generator)[:, ::3])
    return found


def captured(module):
    """Of those without gaps every third on one GPU, every third on another."""
    found = capture(module_tensors(module), FILES)
    owners = {entry.storage: tensor for entry, tensor in zip(found.index.tensors, found.tensors, strict=True)}
    storages = [
        Elsewhere(storage, owners[number], number % 3)
        if number % 3 < 2 and number in owners and owners[number].is_contiguous()
        else storage
        for number, storage in enumerate(found.storages)
    ]
    return dataclasses.replace(found, storages=tuple(storages))


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("refused", [None, "cuMemAlloc_v2"])
def test_compressed(refused, place, driver, tmp_path, memory_path, monkeypatch):
    """By a GPU, and by the processor where the GPU cannot: the same bytes."""
    monkeypatch.setattr(bulk, "LARGE", 0)
    found = torch.nn.Module()
    normal = torch.randn(3 * MIB + 17, generator=torch.Generator().manual_seed(5))
    kinds = [torch.bfloat16, torch.float32, torch.uint8, torch.bfloat16, torch.float16]
    for number, (kind, size) in enumerate(zip(kinds, (3 * MIB + 17, MIB, MIB, 5, MIB), strict=True)):
        data = torch.randint(0, 255, (size,), dtype=kind) if kind == torch.uint8 else normal[:size].to(kind)
        found.register_buffer(f"t{number}", data)
    options = FreezeOptions(chunk_size=4 * MIB, workers=4, compress=True)
    there = (memory_path if place == "memory" else tmp_path) / "w.thaw"
    plain = write_snapshot(tmp_path / "plain.thaw", HEADER, capture(module_tensors(found), FILES), options)
    if refused:
        driver.refuse[refused] = 2  # after sums, of the first GPU; the second one does its own
    written = write_snapshot(there, HEADER, captured(found), options)
    assert written.file_size == plain.file_size < 0.9 * written.bytes
    assert there.read_bytes() == (tmp_path / "plain.thaw").read_bytes()
    assert {b"encode_2", b"pack", b"plane_2"} <= driver.launched
    verify(there)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("large", [0, bulk.LARGE])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_byte_and_file(workers, large, place, driver, tmp_path, memory_path, monkeypatch):
    monkeypatch.setattr(bulk, "LARGE", large)
    path = (memory_path if place == "memory" else tmp_path) / "w.thaw"
    report = write_snapshot(path, HEADER, captured(model(1)), FreezeOptions(chunk_size=4 * MIB, workers=workers))
    assert report.file_size == path.stat().st_size
    verify(path)
    target = model(2)
    restore_model(target, path)
    assert state(target) == state(model(1))
    with open_snapshot(path) as opened:
        files = {f.name: f.storage for f in opened.snapshot.index.files}
        assert files.keys() == {"config.json", "vocab.txt"} and files["vocab.txt"] is None
        assert filled(opened.snapshot, opened.source, files["config.json"]) == FILES[0][1]


@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync_v2", "cuLaunchKernel", "cuStreamCreate"])
def test_gpu_that_refuses_leaves_no_file(call, driver, tmp_path):
    driver.refuse[call] = 2 if call == "cuMemcpyDtoHAsync_v2" else 1
    with pytest.raises(DeviceError, match="CUDA_ERROR_MADE_UP"):
        write_snapshot(tmp_path / "w.thaw", HEADER, captured(model(1)), FreezeOptions(chunk_size=4 * MIB, workers=3))
    assert list(tmp_path.iterdir()) == []
