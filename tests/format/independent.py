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


def read(data, others=None):
    """The header, the index, every tensor's (dtype, shape, row-major bytes) by name, and every carried file's bytes.

    ``others``: the bytes of files of lower ranks, by rank, where they keep bytes of this one.
    """
    header, index, storages = sections_of(data, others or {})
    tensors = {entry["name"]: elements(entry, storages) for entry in index["tensors"]}
    assert len(tensors) == len(index["tensors"])
    files = {f["name"]: b"" if f["storage"] is None else storages[f["storage"]] for f in index["files"]}
    return header, index, tensors, files


def sections_of(data, others):
    """The header, the index, and every storage's bytes."""
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
    assert header["format"] == "thaw"
    assert (header["holds"], header["identity"]["stage"] == "kv") in (("weights", False), ("kv", True))
    storages, end = [b""] * len(index["storages"]), payload_at
    kept = {entry["storage"]: (entry["rank"], entry["there"]) for entry in index.get("kept", [])}
    own = header["identity"]["parallel"]
    assert all(rank < own["pp_rank"] * own["tp_size"] + own["tp_rank"] for rank, _ in kept.values())
    keepers = {rank: sections_of(others[rank], {})[2] for rank, _ in kept.values()}
    for stored_at, at, length, stored, storage, codec, reserved, _, summed in struct.iter_unpack(
        "<QQIIIHHQQ", sections[2]
    ):
        start = payload_at + stored_at
        assert (codec, reserved, stored) == ((2, 0, 0) if storage in kept else (0, 0, length))
        assert start == round_up(end)
        assert not any(data[end:start])
        end = start + stored
        assert at == len(storages[storage])
        found = data[start:end]
        if storage in kept:
            rank, there = kept[storage]
            assert len(keepers[rank][there]) == index["storages"][storage]
            found = keepers[rank][there][at : at + length]
        storages[storage] += found
        assert wordsum(found) == summed
    assert not any(data[end:])
    assert round_up(end) == file_size
    assert [len(storage) for storage in storages] == index["storages"]
    return header, index, storages


def prefixes(header, tensors):
    """The address of every block of a rank 0's file of KV blocks, in hexadecimal, in order."""
    layout, identity = header["kv"], header["identity"]
    names = [f"pages.{region['name']}" for region in layout["regions"]]
    optional = {"blocks.hashes", "blocks.extra"} & set(tensors)
    assert set(tensors) == {"blocks.tokens", "blocks.parents", "blocks.slots", *names} | optional
    (pages,) = {tensors[name][1][0] for name in names}
    for name, region in zip(names, layout["regions"], strict=True):
        assert tensors[name][:2] == ("uint8", [pages, region["page"]])
    (count,) = tensors["blocks.parents"][1]
    size, groups = layout["block_size"], len(layout["groups"])
    assert tensors["blocks.tokens"][:2] == ("int32", [count, size])
    assert tensors["blocks.slots"][:2] == ("int32", [count, groups])
    parents, slots = (
        [number for (number,) in struct.iter_unpack("<i", tensors[f"blocks.{name}"][2])]
        for name in ("parents", "slots")
    )
    assert all(-1 <= slot < pages for slot in slots)
    extra = json.loads(tensors.get("blocks.extra", (0, 0, b"{}"))[2], object_pairs_hook=unique)
    assert all(parents[int(number)] == -1 for number in extra)
    known = [identity["model"], identity["config"], identity["dtype"], identity["quantization"]]
    base = hashlib.sha256(json.dumps([*known, layout["cache_dtype"], size], separators=(",", ":")).encode()).digest()
    found = []
    for number, parent in enumerate(parents):
        assert -1 <= parent < number
        tokens = tensors["blocks.tokens"][2][4 * size * number : 4 * size * (number + 1)]
        assert min(struct.unpack(f"<{size}i", tokens)) >= 0
        salt = json.dumps(extra.get(str(number), {}), separators=(",", ":")).encode()
        found.append(hashlib.sha256((base if parent == -1 else found[parent]) + tokens + salt).digest())
    return [address.hex() for address in found]


def elements(entry, storages):
    item, shape = ITEM_SIZE[entry["dtype"]], entry["shape"]
    found = []
    for position in itertools.product(*(range(size) for size in shape)):
        at = entry["offset"] + item * sum(i * step for i, step in zip(position, entry["stride"], strict=True))
        found.append(storages[entry["storage"]][at : at + item])
        assert len(found[-1]) == item
    return entry["dtype"], shape, b"".join(found)
