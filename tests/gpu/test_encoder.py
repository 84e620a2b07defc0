"""Chunks compressed on a GPU: the frames that processors make of them, bit for bit."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from tests.codecs.data import DATA
from tests.transport.test_encoder import encoded, held

import thaw_vllm
from thaw_vllm.codecs import planes
from thaw_vllm.transport import parallel
from thaw_vllm.transport.drain import Drain, Run
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.open import open_snapshot


@pytest.mark.parametrize("kind", DATA)
def test_the_same_frame(kind: str) -> None:
    data, width, _ = DATA[kind]
    torch.cuda.synchronize()
    assert encoded(data, width, device="cuda") == planes.encode(memoryview(data), width)


def chunks() -> list[tuple[bytes, int]]:
    """16 MiB each and a few bytes more or less, of every width and many coded planes."""
    found = []
    for number, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.float8_e5m2]):
        normal = torch.randn((16 << 20) + 1000 * number, generator=torch.Generator().manual_seed(number))
        bytes_ = (normal * 20).to(dtype)[: (16 << 20) // dtype.itemsize + 77 * number].view(torch.uint8)
        found.append((bytes_.numpy().tobytes()[: len(bytes_) - number], dtype.itemsize))
    widened = torch.randn(4 << 20).bfloat16().float().view(torch.uint8).numpy().tobytes()
    return [*found, (widened, 4), (torch.arange(2 << 20).view(torch.uint8).numpy().tobytes(), 8)]


def test_large_chunks_by_many_threads() -> None:
    work = [(data, width, *held(data, "cuda")) for data, width in chunks()]
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    found: list[tuple[int, int | None, bytes]] = []
    with Drain(8, max(len(data) for data, *_ in work), [0]) as drain:
        drain.compress()
        todo = parallel.Shared(iter([*range(len(work))] * 6))

        def body(_: object) -> None:
            with drain.lane() as lane:
                for number in todo:
                    data, width, _, address = work[number]
                    run = Run(0, address, len(data))
                    assert bytes(lane.bring(run)[: len(data)]) == data
                    size = lane.encode(run, width)
                    found.append((number, size, bytes(lane.padded(size or len(data)))))

        parallel.crew(body, 8)
    assert torch.cuda.mem_get_info()[0] == free
    frames = [planes.encode(memoryview(data), width) for data, width, *_ in work]
    assert sum(frame is not None for frame in frames) >= 5
    for number, size, view in found:
        frame = frames[number]
        assert size == (None if frame is None else len(frame)), number
        assert view[: size or len(work[number][0])] == (frame or work[number][0]), number


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_model(place: str, memory_path: Path, tmp_path: Path) -> None:
    """The same file as from the host, and no memory of the GPU stays taken."""
    model = torch.nn.Module()
    for number, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16, torch.int8]):
        made = (torch.randn(30_000_011, generator=torch.Generator().manual_seed(number)) * 5).to(dtype)
        model.register_parameter(f"p{number}", torch.nn.Parameter(made, requires_grad=False))
    where = memory_path if place == "memory" else tmp_path
    host = thaw_vllm.freeze_model(model, where / "host.thaw", compress=True)
    model.cuda()
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    report = thaw_vllm.freeze_model(model, where / "gpu.thaw", compress=True)
    assert torch.cuda.mem_get_info()[0] == free
    assert report.content == host.content and report.file_size == host.file_size < 0.9 * host.bytes
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(open(where / name, "rb")) for name in ("host.thaw", "gpu.thaw"))
        for block in iter(lambda: first.read(1 << 24), b""):
            assert second.read(1 << 24) == block
    thaw_vllm.freeze_model(model, where / "plain.thaw")
    rewrite(where / "plain.thaw", where / "again.thaw", encoder=0)
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(open(where / name, "rb")) for name in ("host.thaw", "again.thaw"))
        first.seek(1 << 20)
        second.seek(1 << 20)
        for block in iter(lambda: first.read(1 << 24), b""):
            assert second.read(1 << 24) == block
    with open_snapshot(where / "again.thaw") as again:
        assert again.snapshot.header.content == host.content
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for tensor in model.parameters():
        tensor.zero_()
    thaw_vllm.restore_model(model, where / "again.thaw")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
