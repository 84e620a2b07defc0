import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, FormatError, ReplacedError, StorageError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.format.preamble import SIZE
from thaw_vllm.format.snapshot import front
from thaw_vllm.transport import read as reading
from thaw_vllm.transport.checksum import xxh3
from thaw_vllm.weights import verify as verifying
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.ranks import freeze_rank
from thaw_vllm.weights.verify import verify

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.large = torch.nn.Parameter(torch.randn(9 * MIB // 4 + 3))
        self.small = torch.nn.Parameter(torch.randn(5, 7))
        self.tied = self.small
        self.none = torch.nn.Parameter(torch.empty(0, 3))


@pytest.fixture
def path(tmp_path):
    freeze_model(Model(), tmp_path / "model.thaw", chunk_size=4 * MIB)
    return tmp_path / "model.thaw"


def change(path, offset, by=1):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ by]))


def sections(path):
    with open_snapshot(path) as opened:
        return opened.snapshot


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_sound(path, content, workers):
    seen = []
    report = verify(path, content=content, workers=workers, progress=lambda done, total: seen.append((done, total)))
    snapshot = sections(path)
    assert report.files == (str(path),) and report.path == str(path)
    assert report.bytes == path.stat().st_size
    assert report.chunks == len(snapshot.chunks) == 4
    assert report.content == snapshot.header.content and report.model == snapshot.header.identity.model
    expected = ("sections", "chunks", "padding", "content") if content else ("sections", "chunks", "padding")
    assert report.verified == expected
    assert report.seconds > 0 and report.gb_per_s > 0
    assert seen == sorted(seen) and {total for _, total in seen} == {report.bytes}
    assert seen[-1][0] <= report.bytes


def test_every_byte_matters(path):
    """One flipped bit at a time: in every section, at the edges of every chunk, in every range of padding."""
    snapshot = sections(path)
    preamble = snapshot.preamble
    places = {0, 8, 40, SIZE - 1, SIZE, preamble.index_at, preamble.chunks_at, preamble.chunks_end - 1}
    for chunk in snapshot.chunks:
        begin = preamble.payload_at + chunk.stored_at
        places |= {begin, begin + chunk.length // 2, begin + chunk.length - 1}
    for offset, length in snapshot.paddings():
        places |= {offset, offset + length - 1}
    assert len(places) > 20
    for place in sorted(places):
        change(path, place)
        with pytest.raises(FormatError) as failure:
            verify(path)
        assert repr(str(path)) in str(failure.value)
        change(path, place)
    verify(path)


def test_says_which_tensor_and_where(path):
    snapshot = sections(path)
    chunk = snapshot.chunks[1]
    assert snapshot.index.tensors[0].name == "large"
    begin = snapshot.preamble.payload_at + chunk.stored_at
    change(path, begin + chunk.length - 1)
    with pytest.raises(CorruptionError, match=f"'large' .bytes {begin} to {begin + chunk.length}.*copy the file again"):
        verify(path)


def test_padding_is_named(path):
    offset, length = sections(path).paddings()[-1]
    change(path, offset + length - 1)
    with pytest.raises(CorruptionError, match=f"bytes {offset} to {offset + length}.*must be zero"):
        verify(path)


def test_carried_file_is_named(tmp_path):
    header = Header(identity=Identity(stage="checkpoint"))
    captured = capture([("w", "tensor", torch.ones(3))], [("config.json", b"{}")])
    write_snapshot(tmp_path / "a.thaw", header, captured, FreezeOptions())
    snapshot = sections(tmp_path / "a.thaw")
    change(tmp_path / "a.thaw", snapshot.preamble.payload_at + snapshot.chunks[-1].stored_at)
    with pytest.raises(CorruptionError, match=r"the file 'config\.json'"):
        verify(tmp_path / "a.thaw")


@pytest.mark.parametrize("step", [4096, 65_537, 4 * MIB, 64 * MIB])
def test_steps_of_any_size(path, step, monkeypatch):
    monkeypatch.setattr(reading, "step_size", lambda workers: step)
    verify(path)
    snapshot = sections(path)
    change(path, snapshot.preamble.payload_at + snapshot.chunks[0].length - 1)
    with pytest.raises(CorruptionError):
        verify(path)


def altered(path, **fields):
    """Write another header over the old one, every section's digest made to agree."""
    snapshot = sections(path)
    header = dataclasses.replace(snapshot.header, **fields)
    head, preamble = front(header, snapshot.index, snapshot.chunks, snapshot.preamble.header)
    assert preamble.payload_at == snapshot.preamble.payload_at
    with path.open("r+b") as file:
        file.write(head)


def test_content_id_is_held_against_the_bytes(path):
    altered(path, content="ab" * 32)
    assert verify(path).content == "ab" * 32
    with pytest.raises(CorruptionError, match=f"content id is {'ab' * 32}, its bytes give [0-9a-f]{{64}}"):
        verify(path, content=True)


def test_forged_checksum_is_found_by_the_content_id(path):
    snapshot = sections(path)
    last = snapshot.chunks[-1]
    change(path, snapshot.preamble.payload_at + last.stored_at)
    with path.open("rb") as file:
        file.seek(snapshot.preamble.payload_at + last.stored_at)
        forged = dataclasses.replace(last, xxh3=xxh3(memoryview(file.read(last.length))))
    head, _ = front(snapshot.header, snapshot.index, (*snapshot.chunks[:-1], forged), snapshot.preamble.header)
    with path.open("r+b") as file:
        file.write(head)
    verify(path)
    with pytest.raises(CorruptionError, match="content id"):
        verify(path, content=True)


def test_truncated_and_missing(path, tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        verify(tmp_path / "nowhere.thaw")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptionError, match="truncated"):
        verify(path)


def test_written_to_meanwhile(path, monkeypatch):
    original = verifying._check_padding

    def meanwhile(opened, workers):
        original(opened, workers)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(verifying, "_check_padding", meanwhile)
    with pytest.raises(ReplacedError):
        verify(path)


def test_empty_model(tmp_path):
    freeze_model(torch.nn.Module(), tmp_path / "empty.thaw")
    report = verify(tmp_path / "empty.thaw", content=True)
    assert report.chunks == 0 and report.bytes == (tmp_path / "empty.thaw").stat().st_size


class Together:
    """An all-gather among threads."""

    def __init__(self, size):
        self.barrier, self.messages = threading.Barrier(size), [b""] * size

    def of(self, rank):
        def exchange(message):
            self.messages[rank] = message
            self.barrier.wait(30)
            everyone = list(self.messages)
            self.barrier.wait(30)
            return everyone

        return exchange


def freeze_set(target, size=3, seed=0):
    torch.manual_seed(seed)
    together = Together(size)
    failures = []

    def freeze(rank):
        header = Header(identity=Identity(stage="raw", engine="vllm", parallel=Parallel(tp_rank=rank, tp_size=size)))
        captured = capture([("w", "parameter", torch.randn(1000 + rank))])
        try:
            freeze_rank(target, header, captured, FreezeOptions(force=True), together.of(rank), lambda: None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=freeze, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.fixture
def manifest(tmp_path):
    freeze_set(tmp_path / "set.thaw")
    return tmp_path / "set.thaw"


def members(manifest):
    return [manifest.with_name(m.name) for m in sections(manifest).header.ranks.members]


def test_set(manifest):
    report = verify(manifest, content=True)
    files = [manifest, *members(manifest)]
    assert report.files == tuple(map(str, files))
    assert report.bytes == sum(f.stat().st_size for f in files)
    assert report.verified == ("sections", "chunks", "padding", "content", "set")


def test_set_without_its_ranks(manifest):
    members(manifest)[0].unlink()
    assert verify(manifest, ranks=False).files == (str(manifest),)


def test_one_rank_of_a_set_alone(manifest):
    member = members(manifest)[1]
    report = verify(member)
    assert report.files == (str(member),) and "set" not in report.verified


def test_set_with_a_rank_missing(manifest):
    members(manifest)[1].unlink()
    with pytest.raises(CorruptionError, match=r"rank 2 of .* is missing"):
        verify(manifest)


def test_set_with_a_damaged_rank(manifest):
    member = members(manifest)[1]
    snapshot = sections(member)
    change(member, snapshot.preamble.payload_at)
    with pytest.raises(CorruptionError, match=member.name):
        verify(manifest)


def test_set_with_a_foreign_rank(manifest, tmp_path):
    (tmp_path / "other").mkdir()
    freeze_set(tmp_path / "other" / "set.thaw", seed=1)
    os.replace(members(tmp_path / "other" / "set.thaw")[0], members(manifest)[0])
    with pytest.raises(CorruptionError, match="not the file that"):
        verify(manifest)


def test_set_replaced_meanwhile(manifest, monkeypatch):
    original = verifying._check_padding

    def meanwhile(opened, workers):
        monkeypatch.setattr(verifying, "_check_padding", original)
        freeze_set(manifest, seed=2)

    monkeypatch.setattr(verifying, "_check_padding", meanwhile)
    with pytest.raises(ReplacedError, match="run it again"):
        verify(manifest)


def test_needs_neither_torch_nor_numpy(path):
    code = f"""
import sys
from thaw_vllm.weights.verify import verify
report = verify({str(path)!r}, content=True)
assert report.chunks == 4
print(sorted({{"torch", "numpy", "safetensors", "vllm"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
