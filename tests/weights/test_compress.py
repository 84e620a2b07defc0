"""Snapshots whose chunks are compressed: written, rewritten and read; the same bits and ids, and damage is told."""

import _thread
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from tests.weights.modules import state
from tests.weights.worlds import freeze_threads, loaded

import thaw_vllm
from thaw_vllm.errors import CorruptionError, ExistsError, FormatError, ReplacedError, SpaceError, ThawError, UsageError
from thaw_vllm.format.chunks import PLANES, RAW
from thaw_vllm.transport import writer
from thaw_vllm.weights import freeze
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.convert import from_checkpoint
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.verify import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

CHUNK = 4 << 20


def model(scale=0.02):
    """Of every kind of tensor, some of several chunks, some too small to gain, with a tie."""
    made = torch.nn.Module()
    random_ = torch.Generator().manual_seed(7)

    def put(name, tensor):
        made.register_parameter(f"the_{name}", torch.nn.Parameter(tensor, requires_grad=False))

    put("large", (torch.randn(3001, 1501, generator=random_) * scale).bfloat16())
    put("turned", (torch.randn(900, 700, generator=random_) * scale).bfloat16().t())
    put("single", torch.randn(300_001, generator=random_) * scale)
    put("half", (torch.randn(300_001, generator=random_) * scale).half())
    put("eight", (torch.randn(300_001, generator=random_) * scale * 20).to(torch.float8_e4m3fn))
    put("widened", (torch.randn(300_001, generator=random_) * scale).bfloat16().float())
    put("noise", torch.randint(-(1 << 31), (1 << 31) - 1, (200_001,), generator=random_, dtype=torch.int32))
    put("every", torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16))
    put("zeros", torch.zeros(100_000))
    put("constant", torch.full((100_000,), float("nan")))
    put("one", torch.ones(()))
    put("none", torch.empty(0))
    made.tied = made.the_large
    made.register_buffer("scaled", torch.full((3,), scale))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model, plain and compressed."""
    place = tmp_path_factory.mktemp("files")
    for compress in (False, True):
        thaw_vllm.freeze_model(model(), place / f"{compress}.thaw", compress=compress, chunk_size=CHUNK)
    return place / "False.thaw", place / "True.thaw"


def codecs(path):
    with open_snapshot(path) as opened:
        return {chunk.codec for chunk in opened.snapshot.chunks}


def ids(path):
    with open_snapshot(path) as opened:
        return opened.snapshot.header.content, opened.snapshot.header.identity


@pytest.mark.parametrize("check", [True, False])
def test_same_bits_in_fewer_bytes(check, files):
    plain, small = files
    assert codecs(plain) == {RAW} and codecs(small) == {RAW, PLANES} and ids(plain) == ids(small)
    assert small.stat().st_size < 0.75 * plain.stat().st_size
    other = model(3.0)
    for tensor in other.parameters():
        tensor.data = tensor.contiguous() if tensor.dim() != 2 else tensor  # other strides than the file's
    told = []
    report = thaw_vllm.restore_model(other, small, verify=check, progress=lambda *now: told.append(now))
    assert state(other) == state(model())
    assert report.stored < 0.75 * report.bytes and report.wire_gb_per_s < report.gb_per_s
    assert told[-1] == (report.stored, report.stored)
    assert verify(small, content=True).content == ids(plain)[0]


def test_neither_yes_nor_no(tmp_path):
    with pytest.raises(UsageError, match="compress must be True or False, not 'yes'"):
        thaw_vllm.freeze_model(torch.nn.Linear(2, 2), tmp_path / "w.thaw", compress="yes")
    assert not list(tmp_path.iterdir())


def test_held_in_memory(files):
    other = model(3.0)
    with thaw_vllm.pin(files[1], device="cpu") as held:
        held.restore(other)
    assert state(other) == state(model())


def test_there_and_back(files, tmp_path):
    plain, small = files
    (made,) = rewrite(plain, tmp_path / "small.thaw")
    assert made.content == ids(plain)[0] and (tmp_path / "small.thaw").stat().st_size == small.stat().st_size
    rewrite(tmp_path / "small.thaw", tmp_path / "plain.thaw", compress=False)
    assert codecs(tmp_path / "plain.thaw") == {RAW} and ids(tmp_path / "plain.thaw") == ids(plain)
    rewrite(small, tmp_path / "small.thaw", force=True, workers=1)
    assert ids(tmp_path / "small.thaw") == ids(plain) and codecs(tmp_path / "small.thaw") == {RAW, PLANES}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.thaw", "small.thaw"]


@pytest.mark.parametrize("refused", [None, "cuDevicePrimaryCtxRetain", "cuMemAlloc_v2", "cuModuleLoadData"])
def test_by_a_gpu(refused, files, tmp_path, driver):
    """A made-up one: the same bytes, as by processors where it cannot."""
    if refused:
        driver.refuse[refused] = 0
    rewrite(files[0], tmp_path / "gpu.thaw", encoder=0)
    rewrite(files[0], tmp_path / "cpu.thaw")
    assert (tmp_path / "gpu.thaw").read_bytes() == (tmp_path / "cpu.thaw").read_bytes()
    assert (b"encode_2" in driver.launched) == (refused is None)
    rewrite(tmp_path / "gpu.thaw", tmp_path / "plain.thaw", compress=False, encoder=0)
    assert codecs(tmp_path / "plain.thaw") == {RAW}


def test_chunks_of_other_sizes(files, tmp_path, monkeypatch):
    """A chunk of the new file may be of several of the old one, and the other way round."""
    from thaw_vllm.weights import compress

    plain, _ = files
    for size in (8 << 20, CHUNK):
        monkeypatch.setattr(compress, "_chunk_size", lambda _, size=size: size)
        rewrite(plain, tmp_path / "w.thaw", force=True)
        assert verify(tmp_path / "w.thaw", content=True).content == ids(plain)[0]
        plain = tmp_path / "again.thaw"
        os.replace(tmp_path / "w.thaw", plain)


@pytest.mark.parametrize("world", [2, 3])
def test_a_set(world, tmp_path):
    assert all(freeze_threads(tmp_path / "w.thaw", 1.0, world))
    reports = rewrite(tmp_path / "w.thaw", tmp_path / "small.thaw")
    assert len(reports) == world and loaded(tmp_path / "small.thaw", world) == 1.0
    verify(tmp_path / "small.thaw", content=True)
    with open_snapshot(tmp_path / "small.thaw") as opened:
        member = tmp_path / opened.snapshot.header.ranks.members[0].name
    with pytest.raises(UsageError, match="give the manifest"):
        rewrite(member, tmp_path / "other.thaw")
    with pytest.raises(UsageError, match="choose another name"):
        rewrite(tmp_path / "small.thaw", member, force=True)
    os.unlink(member)
    with pytest.raises(CorruptionError, match="is missing"):
        rewrite(tmp_path / "small.thaw", tmp_path / "other.thaw")
    assert not (tmp_path / "other.thaw").exists()


def test_where_to(files, tmp_path):
    plain, _ = files
    (tmp_path / "there.thaw").write_bytes(b"x")
    with pytest.raises(ExistsError):
        rewrite(plain, tmp_path / "there.thaw")
    os.link(plain, tmp_path / "same.thaw")
    for name in (plain, tmp_path / "same.thaw"):
        with pytest.raises(UsageError, match="choose another name"):
            rewrite(plain, name, force=True)
    assert verify(plain) and (tmp_path / "there.thaw").read_bytes() == b"x"


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit(seed, files, tmp_path):
    """Wherever: an error, or the same bits."""
    rng, data = random.Random(seed), bytearray(files[1].read_bytes())
    with open_snapshot(files[1]) as opened:
        found = rng.choice([chunk for chunk in opened.snapshot.chunks if chunk.codec == PLANES])
        at = opened.snapshot.preamble.payload_at + found.stored_at + rng.randrange(found.stored)
    data[at] ^= 1 << rng.randrange(8)
    path = tmp_path / "w.thaw"
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="is damaged"):
        verify(path)
    with pytest.raises(CorruptionError, match="is damaged"):
        rewrite(path, tmp_path / "new.thaw")
    with pytest.raises(CorruptionError, match="is damaged"):
        thaw_vllm.restore_model(model(3.0), path)
    assert [path.name for path in tmp_path.iterdir()] == ["w.thaw"]


def test_lengths_that_cannot_be(files):
    from dataclasses import replace

    from thaw_vllm.format.snapshot import check_chunks

    with open_snapshot(files[1]) as opened:
        snapshot = opened.snapshot
    number = next(n for n, chunk in enumerate(snapshot.chunks) if chunk.codec == PLANES)
    for change in ({"stored": 0}, {"stored": snapshot.chunks[number].length}, {"codec": RAW}):
        chunks = [*snapshot.chunks]
        chunks[number] = replace(chunks[number], **change)
        with pytest.raises(FormatError, match=f"chunk {number}: "):
            check_chunks(tuple(chunks), snapshot.index.storages, snapshot.preamble.payload)


@pytest.mark.parametrize("failing", [1, 3])
def test_full_disk(failing, files, tmp_path, monkeypatch):
    """One write fails, whichever: nothing is left, and nobody waits for a place."""
    real, calls = writer.StagedFile.write_bulk, []

    def write(self, offset, view):
        calls.append(offset)
        if len(calls) == failing:
            raise SpaceError("full")
        real(self, offset, view)

    monkeypatch.setattr(writer.StagedFile, "write_bulk", write)
    with pytest.raises(SpaceError, match="full"):
        rewrite(files[0], tmp_path / "w.thaw", workers=4)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("world", [2, 3])
def test_one_rank_fails(world, tmp_path, monkeypatch):
    """Nobody waits for it."""
    assert all(freeze_threads(tmp_path / "w.thaw", 1.0, world))
    before, real = {*tmp_path.iterdir()}, freeze.block_digests
    calls = []

    def digests(data):
        calls.append(data)
        if len(calls) == 2:
            raise SpaceError("full")
        return real(data)

    monkeypatch.setattr(freeze, "block_digests", digests)
    with pytest.raises(ThawError):
        rewrite(tmp_path / "w.thaw", tmp_path / "small.thaw")
    assert {*tmp_path.iterdir()} == before


def test_ctrl_c_before_every_rank_has_begun(tmp_path, monkeypatch):
    assert all(freeze_threads(tmp_path / "w.thaw", 1.0, 3))
    before, real = {*tmp_path.iterdir()}, threading.Thread.start
    begun = []

    def start(self):
        begun.append(self)
        if len(begun) == 3:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        rewrite(tmp_path / "w.thaw", tmp_path / "small.thaw")
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("compress", [True, False])
def test_ctrl_c(compress, files, tmp_path, monkeypatch):
    real = freeze.block_digests

    def digests(data):
        if threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        return real(data)

    monkeypatch.setattr(freeze, "block_digests", digests)
    with pytest.raises(KeyboardInterrupt):
        rewrite(files[0], tmp_path / "w.thaw", compress=compress, workers=3)
    assert not [*tmp_path.iterdir()]


def test_altered_and_sealed_again(tmp_path):
    """A file whose checksums agree and whose content id does not is not passed on as sound."""
    real = freeze.content_id
    try:
        freeze.content_id = lambda *_: "1" * 64
        thaw_vllm.freeze_model(model(), tmp_path / "w.thaw")
    finally:
        freeze.content_id = real
    (tmp_path / "old.thaw").write_bytes(b"old")
    for name in ("new.thaw", "old.thaw"):
        with pytest.raises(CorruptionError, match="was altered"):
            rewrite(tmp_path / "w.thaw", tmp_path / name, force=True)
    assert (tmp_path / "old.thaw").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.thaw", "w.thaw"]


def test_carried_files_stay_as_they_are(tmp_path):
    """They are read before an engine starts, which must not find numba there."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"w": (torch.randn(900_000) * 0.02).bfloat16()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{" + " " * 2_000_000 + "}")
    (directory / "tokenizer.json").write_text("{" + " " * 2_000_000 + "}")
    from_checkpoint(directory, tmp_path / "plain.thaw")
    rewrite(tmp_path / "plain.thaw", tmp_path / "w.thaw")
    script = f"""
import sys
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.read_storage import filled
with open_snapshot({str(tmp_path / "w.thaw")!r}) as opened:
    index = opened.snapshot.index
    assert {{chunk.codec for chunk in opened.snapshot.chunks}} == {{0, 1}}
    assert sum(len(filled(opened.snapshot, opened.source, file.storage)) for file in index.files) == 4_000_004
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_a_set_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """Nothing is written of two sets."""
    from thaw_vllm.weights import compress

    freeze_threads(tmp_path / "w.thaw", 1, 2)
    real, calls = compress.open_rank, []

    def opened(path, rank, **options):
        calls.append(rank)
        if rank == 1:
            freeze_threads(tmp_path / "w.thaw", 2, 2)
        return real(path, rank, **options)

    monkeypatch.setattr(compress, "open_rank", opened)
    with pytest.raises(ReplacedError, match="was replaced by another set while it was opened"):
        rewrite(tmp_path / "w.thaw", tmp_path / "new.thaw")
    assert calls == [0, 1] and not (tmp_path / "new.thaw").exists()
