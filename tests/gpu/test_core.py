"""Modules on the GPU: frozen and restored bit for bit, and interchangeable with the host's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thaw_vllm import freeze_model, restore_model
from thaw_vllm.errors import MismatchError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.complex64, torch.bool]


class Zoo(torch.nn.Module):
    """One parameter of each dtype, ties, a transposed, a strided, an expanded, an empty and a large one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        for dtype in DTYPES:
            self.register_buffer("as_" + str(dtype).removeprefix("torch."), random(33, 7).mul(3).to(dtype))
        self.embedding = torch.nn.Embedding.from_pretrained(random(5000, 64).bfloat16(), freeze=True)
        self.head = torch.nn.Linear(64, 5000, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("transposed", random(70, 30).t())
        self.register_buffer("strided", random(64, 128)[:, ::2])
        self.register_buffer("expanded", random(1, 1).expand(10, 20))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("large", random(3 << 20, 3).bfloat16())


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Every tensor of the state equal in its bytes."""

    def raw(t: torch.Tensor) -> bytes:
        t = t.detach().cpu().contiguous()
        return t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""

    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(raw(ours[n]) == raw(theirs[n]) for n in ours)


def moved(module: Zoo, device: str) -> Zoo:
    """``.to(device)`` that keeps strides and ties as they are."""
    tied = module.embedding.weight
    for child in module.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = like(buffer, device)
    tied.data = tied.data.to(device)
    return module


def like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (len(storage),), (1,)).to(device)
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        flat.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_round_trip(source: str, target: str, tmp_path: Path):
    frozen = moved(Zoo(1), source)
    freeze_model(frozen, tmp_path / "m.thaw")
    thawed = moved(Zoo(2), target)
    assert not same(frozen, thawed)
    restore_model(thawed, tmp_path / "m.thaw")
    assert same(frozen, thawed)
    assert thawed.head.weight.data_ptr() == thawed.embedding.weight.data_ptr()


def test_ids_do_not_depend_on_the_device(tmp_path: Path):
    on_host = freeze_model(Zoo(1), tmp_path / "host.thaw")
    on_gpu = freeze_model(moved(Zoo(1), "cuda"), tmp_path / "gpu.thaw")
    assert (on_host.content, on_host.model) == (on_gpu.content, on_gpu.model)


def test_a_refusal_leaves_the_gpu_tensors_alone(tmp_path: Path):
    freeze_model(torch.nn.Linear(8, 8).cuda(), tmp_path / "m.thaw")
    other = torch.nn.Linear(8, 9).cuda()
    before = other.weight.clone()
    with pytest.raises(MismatchError):
        restore_model(other, tmp_path / "m.thaw")
    assert torch.equal(other.weight, before)


def test_work_queued_on_another_stream_is_waited_for(tmp_path: Path):
    module = torch.nn.Linear(4096, 4096, bias=False).cuda()
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)
        module.weight.fill_(7)
        freeze_model(module, tmp_path / "m.thaw")
    thawed = torch.nn.Linear(4096, 4096, bias=False)
    restore_model(thawed, tmp_path / "m.thaw")
    assert bool((thawed.weight == 7).all())


def test_inference_tensors_are_filled(tmp_path: Path):
    freeze_model(torch.nn.Linear(64, 64), tmp_path / "m.thaw")
    with torch.inference_mode():
        thawed = torch.nn.Linear(64, 64).cuda()
    restore_model(thawed, tmp_path / "m.thaw")
    frozen = torch.nn.Linear(64, 64)
    restore_model(frozen, tmp_path / "m.thaw")
    assert torch.equal(thawed.weight.cpu(), frozen.weight)
