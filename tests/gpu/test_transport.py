"""The way to a GPU: the kernel's sums, every route, damage, interruption, and what it costs in host memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.gpu.test_core import Zoo, moved, same

from thaw_vllm import freeze_model, pin, restore_model, restore_model_from_ram, restore_model_pipelined
from thaw_vllm.errors import CorruptionError
from thaw_vllm.transport import checksum, pipeline
from thaw_vllm.transport import reading_helpers as helpers
from thaw_vllm.transport.cuda import Context
from thaw_vllm.transport.readers import ROUTES
from thaw_vllm.transport.wordsum_cuda import CudaSums
from thaw_vllm.weights.open import open_snapshot

MB = 10**6


@pytest.fixture(autouse=True)
def no_threads() -> Iterator[None]:
    """Descriptors are not counted here: CUDA opens its own when it likes."""
    yield
    for thread in threading.enumerate():
        if thread.name == "thaw-helpers-end":
            thread.join()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("thaw-")]


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory_path: Path) -> Path:
    """A directory on tmpfs, and one that need not be."""
    return memory_path if request.param == "memory" else tmp_path


@pytest.fixture(params=["threads", "processes"])
def readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads a file through the page cache, whatever its size."""
    monkeypatch.setattr(helpers, "_WORTH", 0 if request.param == "processes" else 1 << 60)
    return str(request.param)


def model(*sizes: int, seed: int = 0, device: str = "cuda") -> torch.nn.Module:
    """One buffer of random bytes for each size."""
    generator, found = torch.Generator(device).manual_seed(seed), torch.nn.Module()
    for number, size in enumerate(sizes):
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator)
        found.register_buffer(f"t{number}", data)
    return found


def empty(like: torch.nn.Module) -> torch.nn.Module:
    """Zeros of the same form, on the GPU."""
    found = torch.nn.Module()
    for name, buffer in like.named_buffers():
        found.register_buffer(name, torch.zeros_like(buffer, device="cuda"))
    return found


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Compared on the GPU, byte by byte; both hold uint8."""
    ours, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n].cuda(), theirs[n].cuda()) for n in ours)


def healthy() -> bool:
    """Whether the GPU still computes."""
    torch.cuda.synchronize()
    a = torch.arange(4096.0, device="cuda")
    return float((a * 2).sum()) == 4095 * 4096.0


def damage(path: Path, name: str, at: int = 0) -> None:
    """Flip a bit of byte ``at`` of a tensor, in place."""
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
        storage = next(t.storage for t in snapshot.index.tensors if t.name == name)
        chunk = next(c for c in snapshot.chunks if c.storage == storage and c.at <= at < c.at + c.length)
        offset = snapshot.preamble.payload_at + chunk.stored_at + at - chunk.at
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))


# --- the kernel -------------------------------------------------------------------------------------------------------

ROW = checksum.LANES * 4
CHUNK = 4 << 20
LENGTHS = [*range(71), *range(ROW - 18, ROW + 19), *range(2 * ROW - 3, 2 * ROW + 4), *range(CHUNK - 5, CHUNK + 6)]


@pytest.fixture(scope="module")
def noise() -> tuple[memoryview, torch.Tensor]:
    """Random bytes, on the host and on the GPU."""
    data = bytearray(random.Random(11).randbytes(CHUNK + 64))
    return memoryview(data), torch.frombuffer(data, dtype=torch.uint8).cuda()


@pytest.fixture
def context() -> Iterator[Context]:
    torch.cuda.synchronize()
    found = Context(torch.cuda.current_device())
    with found.entered():
        yield found
    found.close()


@pytest.mark.parametrize("offset", range(16))
def test_kernel_gives_the_formats_sum(offset: int, noise: tuple[memoryview, torch.Tensor], context: Context):
    host, device = noise
    assert device.data_ptr() % 16 == 0
    runs = [(device.data_ptr() + offset, length) for length in LENGTHS]
    with CudaSums(context, len(runs)) as sums:
        sums.add(runs[:50])
        sums.add(runs[50:51])
        sums.add(runs[51:])
        found = sums.results()
    for length, value in zip(LENGTHS, found, strict=True):
        assert value == checksum.wordsum(host[offset : offset + length]), f"{length} bytes at {offset}"


@pytest.mark.parametrize("byte", [0, 1, 0x80, 0xFF])
def test_kernel_with_equal_bytes(byte: int, context: Context):
    """The largest words overflow first."""
    data = bytes([byte]) * (CHUNK + 5)
    device = torch.full((len(data),), byte, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with CudaSums(context, 1) as sums:
        sums.add([(device.data_ptr(), len(data))])
        assert sums.results() == [checksum.wordsum(memoryview(data))]


def test_kernel_on_many_runs_at_once(noise: tuple[memoryview, torch.Tensor], context: Context):
    host, device = noise
    rng = random.Random(12)
    spans = [(at, rng.randrange(3000)) for at in (rng.randrange(CHUNK) for _ in range(5000))]
    spans = [(at, min(length, len(host) - at)) for at, length in spans]
    with CudaSums(context, len(spans)) as sums:
        for first in range(0, len(spans), 700):
            sums.add([(device.data_ptr() + at, length) for at, length in spans[first : first + 700]])
        assert sums.results() == [checksum.wordsum(host[at : at + length]) for at, length in spans]


def test_kernel_on_a_chunk_of_the_largest_size(context: Context):
    size = 64 << 20
    generator = torch.Generator("cuda").manual_seed(13)
    device = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda", generator=generator)
    data = device.cpu().numpy()
    with CudaSums(context, 2) as sums:
        sums.add([(device.data_ptr(), size), (device.data_ptr() + 3, size - 3)])
        assert sums.results() == [checksum.wordsum(memoryview(data)), checksum.wordsum(memoryview(data)[3:])]


# --- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_every_byte(route: str, verify: bool, place: Path, readers: str):
    frozen = model(5 * MB + 3, 1, 0, 4096, 70 * MB, 12_345, seed=1)
    freeze_model(frozen, place / "m.thaw")
    thawed, seen = empty(frozen), []
    report = restore_model(
        thawed, place / "m.thaw", route=route, verify=verify, progress=lambda *done: seen.append(done)
    )
    assert equal(thawed, frozen)
    assert report.verified == ("wordsum" if verify else "none")
    assert "page-locked slots to cuda:" in report.route
    if place.is_relative_to("/dev/shm"):
        assert ("processes" in report.route) == (readers == "processes")
    assert report.why
    assert seen[-1] == (report.bytes, report.bytes)
    assert not report.sources or sum(report.sources.values()) >= report.bytes


def test_pipelined_and_from_memory(place: Path):
    frozen = model(9 * MB, 77, seed=2)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    restore_model_pipelined(thawed, place / "m.thaw")
    assert equal(thawed, frozen)
    thawed = empty(frozen)
    restore_model_from_ram(thawed, (place / "m.thaw").read_bytes())
    assert equal(thawed, frozen)


@pytest.mark.parametrize("route", ROUTES)
def test_thousands_of_tiny_tensors(route: str, place: Path, readers: str):
    frozen = model(*(1 + number % 300 for number in range(6000)), seed=3)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    restore_model(thawed, place / "m.thaw", route=route)
    assert equal(thawed, frozen)


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_tensor_larger_than_the_ring(workers: int | None, place: Path):
    size = 300 * MB + 5
    assert size > pipeline.RING
    frozen = model(size, seed=4)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    restore_model(thawed, place / "m.thaw", workers=workers)
    assert equal(thawed, frozen)


@pytest.mark.parametrize("route", ROUTES)
def test_every_dtype_and_strides_that_differ(route: str, place: Path, readers: str):
    """What lies as in the file goes straight to the GPU, the rest through the host."""
    frozen = moved(Zoo(1), "cuda")
    freeze_model(frozen, place / "m.thaw")
    alike = moved(Zoo(2), "cuda")
    report = restore_model(alike, place / "m.thaw", route=route)
    assert same(alike, frozen)
    assert report.verified == "xxh3+wordsum"  # ``strided`` has gaps
    other = moved(Zoo(3), "cuda")
    other.transposed = other.transposed.contiguous()
    other.strided = other.strided.contiguous()
    other.large = other.large.t().contiguous().t()
    strides = [buffer.stride() for buffer in other.buffers()]
    report = restore_model(other, place / "m.thaw", route=route)
    assert same(other, frozen)
    assert report.verified == "xxh3+wordsum"
    assert [buffer.stride() for buffer in other.buffers()] == strides


def test_tensors_at_odd_addresses(place: Path, readers: str):
    """Views of one allocation, apart by three bytes; what lies between them is left alone."""
    frozen = model(100_001, 7, 5 * MB + 1, 33, seed=5)
    freeze_model(frozen, place / "m.thaw")
    sizes = [buffer.numel() for buffer in frozen.buffers()]
    whole = torch.full((sum(sizes) + 3 * len(sizes) + 3,), 0xA5, dtype=torch.uint8, device="cuda")
    thawed, at = torch.nn.Module(), 3
    for number, size in enumerate(sizes):
        thawed.register_buffer(f"t{number}", whole[at : at + size])
        assert bool((whole[at - 3 : at] == 0xA5).all())
        at += size + 3
    restore_model(thawed, place / "m.thaw")
    assert equal(thawed, frozen)
    at = 0
    for size in [*sizes, 0]:
        assert bool((whole[at : at + 3] == 0xA5).all())
        at += size + 3


def test_host_and_gpu_in_one_model(place: Path, readers: str):
    frozen = model(3 * MB, 4 * MB, seed=6)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    thawed.t1 = thawed.t1.cpu()
    report = restore_model(thawed, place / "m.thaw")
    assert thawed.t1.device.type == "cpu"
    assert equal(thawed, frozen)
    assert report.verified == "xxh3+wordsum"


# --- damage and interruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5 * MB, 20 * MB + 2])
@pytest.mark.parametrize("route", ROUTES)
def test_damaged_byte_is_found_and_the_process_goes_on(route: str, at: int, place: Path, readers: str):
    frozen = model(1000, 20 * MB + 3, 1000, seed=7)
    freeze_model(frozen, place / "bad.thaw")
    freeze_model(frozen, place / "good.thaw")
    damage(place / "bad.thaw", "t1", at)
    with pytest.raises(CorruptionError, match=r"is damaged: the checksum of 't1' \(bytes \d+ to \d+\)"):
        restore_model(empty(frozen), place / "bad.thaw", route=route)
    assert healthy()
    thawed = empty(frozen)
    restore_model(thawed, place / "bad.thaw", route=route, verify=False)
    assert not equal(thawed, frozen)
    restore_model(thawed, place / "good.thaw", route=route)
    assert equal(thawed, frozen)


class Interrupt(KeyboardInterrupt):
    """Told apart from a real one."""


@pytest.mark.parametrize("route", ROUTES)
def test_ctrl_c_leaves_the_gpu_healthy(route: str, place: Path, readers: str):
    frozen = model(300 * MB, 5, seed=8)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)

    def interrupt(done: int, total: int) -> None:
        raise Interrupt

    for _ in range(3):
        with pytest.raises(Interrupt):
            restore_model(thawed, place / "m.thaw", route=route, progress=interrupt)
        assert healthy()
        # Nothing is under way any more: what is written now stays.
        for buffer in thawed.buffers():
            buffer.fill_(1)
        assert healthy()
        assert all(bool((buffer == 1).all()) for buffer in thawed.buffers())
    restore_model(thawed, place / "m.thaw", route=route)
    assert equal(thawed, frozen)


# --- pinned -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 1])
def test_pinned_fills_one_model_after_another(workers: int | None, place: Path):
    """Larger than one locked part, so that some copies are cut between two."""
    frozen = model(200 * MB + 1, 1, 0, 5 * MB, *range(1, 400), seed=9)
    freeze_model(frozen, place / "m.thaw")
    with pin(place / "m.thaw", workers=workers) as pinned:
        for _ in range(2):
            thawed, seen = empty(frozen), []
            report = pinned.restore(thawed, progress=lambda *done, seen=seen: seen.append(done))
            assert equal(thawed, frozen)
            assert report.verified == "wordsum"
            assert "page-locked memory to cuda:" in report.route
            assert seen[-1] == (report.bytes, report.bytes)
        on_host = model(*(buffer.numel() for buffer in frozen.buffers()), seed=10, device="cpu")
        pinned.restore(on_host)
        assert equal(on_host, frozen)
    assert healthy()


def test_pinned_with_other_strides(place: Path):
    frozen, thawed = moved(Zoo(1), "cuda"), moved(Zoo(2), "cuda")
    freeze_model(frozen, place / "m.thaw")
    thawed.large = thawed.large.t().contiguous().t()
    with pin(place / "m.thaw", torch.cuda.current_device()) as pinned:
        pinned.restore(thawed)
    assert same(thawed, frozen)


def test_pinned_finds_damage_and_serves_on(place: Path):
    frozen = model(1000, 20 * MB, seed=11)
    freeze_model(frozen, place / "m.thaw")
    damage(place / "m.thaw", "t1", 9 * MB)
    with pin(place / "m.thaw") as pinned:
        for _ in range(2):
            with pytest.raises(CorruptionError, match="the checksum of 't1'"):
                pinned.restore(empty(frozen))
        thawed = empty(frozen)
        assert pinned.restore(thawed, verify=False).verified == "none"
        assert not equal(thawed, frozen)
    assert healthy()


def test_pinned_and_interrupted(place: Path):
    frozen = model(300 * MB, seed=12)
    freeze_model(frozen, place / "m.thaw")

    def interrupt(done: int, total: int) -> None:
        raise Interrupt

    with pin(place / "m.thaw") as pinned:
        thawed = empty(frozen)
        with pytest.raises(Interrupt):
            pinned.restore(thawed, progress=interrupt)
        thawed.t0.fill_(1)
        assert healthy()
        assert bool((thawed.t0 == 1).all())
        pinned.restore(thawed)
        assert equal(thawed, frozen)
    assert healthy()


# --- what it costs, and whom it concerns ------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_staging_memory_is_small(place: Path):
    frozen = model(*[250 * MB] * 4, seed=13)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    small = model(100)
    freeze_model(small, place / "small.thaw")
    restore_model(empty(small), place / "small.thaw")  # so that what is loaded once is loaded
    before, most, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        restore_model(thawed, place / "m.thaw", progress=lambda *_: most.append(anonymous()))
    finally:
        stop.set()
        watcher.join()
    assert equal(thawed, frozen)
    assert max(most) - before < 256 << 20


def test_no_memory_of_the_gpu_is_kept(place: Path):
    frozen = model(50 * MB, seed=14)
    freeze_model(frozen, place / "m.thaw")
    thawed = empty(frozen)
    restore_model(thawed, place / "m.thaw")
    torch.cuda.synchronize()
    allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(10):
        restore_model(thawed, place / "m.thaw")
    assert torch.cuda.memory_allocated() == allocated
    assert free - torch.cuda.mem_get_info()[0] < 32 << 20


ELSEWHERE = """
import ctypes, sys
import torch
from thaw_vllm import freeze_model, pin, restore_model

used, current, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.cuda.set_device(current)
model = torch.nn.Module()
model.register_buffer("w", torch.arange(3_000_000, device=f"cuda:{used}"))
freeze_model(model, path, force=True)
expected = model.w.clone()
model.w.zero_()
restore_model(model, path)
assert torch.equal(model.w, expected)
assert torch.cuda.current_device() == current
model.w.zero_()
with pin(path, used) as pinned:
    assert torch.cuda.current_device() == current
    pinned.restore(model)
assert torch.equal(model.w, expected)
assert torch.cuda.current_device() == current
driver = ctypes.CDLL("libcuda.so.1")
for device in range(torch.cuda.device_count()):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    print(device, active.value)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("used", "current"), [(1, 1), (0, 0), (1, 0)])
def test_other_gpus_are_left_alone(used: int, current: int, tmp_path: Path):
    """No context on a GPU that holds none of the model, and the caller's current GPU stays the current one."""
    import subprocess
    import sys

    command = [sys.executable, "-c", ELSEWHERE, str(used), str(current), str(tmp_path / "m.thaw")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    active = dict(tuple(map(int, line.split())) for line in done.stdout.splitlines())
    if used == current:
        assert [device for device, on in active.items() if on] == [used]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_model_on_two_gpus(place: Path):
    frozen = model(30 * MB, 31 * MB, seed=15)
    freeze_model(frozen, place / "m.thaw")

    def spread() -> torch.nn.Module:
        found = empty(frozen)
        found.t1 = found.t1.to("cuda:1")
        return found

    thawed = spread()
    restore_model(thawed, place / "m.thaw")
    assert equal(thawed, frozen)
    assert torch.cuda.current_device() == 0
    with pin(place / "m.thaw") as pinned:
        thawed = spread()
        pinned.restore(thawed)
    assert equal(thawed, frozen)
    assert torch.cuda.current_device() == 0
