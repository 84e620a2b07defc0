"""The golden files of version 1: never changed, and read the same by thaw and by a reader written from the document."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from tests.attacks.parts import Parts
from tests.data.make_golden import LAYOUT, blocks
from tests.format import independent
from tests.weights.modules import bits

from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.kv.read import read_table
from thaw_vllm.kv.table import addresses, root
from thaw_vllm.transport.checksum import wordsum, xxh3
from thaw_vllm.weights.open import open_memory, open_rank, open_snapshot
from thaw_vllm.weights.read_storage import filled
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore

PLACE = Path(__file__).resolve().parents[1] / "data" / "format-v1"
EXPECTED = json.loads((PLACE / "expected.json").read_text())
SHA256 = {
    "dtypes.thaw": "486eff66ec2dee4e79ba301cf20bfdb2736de3893adb5a9daf5eb635fe47d3dd",
    "views.thaw": "9288904c5d61db880fef37597b8cc2bb03eafe1dedff7f9e6b44b9077ae27b5d",
    "set.thaw": "1f21af2acce65862afddc321ecabaa67848feb09ca1e7887c101912a0d558a76",
    "set.0123456789ab.rank1.thaw": "50573c2b618b425f95a359aaaef4262ec0f4fcf869da91aaa5559151daf101a8",
    "kv.thawkv": "690a86bf9fdeecad3bc2bb6d801f1271ae22483eb308db752f0959f441ec7ee5",
}

pytestmark = pytest.mark.usefixtures("no_leaks")


def expected(name):
    """Dtype, shape and bytes of every tensor."""
    return {n: (t["dtype"], t["shape"], bytes.fromhex(t["bytes"])) for n, t in EXPECTED[name]["tensors"].items()}


def test_files_never_change():
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in PLACE.glob("*.thaw*")}
    assert found == SHA256 == {name: entry["sha256"] for name, entry in EXPECTED.items()}
    assert sum(path.stat().st_size for path in PLACE.iterdir()) < 120_000


@pytest.mark.parametrize("name", SHA256)
def test_read_by_the_second_reader(name):
    header, index, tensors, files = independent.read((PLACE / name).read_bytes())
    assert tensors == expected(name)
    assert {n: data.decode() for n, data in files.items()} == EXPECTED[name]["files"]
    assert {t["name"]: t["kind"] for t in index["tensors"]} == {
        n: t["kind"] for n, t in EXPECTED[name]["tensors"].items()
    }
    assert header["content"] != "0" * 64


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", SHA256)
def test_read_by_thaw(name):
    """Into memory of the same sharing, which the file's own ties tell."""
    with open_snapshot(PLACE / name) as opened:
        index = opened.snapshot.index
        memory = [torch.zeros(length, dtype=torch.uint8) for length in index.storages]
        targets = {}
        for tensor in index.tensors:
            dtype = getattr(torch, tensor.dtype, None)
            if dtype is None:
                pytest.skip(f"torch {torch.__version__} has no {tensor.dtype}")
            if tensor.storage is None:
                targets[tensor.name] = torch.empty(tensor.shape, dtype=dtype)
                continue
            base = memory[tensor.storage].untyped_storage()
            offset = tensor.offset // dtype.itemsize
            targets[tensor.name] = torch.empty(0, dtype=dtype).set_(base, offset, tensor.shape, tensor.stride)
        restore(opened.source, opened.snapshot, targets, set(targets), RestoreOptions())
        files = {
            f.name: b"" if f.storage is None else filled(opened.snapshot, opened.source, f.storage) for f in index.files
        }
    found = {n: (str(t.dtype).removeprefix("torch."), list(t.shape), bits(t)) for n, t in targets.items()}
    assert found == expected(name)
    assert {n: data.decode() for n, data in files.items()} == EXPECTED[name]["files"]


@pytest.mark.parametrize("name", SHA256)
def test_content_id_is_what_the_document_says(name):
    header, index, _, _ = independent.read((PLACE / name).read_bytes())
    data = (PLACE / name).read_bytes()
    with open_memory(data) as opened:
        digests = []
        for number, length in enumerate(index["storages"]):
            chunks = [c for c in opened.snapshot.chunks if c.storage == number]
            start = opened.snapshot.preamble.payload_at + chunks[0].stored_at
            digests.append([length, blake3(blake3(data[start : start + length]).digest()).hexdigest()])
    document = {"tensors": index["tensors"], "storages": digests, "files": index["files"]}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert header["content"] == blake3(text.encode()).hexdigest()


def test_every_member_of_the_header():
    for rank in range(2):
        with open_rank(PLACE / "set.thaw", rank) as opened:
            header = opened.snapshot.header
        assert header.identity == Identity(
            stage="raw",
            engine="vllm",
            engine_version="0.32.0",
            architecture="GoldenForCausalLM",
            config="cd" * 32,
            dtype="float16",
            quantization="fp8",
            model="tensors-blake3:" + "ab" * 32,
            parallel=Parallel(tp_rank=rank, tp_size=2),
        )
        assert header.writer == "thaw 0.1.0"
        assert header.source == {"files": [{"name": "model.safetensors", "size": 1234}], "revision": "ef" * 20}
        assert header.attributes == {
            "layers.0.attn|scale_known": True,
            "|rope_theta": 10000.0,
            "a.b|name": "é",
            "a|none": None,
        }
        assert header.metadata == {"model": "golden", "note": "never made again"}
        assert header.ranks.id == "0123456789abcdef" * 2
        members = [(m.name, m.size) for m in header.ranks.members]
        assert members == ([] if rank else [("set.0123456789ab.rank1.thaw", 12288)])


def test_layout_and_blocks():
    with open_snapshot(PLACE / "kv.thawkv") as opened:
        header, table = opened.snapshot.header, read_table(opened)
    assert (header.kv, table) == (LAYOUT, blocks())
    assert [(b.parent, b.tokens[0], b.slots, b.salt) for b in table.blocks] == [
        (-1, 11, (0, -1), None),
        (0, 21, (1, 4), None),
        (0, 0, (2, 5), None),
        (-1, 11, (3, 6), "tenant é"),
    ]
    said, _, tensors, _ = independent.read((PLACE / "kv.thawkv").read_bytes())
    found = [a.hex() for a in addresses(table, root(header.identity, header.kv))]
    assert found == independent.prefixes(said, tensors) and len(set(found)) == 4


def test_ties_and_repetition_of_the_views():
    with open_snapshot(PLACE / "views.thaw") as opened:
        index = opened.snapshot.index
    assert index.ties == {"embed.weight": ("head.weight",), "turned": ("turned.row",)}
    strides = {t.name: t.stride for t in index.tensors}
    assert (strides["turned"], strides["turned.row"], strides["rope"], strides["gaps"]) == (
        (1, 6),
        (1,),
        (1, 0),
        (3, 1),
    )


def test_file_in_the_document():
    """docs/format.md, section 14, byte for byte, put together by neither reader."""
    header = (
        '{"format":"thaw","holds":"weights","content":"2361308624944a297e72ee5f20cf31e113864815868a2c50b2df477372438619",'
        '"identity":{"stage":"module","engine":null,"engine_version":null,"architecture":null,"config":null,'
        '"dtype":null,"quantization":null,"model":null,"parallel":{"tp_rank":0,"tp_size":1,"pp_rank":0,"pp_size":1,'
        '"ep_rank":0,"ep_size":1,"dp_rank":0,"dp_size":1}},"writer":"","source":{},"attributes":{},"metadata":{}}'
    )
    index = (
        '{"tensors":[{"name":"a","kind":"tensor","dtype":"uint8","shape":[4],"stride":[1],"storage":0,"offset":0}],'
        '"storages":[4],"files":[]}'
    )
    sums = xxh3(memoryview(b"thaw")), wordsum(memoryview(b"thaw"))
    table = [[0, 0, 4, 4, 0, 0, 0, *sums]]
    data = Parts(header.encode(), index.encode(), table, b"thaw".ljust(4096, b"\0")).bytes()
    assert (len(header), len(index), len(data)) == (421, 132, 8192)
    assert hashlib.sha256(data).hexdigest() == "90fa71fd11fdb10357796c6e6034f7331baf8301cc867b6dbe10cc04d6eb1b41"
    assert independent.read(data)[2] == {"a": ("uint8", [4], b"thaw")}
    with open_memory(data) as opened:
        assert opened.snapshot.index.tensors[0].name == "a"
