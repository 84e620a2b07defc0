"""A snapshot put together from its pieces by the layout alone, its digests always those of what it holds.

Shares nothing with the package but the two checksums.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field

from thaw_vllm.transport.checksum import wordsum, xxh3

MAGIC = b"\x89THAW\r\n\x1a"
KIB = 1024
MIB = 1024 * KIB


def aligned(offset):
    return -(-offset // 4096) * 4096


def tensor(name, *, dtype="float32", shape=(2, 3), stride=None, storage=0, offset=0, kind="parameter"):
    """An entry of the index; row-major by default."""
    if stride is None:
        stride, step = [], 1
        for size in reversed(shape):
            stride.insert(0, step)
            step *= size
    entry = {"name": name, "kind": kind, "dtype": dtype, "shape": list(shape), "stride": list(stride)}
    return entry | {"storage": storage, "offset": offset}


def header(**changes):
    """A module's header; ``identity`` and ``parallel`` take changes of their own."""
    parallel = {f"{kind}_{what}": int(what == "size") for kind in ("tp", "pp", "ep", "dp") for what in ("rank", "size")}
    parallel |= changes.pop("parallel", {})
    unknown = ("engine", "engine_version", "architecture", "config", "dtype", "quantization", "model")
    identity = {"stage": "module", **dict.fromkeys(unknown)} | changes.pop("identity", {}) | {"parallel": parallel}
    document = {"format": "thaw", "holds": "weights", "content": "c" * 64, "identity": identity, "writer": "a test"}
    return document | {"source": {}, "attributes": {}, "metadata": {}} | changes


def index(**changes):
    """A 2×3 matrix, its tie, an empty tensor, a vector of 5,000 bytes, and a carried file."""
    tensors = [
        tensor("weight"),
        tensor("tied"),
        tensor("nothing", shape=(0, 3), stride=(3, 1), storage=None),
        tensor("long", dtype="uint8", shape=(5000,), storage=1, kind="buffer"),
    ]
    document = {"tensors": tensors, "storages": [24, 5000, 2], "files": [{"name": "config.json", "storage": 2}]}
    return document | changes


def content(storages):
    """Bytes for each storage, all of them different."""
    return [hashlib.shake_128(str(number).encode()).digest(length) for number, length in enumerate(storages)]


def chunk(stored_at, at, length, storage, data=b"", *, stored=None, codec=0, reserved=0):
    """One record of the chunk table, as a list in the order of its fields."""
    sums = [xxh3(memoryview(data)), wordsum(memoryview(data))] if data else [0, 0]
    return [stored_at, at, length, length if stored is None else stored, storage, codec, reserved, *sums]


def chunks(storages):
    """One chunk a storage, each at the next multiple of 4 KiB."""
    found, end = [], 0
    for number, data in enumerate(content(storages)):
        found.append(chunk(aligned(end), 0, len(data), number, data))
        end = found[-1][0] + len(data)
    return found


def payload(storages):
    """The storages' bytes where ``chunks`` puts them."""
    return b"".join(data.ljust(aligned(len(data)), b"\0") for data in content(storages))


@dataclass
class Parts:
    """A file in pieces; ``bytes`` puts them together with correct digests.

    Attributes:
        sizes: fields of the preamble that are to lie: ``magic``, ``version``, ``preamble``, ``file``, ``header``,
            ``index``, ``chunks``, ``payload_at``, ``payload``.
        digests: the same for the SHA-256 of ``header``, ``index`` and ``chunks``.
        tail: the preamble's unused bytes.
    """

    header: object = field(default_factory=header)
    index: object = field(default_factory=index)
    chunks: list = None
    payload: bytes = None
    sizes: dict = field(default_factory=dict)
    digests: dict = field(default_factory=dict)
    tail: bytes = b""

    def sound_chunks(self):
        """The chunk table that fits the index."""
        return chunks(self.index["storages"])

    def sound_payload(self):
        """The payload that fits the index."""
        return payload(self.index["storages"])

    def text(self, name):
        """The bytes of the section ``header`` or ``index``."""
        section = getattr(self, name)
        return section if isinstance(section, bytes) else json.dumps(section).encode()

    def bytes(self):
        """The file."""
        table = self.sound_chunks() if self.chunks is None else self.chunks
        body = self.sound_payload() if self.payload is None else self.payload
        sections = self.text("header"), self.text("index"), b"".join(struct.pack("<QQIIIHHQQ", *c) for c in table)
        start = aligned(256 + sum(map(len, sections)))
        said = {"magic": MAGIC, "version": 1, "preamble": 256, "file": start + len(body), "header": len(sections[0])}
        said |= {"index": len(sections[1]), "chunks": len(table), "payload_at": start, "payload": len(body)}
        said |= self.sizes
        hashes = (hashlib.sha256(data).digest() for data in sections)
        digests = dict(zip(("header", "index", "chunks"), hashes, strict=True)) | self.digests
        fields = (struct.pack("<8sIIQQQQQQ32s32s32s", *said.values(), *digests.values()) + self.tail).ljust(224, b"\0")
        preamble = fields + hashlib.sha256(fields).digest()
        return (preamble + b"".join(sections)).ljust(start, b"\0") + body


def sound():
    """The file that all others differ from in one thing; a reader must accept it."""
    return Parts().bytes()


def member(name="weights.000000000000.rank1.thaw", **changes):
    return {"name": name, "size": 4096, "content": "1" * 64} | changes


def manifest(members, world=2, **changes):
    """Rank 0's header of a set."""
    return header(parallel={"tp_size": world}, set={"id": "0" * 32, "members": members}, **changes)
