"""The command in this process and in one of its own; snapshots of several sizes, checkpoints."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from tests.cli.standin import TOKEN, Standin

from thaw_vllm import freeze_model
from thaw_vllm.cli.main import main
from thaw_vllm.format.chunks import Chunk
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.format.index import TENSOR, Index, Tensor
from thaw_vllm.format.snapshot import front, lay_out
from thaw_vllm.transport.checksum import wordsum, xxh3

MIB = 1 << 20
COMMAND = [sys.executable, "-c", "from thaw_vllm.cli.main import main; raise SystemExit(main())"]


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture
def thaw(capfd):
    """``thaw("info", path)`` in this process: exit code, standard output, standard error.

    What a command sets in the environment, as ``thaw freeze`` does, ends with the test.
    """

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    with mock.patch.dict(os.environ):
        yield run


@pytest.fixture
def start(tmp_path, interruptible):
    """``start("info", path)``: the command in a process of its own, its standard streams piped."""
    started = []

    def run(*arguments, env=None, **options):
        options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        environment = os.environ | {"COLUMNS": "200"} | (env or {})
        started.append(subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **options))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def spawn(start):
    """``start``, waited for."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return Ran(process.returncode, out, err)

    return run


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("THAW_ADMIN_TOKEN", TOKEN)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with Standin() as standin:
        thread = threading.Thread(target=standin.serve_forever, args=(0.01,))
        thread.start()
        yield standin
        standin.shutdown()
        thread.join()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.LayerNorm(4).to(torch.bfloat16)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("none", torch.empty(0, 2, dtype=torch.bool))


@pytest.fixture
def snapshot(tmp_path):
    freeze_model(Tied(), tmp_path / "model.thaw")
    return tmp_path / "model.thaw"


@pytest.fixture
def checkpoint(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    safetensors.save_file({"a": torch.randn(5, 3), "b": torch.arange(7)}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"architectures": ["Llama"], "dtype": "float32"}')
    return directory


@pytest.fixture
def large_snapshot(tmp_path):
    """``large_snapshot(megabytes)``: a sound snapshot of zeros, which takes no room on the disk and time to read."""

    def make(megabytes, name="large.thaw"):
        zeros = memoryview(bytes(16 * MIB))
        sums = {"xxh3": xxh3(zeros), "wordsum": wordsum(zeros)}
        size = megabytes // 16 * 16 * MIB
        index = Index((Tensor("w", TENSOR, "uint8", (size,), (1,), 0),), (size,))
        chunks: tuple[Chunk, ...] = tuple(dataclasses.replace(c, **sums) for c in lay_out((size,), 16 * MIB))
        head, preamble = front(Header(Identity(stage="checkpoint"), content="1" * 64), index, chunks)
        with (tmp_path / name).open("wb") as file:
            file.write(head)
            file.truncate(preamble.file_size)
        return tmp_path / name

    return make


@pytest.fixture
def large_checkpoint(tmp_path):
    """``large_checkpoint(megabytes)``: a safetensors checkpoint of zeros, likewise."""

    def make(megabytes):
        (tmp_path / "large").mkdir()
        size = megabytes * MIB
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        with (tmp_path / "large" / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        return tmp_path / "large"

    return make
