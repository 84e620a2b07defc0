"""A second reader of the format, written from docs/format.md with the standard library alone; shares no code with thaw.

It reads everything into bytes and believes nothing: each rule of the document is an assertion. XXH3 is not in the
standard library, so chunks are held against their word sums.
"""

import hashlib
import itertools
import json
import struct

ITEM = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32 complex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
ITEM_SIZE = {name: size for size, names in ITEM.items() for name in names.split()}


def weight(k):
    mask = 2**64 - 1
    z = (k + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) | 1


def wordsum(data):
    words = struct.unpack(f"<{-(-len(data) // 4)}I", data + bytes(-len(data) % 4))
    return sum(x * weight(i % 32768) * weight(32768 + i // 32768) for i, x in enumerate(words)) % 2**64


def unique(pairs):
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def round_up(offset):
    return (offset + 4095) // 4096 * 4096


def read(data):
    """The header, the index, every tensor's (dtype, shape, row-major bytes) by name, and every carried file's bytes."""
    magic, version, size, file_size, header, index, count, payload_at, payload = struct.unpack_from("<8sIIQQQQQQ", data)
    assert (magic, version, size, file_size) == (bytes.fromhex("89544841570d0a1a"), 1, 256, len(data))
    assert data[160:224] == bytes(64)
    assert data[224:256] == hashlib.sha256(data[:224]).digest()
    place, sections = 256, []
    for length, digest in ((header, data[64:96]), (index, data[96:128]), (48 * count, data[128:160])):
        sections.append(data[place : place + length])
        assert hashlib.sha256(sections[-1]).digest() == digest
        place += length
    assert payload_at == round_up(place)
    assert payload_at + payload == file_size
    assert not any(data[place:payload_at])
    header, index = (json.loads(section.decode(), object_pairs_hook=unique) for section in sections[:2])
    assert (header["format"], header["holds"]) == ("thaw", "weights")
    storages, end = [b""] * len(index["storages"]), payload_at
    for stored_at, at, length, stored, storage, codec, reserved, _, summed in struct.iter_unpack(
        "<QQIIIHHQQ", sections[2]
    ):
        start = payload_at + stored_at
        assert (codec, reserved, stored) == (0, 0, length)
        assert start == round_up(end)
        assert not any(data[end:start])
        end = start + stored
        assert at == len(storages[storage])
        storages[storage] += data[start:end]
        assert wordsum(data[start:end]) == summed
    assert not any(data[end:])
    assert round_up(end) == file_size
    assert [len(storage) for storage in storages] == index["storages"]
    tensors = {entry["name"]: elements(entry, storages) for entry in index["tensors"]}
    assert len(tensors) == len(index["tensors"])
    files = {f["name"]: b"" if f["storage"] is None else storages[f["storage"]] for f in index["files"]}
    return header, index, tensors, files


def elements(entry, storages):
    item, shape = ITEM_SIZE[entry["dtype"]], entry["shape"]
    found = []
    for position in itertools.product(*(range(size) for size in shape)):
        at = entry["offset"] + item * sum(i * step for i, step in zip(position, entry["stride"], strict=True))
        found.append(storages[entry["storage"]][at : at + item])
        assert len(found[-1]) == item
    return entry["dtype"], shape, b"".join(found)
