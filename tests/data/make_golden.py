"""How the golden files of format version 1 were made: ``python -m tests.data.make_golden``, each of them once.

None is ever made again: each release of thaw must read them as they are, bit for bit, and test_golden.py holds their
SHA-256. A new version of the format gets a directory and a script of its own. What they hold is written to
``expected.json`` from the tensors themselves, not from reading the files.

* ``dtypes.thaw``: every dtype, as views of one storage; a scalar; tensors without elements.
* ``views.thaw``: a tie, a transposed parameter and its row, a repeated buffer, one frozen from memory with gaps.
* ``set.thaw`` and its rank 1: a set of two, with carried files, attributes, source, metadata and a full identity.
* ``kv.thawkv``: KV blocks of two groups, one with a window; two prefixes of one first block, and a salted third.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch

from thaw_vllm.format.dtypes import ITEM_SIZE
from thaw_vllm.format.header import Header, Member, RankSet
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.format.kv import Group, Layout, Region
from thaw_vllm.kv.table import NONE, Block, Table
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, SnapshotWriter, tensors_id, write_snapshot

PLACE = Path(__file__).with_name("format-v1")
SET = "0123456789abcdef" * 2
MODEL = "tensors-blake3:" + "ab" * 32


def noise(name, length):
    """Bytes that anybody can make again: SHAKE-128 of a name."""
    return torch.frombuffer(bytearray(hashlib.shake_128(name.encode()).digest(length)), dtype=torch.uint8)


def dtypes():
    flat = noise("dtypes", 640)
    tensors = [("flat", "buffer", flat)]
    at = 0
    for name, item in sorted(ITEM_SIZE.items()):
        view = flat[at : at + 6 * item]
        if name == "bool":
            view &= 1
        tensors.append((name, "parameter", view.view(getattr(torch, name)).reshape(2, 3)))
        at += -(-6 * item // 16) * 16
    tensors.append(("scalar", "buffer", flat[16:20].view(torch.float32).reshape(())))
    tensors.append(("nothing", "buffer", torch.empty(0, 5)))
    tensors.append(("nothing.at.all", "parameter", torch.empty(2, 0, 3, dtype=torch.bfloat16)))
    return tensors


def views():
    weight = noise("weight", 4 * 35).view(torch.float32).reshape(5, 7)
    turned = noise("turned", 2 * 24).view(torch.bfloat16).reshape(4, 6).t()
    rope = noise("rope", 8 * 3).view(torch.float64).reshape(3, 1).expand(3, 4)
    return [
        ("embed.weight", "parameter", weight),
        ("head.weight", "parameter", weight),
        ("turned", "parameter", turned),
        ("turned.row", "buffer", turned[:, 2]),
        ("rope", "buffer", rope),
        ("gaps", "parameter", noise("gaps", 2 * 40).view(torch.int16).reshape(4, 10)[:, 1::3]),
    ]


def rank(number):
    return [
        ("qkv.weight", "parameter", noise(f"qkv{number}", 2 * 12).view(torch.float16).reshape(4, 3)),
        ("scale", "parameter", noise(f"scale{number}", 4).view(torch.float32)),
    ]


CARRIED = [("config.json", b'{"model_type": "golden"}\n'), ("merges.txt", b"")]


def bits(tensor):
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        tensor.element_size(), tensor.dtype
    )
    return tensor.view(same_size).contiguous().reshape(-1).numpy().tobytes() if tensor.numel() else b""


def describe(name, tensors, files=()):
    return {
        "sha256": hashlib.sha256((PLACE / name).read_bytes()).hexdigest(),
        "tensors": {
            name: {
                "kind": kind,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": bits(tensor).hex(),
            }
            for name, kind, tensor in tensors
        },
        "files": {name: data.decode() for name, data in files},
    }


def single(name, tensors):
    header = Header(Identity("module", architecture="Golden"), writer="thaw 0.1.0")
    write_snapshot(PLACE / name, header, capture(tensors), FreezeOptions(mode=0o644), identify=tensors_id)
    return describe(name, tensors)


def pair():
    found, members = {}, []
    for number in (1, 0):
        identity = Identity(
            stage="raw",
            engine="vllm",
            engine_version="0.32.0",
            architecture="GoldenForCausalLM",
            config="cd" * 32,
            dtype="float16",
            quantization="fp8",
            model=MODEL,
            parallel=Parallel(tp_rank=number, tp_size=2),
        )
        header = Header(
            identity,
            writer="thaw 0.1.0",
            source={"files": [{"name": "model.safetensors", "size": 1234}], "revision": "ef" * 20},
            attributes={"layers.0.attn|scale_known": True, "|rope_theta": 10000.0, "a.b|name": "é", "a|none": None},
            ranks=RankSet(SET),
            metadata={"model": "golden", "note": "never made again"},
        )
        name = f"set.{SET[:12]}.rank1.thaw" if number else "set.thaw"
        tensors, files = rank(number), [] if number else CARRIED
        with SnapshotWriter(PLACE / name, header, capture(tensors, files), FreezeOptions(mode=0o644), 1) as writer:
            content = writer.write_payload()
            if number:
                members.append(Member(name, writer.size, content))
            writer.seal(dataclasses.replace(header, ranks=RankSet(SET, () if number else tuple(members))))
        found[name] = describe(name, tensors, files)
    return found


LAYOUT = Layout(
    block_size=4,
    cache_dtype="bfloat16",
    groups=(Group("FullAttentionSpec", None, ("layers.0.attn",)), Group("SlidingWindowSpec", 8, ("layers.1.attn",))),
    regions=(
        Region("layers.0.attn#0", "bfloat16", (2, 4, 1, 2), (8, 2, 2, 1), 32),
        Region("layers.0.attn#1", "float32", (4,), (1,), 16),
    ),
    algorithm="sha256_cbor",
    none_hash="01" * 32,
)


def blocks():
    """The window of the second group has left the first block of the two unsalted prefixes behind."""
    hashes = noise("hashes", 4 * 32).reshape(4, 32)
    return Table(
        4,
        2,
        (
            Block(NONE, (11, 12, 13, 14), (0, NONE), bytes(hashes[0])),
            Block(0, (21, 22, 23, 24), (1, 4), bytes(hashes[1])),
            Block(0, (0, 1, 2, 2**31 - 1), (2, 5), bytes(hashes[2])),
            Block(NONE, (11, 12, 13, 14), (3, 6), bytes(hashes[3]), "tenant é"),
        ),
    )


def kv():
    table = blocks()
    tensors = [
        (name, "tensor", torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape))
        for name, (dtype, shape, data) in table.encode().items()
    ]
    for region in LAYOUT.regions:
        pages = noise(region.name, table.slots * region.page).reshape(table.slots, region.page)
        tensors.append((f"pages.{region.name}", "tensor", pages))
    identity = Identity(
        stage="kv",
        engine="vllm",
        engine_version="0.32.0",
        architecture="GoldenForCausalLM",
        config="cd" * 32,
        dtype="bfloat16",
        model=MODEL,
    )
    header = Header(identity, writer="thaw 0.1.0", kv=LAYOUT)
    write_snapshot(PLACE / "kv.thawkv", header, capture(tensors), FreezeOptions(mode=0o644))
    return {"kv.thawkv": describe("kv.thawkv", tensors)}


FILES = {
    ("dtypes.thaw",): lambda: {"dtypes.thaw": single("dtypes.thaw", dtypes())},
    ("views.thaw",): lambda: {"views.thaw": single("views.thaw", views())},
    ("set.thaw", f"set.{SET[:12]}.rank1.thaw"): pair,
    ("kv.thawkv",): kv,
}


def main():
    PLACE.mkdir(exist_ok=True)
    expected = PLACE / "expected.json"
    found = json.loads(expected.read_text()) if expected.exists() else {}
    missing = [make for names, make in FILES.items() if not any((PLACE / name).exists() for name in names)]
    if not missing:
        sys.exit(f"{PLACE} is complete; golden files are never made again")
    for make in missing:
        found |= make()
    expected.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
