"""Compressed ranges decoded on a GPU: every width and plane, blocks whole and not, hostile words; bit for bit."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.transport.test_coded_link import KINDS, Work, data_of

import thaw_vllm
from thaw_vllm.codecs import planes
from thaw_vllm.transport import coded_link, coded_torch
from thaw_vllm.transport.pipeline import deliver
from thaw_vllm.transport.planes_cuda import PlaneKernels, room
from thaw_vllm.transport.readers import Cached
from thaw_vllm.transport.source import MemorySource
from thaw_vllm.weights import ahead


def sent(work: Work, **options: Any) -> None:
    torch.cuda.synchronize()
    with contextlib.closing(MemorySource(bytes(work.file))) as source, contextlib.closing(work.link()) as link:
        deliver(Cached(source, "memory", "a test"), "it", work.ranges, link, workers=4, **options)


@pytest.mark.parametrize("elements", [40, 128, 3 * 128, 3 * 128 + 77, 40 * 128 + 1])
@pytest.mark.parametrize("shift", [0, 2])
def test_every_kind(shift: int, elements: int) -> None:
    work = Work(20, elements * planes.ROW, shift=shift, device="cuda")
    sent(work)
    assert work.arrived()


def test_little_scratch(monkeypatch: Any) -> None:
    work = Work(60, 3 * planes.BLOCK, device="cuda")
    monkeypatch.setattr(coded_link, "SCRATCH", 1 << 20)
    sent(work, verify=False)
    assert work.arrived()


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bit(seed: int) -> None:
    work, rng = Work(10, 40 * planes.ROW, tail=0, device="cuda"), random.Random(seed)
    work.sent_with_a_flipped_bit(sent, rng)


@pytest.mark.parametrize("width", planes.WIDTHS)
def test_every_plane(width: int) -> None:
    """Each coded alone, and all together."""
    rng = np.random.default_rng(width)
    elements = planes.BLOCK + 3 * planes.ROW
    for coded in range(1, 1 << width):
        parts = rng.integers(0, 256, (width, elements), np.uint8)
        for plane in range(width):
            if coded >> plane & 1:
                parts[plane] = rng.normal(40 + 50 * plane, 3, elements).astype(np.uint8)  # else they were one plane's
        data = np.empty(width * elements, np.uint8)
        turn = int(width > 1)
        planes.merge(parts, turn, data)
        frame_ = planes.encode(memoryview(data), width)
        assert frame_ is not None
        frame = planes.layout(frame_, len(data), len(frame_))
        assert frame.width == width and [place.coded for place in frame.planes] == [
            bool(coded >> plane & 1) for plane in range(width)
        ]
        assert decoded(frame_, frame, len(data)) == bytes(data)


def decoded(stored: bytes, frame: planes.Frame, length: int) -> bytes:
    """What the GPU makes of it; what is around its memory stays as it was."""
    given = torch.frombuffer(bytearray(stored), dtype=torch.uint8).cuda()
    between = torch.zeros(room(frame) + 16, dtype=torch.uint8, device="cuda")
    out = torch.full((length + 512,), 0xEE, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with contextlib.closing(PlaneKernels(0)) as kernels, kernels.entered():
        kernels.decode(frame, given.data_ptr(), between.data_ptr(), out.data_ptr() + 256, 0)
    torch.cuda.synchronize()
    assert (out[:256] == 0xEE).all() and (out[256 + length :] == 0xEE).all()
    return bytes(out[256 : 256 + length].cpu().numpy())


@pytest.mark.parametrize("seed", range(20))
def test_hostile_words(seed: int) -> None:
    """Decoded to something, and nothing outside is touched."""
    data = torch.randn(2 * planes.BLOCK + 640, generator=torch.Generator().manual_seed(seed)).bfloat16()
    frame_ = bytearray(planes.encode(memoryview(data.view(torch.uint8).numpy()), 2) or b"")
    frame, rng = planes.layout(bytes(frame_), 2 * len(data), len(frame_)), random.Random(seed)
    first = frame.planes[1].at if seed % 2 else frame.planes[1].ends
    for _ in range(1 << rng.randrange(1, 14)):
        frame_[rng.randrange(first, len(frame_))] = rng.randrange(256)
    if seed % 4 == 0:
        frame_[first : frame.tail] = rng.choice([b"\0", b"\xff"]) * (frame.tail - first)
    decoded(bytes(frame_), frame, 2 * len(data))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "raw"])
def test_by_torch(kind: str) -> None:
    """For other devices; this one stands for them."""
    data, width = data_of(kind, 3 * planes.BLOCK + 5 * planes.ROW, 1)
    frame = planes.encode(memoryview(data), width)
    assert frame is not None
    out = torch.empty(len(data), dtype=torch.uint8, device="cuda")
    coded_torch.decode(torch.frombuffer(bytearray(frame), dtype=torch.uint8).cuda(), out)
    assert out.cpu().numpy().tobytes() == data


@pytest.mark.parametrize("compress", [False, True])
def test_expected(compress: bool, memory_path: Any) -> None:
    """Helpers and kernels that came up before are used, again and again, and end when told to."""
    device = torch.device("cuda", 0)
    model = torch.nn.Module()
    for number in range(10):
        made = (torch.randn(60_000_000, device="cuda") * 0.02).bfloat16()
        model.register_parameter(f"p{number}", torch.nn.Parameter(made, requires_grad=False))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    thaw_vllm.freeze_model(model, memory_path / "model.thaw", compress=compress)
    thaw_vllm.expect_restore(0)
    kept = ahead.kept(device)
    known = kept._helpers
    for _ in range(3):
        for tensor in model.parameters():
            tensor.zero_()
        report = thaw_vllm.restore_model(model, memory_path / "model.thaw")
        assert "processes" in report.route or known is None
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
        assert kept._helpers is known
    ahead.rest(device)
    assert not kept.running(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model(kind: str, memory_path: Any) -> None:
    """As files: compressed, thawed by helpers and pinned; no memory of the GPU stays taken."""
    dtype = {"bfloat16": torch.bfloat16, "widened": torch.float32, "float32": torch.float32}.get(kind, torch.int8)
    model = torch.nn.Module()
    for number in range(12):
        made = torch.randn(5_000_011, device="cuda") * (9 if dtype == torch.int8 else 0.02)
        made = made.bfloat16().to(dtype) if kind == "widened" else made.to(dtype)
        model.register_parameter(f"p{number}", torch.nn.Parameter(made, requires_grad=False))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    path = memory_path / "model.thaw"
    written = thaw_vllm.freeze_model(model, path, compress=True)
    assert written.file_size < 0.95 * written.bytes
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(2):
        for tensor in model.parameters():
            tensor.zero_()
        report = thaw_vllm.restore_model(model, path)
        assert report.verified == "wordsum" and report.stored < 0.95 * report.bytes
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert free - torch.cuda.mem_get_info()[0] < 64 << 20
    with thaw_vllm.pin(path) as held:
        for tensor in model.parameters():
            tensor.zero_()
        held.restore(model)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
