import os
import re
import subprocess
import sys

import pytest
import torch
from tests.cli.ranks import freeze_set

from thaw_vllm import freeze_model
from thaw_vllm.cli.info import describe
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Experts, Identity, Parallel
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.ranks import alone, freeze_rank

NAMES = ["embed.weight", "head.weight", "norm.weight", "norm.bias", "steps", "none"]


def test_names_every_tensor(thaw, snapshot):
    ran = thaw("info", snapshot)
    assert ran.code == 0 and ran.err == ""
    above, _, below = ran.out.partition("\n\n")
    rows = [re.split(r"  +", line) for line in below.splitlines()]
    assert rows[0] == ["NAME", "KIND", "DTYPE", "SHAPE", "BYTES", "TIED TO"]
    assert rows[1:] == [
        ["embed.weight", "parameter", "float32", "11×4", "176"],
        ["head.weight", "parameter", "float32", "11×4", "176", "embed.weight"],
        ["norm.weight", "parameter", "bfloat16", "4", "8"],
        ["norm.bias", "parameter", "bfloat16", "4", "8"],
        ["steps", "buffer", "int64", "scalar", "8"],
        ["none", "buffer", "bool", "0×2", "0"],
    ]
    with open_snapshot(snapshot) as opened:
        header = opened.snapshot.header
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in above.splitlines())
    assert facts["model"] == header.identity.model and facts["content"] == header.content
    assert facts["stage"] == "module" and facts["architecture"] == "Tied"
    assert facts["tied"] == "head.weight to embed.weight"
    assert "2 float32, 176 bytes" in above and "2 bfloat16, 16 bytes" in above


def test_without_tensors(thaw, snapshot):
    ran = thaw("info", snapshot, "--no-tensors")
    assert ran.code == 0 and "norm.bias" not in ran.out
    assert "tensors" not in thaw("info", snapshot, "--no-tensors", "--json").document


def test_json(thaw, snapshot):
    ran = thaw("info", snapshot, "--json")
    assert ran.code == 0 and ran.err == ""
    found = ran.document
    with open_snapshot(snapshot) as opened:
        assert found == describe(opened)
    assert [t["name"] for t in found["tensors"]] == NAMES
    assert found["tensors"][1]["tied_to"] == "embed.weight" and found["tensors"][0]["tied_to"] is None
    assert found["ties"] == {"embed.weight": ["head.weight"]}
    assert found["path"] == str(snapshot) and found["file_size"] == snapshot.stat().st_size
    assert found["by_dtype"]["float32"] == {"tensors": 2, "bytes": 176, "stored": 176}
    assert found["identity"]["stage"] == "module" and found["set"] is None
    assert sum(counts["bytes"] for counts in found["by_dtype"].values()) == found["bytes"]


def test_everything_a_header_can_say(thaw, tmp_path):
    header = Header(
        identity=Identity(
            stage="raw", engine="vllm", engine_version="0.32.0", quantization="fp8", parallel=Parallel(tp_size=1)
        ),
        writer="thaw 9",
        source={
            "files": [{"name": "model.safetensors", "size": 12_345_678}, {"name": "vast", "size": 10**400}, "odd"],
            "revision": "ab12",
        },
        attributes={"layers.0|scale": 0.5},
        metadata={"model": "Llama\x1b[31m", "who": "we"},
    )
    captured = capture([("w", "tensor", torch.ones(3))], [("config.json", b"{}"), ("vocab.txt", b"")])
    freeze_rank(tmp_path / "w.thaw", header, captured, FreezeOptions(), alone, lambda: None)
    ran = thaw("info", tmp_path / "w.thaw")
    assert ran.code == 0
    for text in [
        "raw of vllm 0.32.0",
        "fp8",
        "tensor-parallel rank 0 of 1",
        "config.json (2 bytes)",
        "vocab.txt (0 bytes)",
        "model.safetensors (12.3 MB)",
        "vast (unknown size)",
        "revision ab12",
        "layers.0.scale = 0.5",
        "thaw 9",
    ]:
        assert text in ran.out
    assert "\x1b" not in ran.out and "Llama" in ran.out


def test_set_names_its_files(thaw, tmp_path):
    freeze_set(tmp_path / "set.thaw", 3)
    ran = thaw("info", tmp_path / "set.thaw", "--no-tensors")
    assert len(re.findall(r"^rank file +set\.[0-9a-f]{12}\.rank[12]\.thaw", ran.out, re.MULTILINE)) == 2
    assert "tensor-parallel rank 0 of 3" in ran.out
    document = thaw("info", tmp_path / "set.thaw", "--json").document
    assert len(document["set"]["members"]) == 2


def test_set_of_every_coordinate(thaw, tmp_path):
    like = Parallel(tp_size=2, pp_size=2, ep_size=4, dp_size=2)
    freeze_set(tmp_path / "set.thaw", 8, like=like, experts=Experts("linear", "e" * 64))
    ran = thaw("info", tmp_path / "set.thaw", "--no-tensors")
    own = "tensor-parallel rank 0 of 2, pipeline rank 0 of 2, expert rank 0 of 4, data rank 0 of 2"
    assert re.search(f"^parallel +{own}$", ran.out, re.MULTILINE)
    assert re.search(f"^experts +placed linear, map {'e' * 64}$", ran.out, re.MULTILINE)
    other = "tensor-parallel rank 1 of 2, pipeline rank 0 of 2, expert rank 3 of 4, data rank 1 of 2"
    assert re.search(rf"^rank file +set\.[0-9a-f]{{12}}\.dp1-pp0-tp1\.thaw \(.*\), {other}, content", ran.out, re.M)
    document = thaw("info", tmp_path / "set.thaw", "--json").document
    assert len(document["set"]["members"]) == 7 and document["identity"]["experts"]["placement"] == "linear"
    ran = thaw("verify", tmp_path / "set.thaw")
    assert ran.code == 0 and ran.out.count("sound") == 8


def test_empty_snapshot(thaw, tmp_path):
    freeze_model(torch.nn.Module(), tmp_path / "empty.thaw")
    ran = thaw("info", tmp_path / "empty.thaw")
    assert ran.code == 0 and re.search("^tensors +none$", ran.out, re.MULTILINE)


def test_names_that_a_terminal_cannot_show(spawn, tmp_path):
    captured = capture([("naïve.‮weight", "tensor", torch.ones(3)), ("重み", "tensor", torch.ones(3))])
    write_snapshot(tmp_path / "m.thaw", Header(identity=Identity(stage="checkpoint")), captured, FreezeOptions())
    ran = spawn("info", tmp_path / "m.thaw", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ran.code == 0 and ran.out.isascii() and "\\u202e" in ran.out


def test_reads_only_the_header_and_the_index(thaw, large_snapshot):
    path = large_snapshot(16)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    assert thaw("info", path).code == 0
    assert thaw("verify", path).code == 3


def test_needs_neither_torch_nor_numpy(snapshot):
    code = f"""
import sys
from thaw_vllm.cli.main import main
assert main(["info", {str(snapshot)!r}]) == 0
print(sorted({{"torch", "numpy", "vllm", "safetensors"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("reader", ["head -n 2", "true"])
def test_reader_that_leaves(snapshot, reader, tmp_path):
    """``thaw info W.thaw | head``: quiet, and no traceback at the end of Python either."""
    command = f"{sys.executable} -c 'from thaw_vllm.cli.main import main; raise SystemExit(main())'"
    script = f"({command} info {snapshot} --json; echo $? >code) | {reader}"
    ran = subprocess.run(["bash", "-c", f"{script}; sleep 0.1"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stderr == ""


def test_closed_pipe_has_its_own_code(start, tmp_path):
    captured = capture([(f"layers.{i}.weight", "tensor", torch.ones(1)) for i in range(2000)])
    write_snapshot(tmp_path / "m.thaw", Header(identity=Identity(stage="checkpoint")), captured, FreezeOptions())
    process = start("info", tmp_path / "m.thaw", "--json")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stdout = None
