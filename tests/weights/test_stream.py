"""A checkpoint's tensors, streamed: every one whole, bounded memory, and errors where they are taken."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from thaw_vllm.errors import CorruptionError, ReplacedError, StorageError, UnsupportedError
from thaw_vllm.weights import stream as streaming
from thaw_vllm.weights.checkpoint import open_checkpoint
from thaw_vllm.weights.stream import StreamReport, stream

pytestmark = pytest.mark.usefixtures("no_leaks")
CPU = torch.device("cpu")


def tensors():
    generator = torch.Generator().manual_seed(3)
    found = {f"t{n}": torch.randn(1 + n % 7, 5, generator=generator) for n in range(300)}
    found |= {f"h{n}": torch.randn(300 + n, 1001, generator=generator).bfloat16() for n in range(12)}
    found |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "byte": torch.tensor([7], dtype=torch.uint8)}
    found["eight"] = torch.randn(33, 7, generator=generator).to(torch.float8_e4m3fn)
    found["large"] = torch.randn(3_000_001, generator=generator)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two shards and their index; data_offsets that are no multiple of anything."""
    found = tmp_path_factory.mktemp("checkpoint")
    every = tensors()
    names = sorted(every)
    where = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: every[name] for name in part}, found / file)
        where |= dict.fromkeys(part, file)
    (found / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return found


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("window", [1, 5_000_000, streaming.WINDOW])
def test_every_tensor_arrives_whole(directory, window):
    report, wanted = StreamReport(), tensors()
    found = dict(stream(open_checkpoint(directory), CPU, workers=3, window=window, report=report))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name
    assert report.tensors == len(wanted) and report.bytes == sum(t.numel() * t.element_size() for t in wanted.values())
    assert report.route and report.why


def test_no_more_than_the_window_is_outstanding(directory, monkeypatch):
    """Or one tensor alone, where that is larger."""
    made, lock, made_now = torch.empty, threading.Lock(), [0, 0]

    def counted(*args, **options):
        tensor = made(*args, **options)
        if "device" in options and options.get("dtype") != torch.uint8:
            with lock:
                made_now[0] += tensor.numel() * tensor.element_size()
                made_now[1] = max(made_now)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    window = 4_000_000
    for _, tensor in stream(open_checkpoint(directory), CPU, workers=3, window=window):
        with lock:
            made_now[0] -= tensor.numel() * tensor.element_size()
    assert max(window, 12_000_004) <= made_now[1] + window
    assert made_now[1] <= 12_000_004 + window


def test_memory_of_a_tensor_that_was_dropped_is_free_at_once(directory):
    """And not only when the rest of its file is there."""
    earlier = []
    for _, tensor in stream(open_checkpoint(directory), CPU, workers=3):
        assert all(storage.expired() for storage in earlier)
        earlier.append(StorageWeakRef(tensor.untyped_storage()))
        del tensor


def test_interpreter_that_ends_in_the_middle(directory):
    """The threads have ended by then; one in the midst of torch's code would make it abort."""
    program = (
        "import sys, torch\n"
        "from thaw_vllm.weights.checkpoint import open_checkpoint\n"
        "from thaw_vllm.weights.stream import stream\n"
        "taken = stream(open_checkpoint(sys.argv[1]), torch.device('cpu'), workers=2, window=10_000)\n"
        "next(taken)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(directory)], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_abandoned_in_the_middle(directory):
    taken = stream(open_checkpoint(directory), CPU, workers=3, window=100_000)
    for _ in range(5):
        next(taken)
    taken.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("thaw")]


def test_error_where_the_tensors_are_taken(directory, tmp_path, monkeypatch):
    preadv = os.preadv

    def failing(descriptor, views, offset, *flags):
        if offset > 3_000_000:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, views, offset, *flags)

    checkpoint = open_checkpoint(directory)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        list(stream(checkpoint, CPU, workers=3))


def test_file_that_was_replaced(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    save_file({"other": torch.ones(5)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ReplacedError):
        list(stream(checkpoint, CPU))


def test_file_that_shrinks(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model-0.safetensors", 1_000_000)
    with pytest.raises((CorruptionError, ReplacedError)):
        list(stream(checkpoint, CPU))


def test_other_formats(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    with pytest.raises(UnsupportedError, match="safetensors"):
        list(stream(open_checkpoint(tmp_path), CPU))
