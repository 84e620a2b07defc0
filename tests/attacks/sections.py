"""Hostile preambles, sections that are no JSON, and chunk tables."""

import json

from tests.attacks.parts import MIB, Parts, aligned, chunk, chunks, header, index, payload, sound, tensor
from tests.attacks.registry import hostile, several

from thaw_vllm.errors import CorruptionError, FormatError, VersionError

# --- preamble ---------------------------------------------------------------------------------------------------------


def _sizes(**sizes):
    return lambda: Parts(sizes=sizes).bytes()


several(FormatError, "not a thaw snapshot", other_magic=_sizes(magic=b"\x89PNG\r\n\x1a\n"), empty=lambda: b"")
several(VersionError, "format version 2", future_version=_sizes(version=2))
several(VersionError, "format version 4294967295", last_version=_sizes(version=2**32 - 1))
several(
    FormatError,
    "beyond the limits",
    **{f"{name}_of_2_to_the_63": _sizes(**{name: 2**63}) for name in ("header", "index", "chunks", "payload")},
    **{f"{name}_of_all_ones": _sizes(**{name: 2**64 - 1}) for name in ("header", "index", "chunks", "payload")},
    header_just_too_large=_sizes(header=16 * MIB + 1),
    index_just_too_large=_sizes(index=64 * MIB + 1),
    chunks_just_too_many=_sizes(chunks=2**22 + 1),
    payload_just_too_large=_sizes(payload=2**56 + 1),
)
several(
    FormatError,
    "do not add up",
    payload_over_the_sections=_sizes(payload_at=0),
    payload_over_the_header=_sizes(payload_at=256),
    payload_after_a_gap=_sizes(payload_at=1 << 20),
    payload_at_2_to_the_63=_sizes(payload_at=2**63),
    sections_that_grew=_sizes(header=8 * MIB),
    index_over_the_payload=_sizes(index=8 * MIB),
    chunks_over_the_payload=_sizes(chunks=1 << 20),
    other_file_size=_sizes(file=2**40),
    no_file_size=_sizes(file=0),
    longer_preamble=_sizes(preamble=512),
)
several(VersionError, "bytes that format version 1 reserves", used_spare_bytes=lambda: Parts(tail=b"\1").bytes())


@hostile(CorruptionError, "truncated")
def payload_that_is_not_there():
    """Consistent sizes, a petabyte of payload, and a small file."""
    start = len(sound()) - len(payload(index()["storages"]))
    return Parts(sizes={"payload": 2**50, "file": start + 2**50}).bytes()


@hostile(CorruptionError, "truncated")
def sections_that_are_not_there():
    """The largest sections that the limits allow, claimed by a small file."""
    start = aligned(256 + 16 * MIB + 64 * MIB + 2**22 * 48)
    sizes = {"header": 16 * MIB, "index": 64 * MIB, "chunks": 2**22, "payload_at": start, "payload": 0, "file": start}
    return Parts(sizes=sizes).bytes()


several(
    CorruptionError,
    "checksum does not agree",
    **{
        f"{name}_digest_of_zeros": lambda name=name: Parts(digests={name: bytes(32)}).bytes()
        for name in ("header", "index", "chunks")
    },
)

# --- JSON -------------------------------------------------------------------------------------------------------------


def _json(section, text):
    return lambda: Parts(
        **{section: text if isinstance(text, bytes) else text.encode()}, chunks=[], payload=b""
    ).bytes()


for _section in ("header", "index"):
    several(
        FormatError,
        f"bad {_section}",
        **{
            f"{_section}_{name}": _json(_section, text)
            for name, text in {
                "not_json": "{",
                "empty_text": "",
                "not_utf8": b'{"a": "\xff\xfe"}',
                "utf16": '{"a": 1}'.encode("utf-16"),
                "with_nul": '{"a": 1}\0',
                "is_a_list": "[]",
                "is_a_number": "7",
                "is_null": "null",
                "of_deep_lists": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
                "of_deep_objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
                "left_open_deep": "[" * 1_000_000,
                "with_nan": '{"a": NaN}',
                "with_infinity": '{"a": -Infinity}',
                "with_overflow": '{"a": 1e999}',
                "with_a_key_twice": '{"a": 1, "a": 1}',
                "with_an_inner_key_twice": '{"a": [{"b": 1, "b": 2}]}',
                "with_an_escaped_key_twice": '{"a": 1, "\\u0061": 2}',
                "with_an_endless_number": '{"a": ' + "9" * 100_000 + "}",
            }.items()
        },
    )


@hostile(FormatError, "must be")
def name_that_nests_deeply():
    """As deep as the parser goes; showing it in the message must not go deeper."""
    deep = "[" * 800 + "]" * 800
    return _json("index", json.dumps(index(tensors=[tensor("DEEP")])).replace('"DEEP"', deep))()


@hostile(FormatError, "must be")
def name_of_a_million_lists():
    return Parts(index=index(tensors=[tensor([[]] * 100_000)])).bytes()


@hostile(FormatError, "neither weights nor kv")
def holds_something_deep():
    deep = "[" * 800 + "]" * 800
    return _json("header", json.dumps(header(holds="DEEP")).replace('"DEEP"', deep))()


# --- chunk table ------------------------------------------------------------------------------------------------------

_STORAGES = index()["storages"]


def _chunks(change, **parts):
    """The sound table after ``change(table)``."""

    def make():
        table = chunks(_STORAGES)
        return Parts(chunks=change(table) or table, payload=payload(_STORAGES), **parts).bytes()

    return make


def _set(number, place, value):
    def change(table):
        table[number][place] = value

    return _chunks(change)


STORED_AT, AT, LENGTH, STORED, STORAGE, CODEC, RESERVED = range(7)
several(VersionError, "codec 3", other_codec=_set(0, CODEC, 3))
several(FormatError, "not what kept says of storage 0", codec_of_what_is_kept=_set(0, CODEC, 2))
several(FormatError, "compressed ones", codec_that_gains_nothing=_set(0, CODEC, 1))
several(VersionError, "codec 65535", last_codec=_set(2, CODEC, 65535))
several(VersionError, "reserves", reserved_field=_set(1, RESERVED, 1))
several(
    FormatError,
    "not at the next multiple",
    chunk_over_another=_set(1, STORED_AT, 0),
    chunk_after_a_gap=_set(1, STORED_AT, 8192),
    chunk_off_the_grid=_set(1, STORED_AT, 4095),
    chunk_at_2_to_the_63=_set(1, STORED_AT, 2**63),
    chunk_at_the_end_of_numbers=_set(1, STORED_AT, 2**64 - 4096),
    chunk_past_the_payload=lambda: Parts(chunks=chunks(_STORAGES), payload=payload(_STORAGES)[:4096]).bytes(),
)
several(
    FormatError,
    "expected storage",
    chunks_out_of_order=_chunks(lambda table: table[::-1]),
    chunk_twice=_chunks(lambda table: [*table[:2], *table[1:]]),
    chunk_of_another_storage=_set(0, STORAGE, 1),
    chunk_of_no_storage=_set(0, STORAGE, 2**32 - 1),
    chunk_that_starts_late=_set(1, AT, 4096),
    chunk_at_huge_offset=_set(1, AT, 2**63),
    chunk_missing=_chunks(lambda table: [table[0], table[2]]),
)
several(
    FormatError,
    "do not fit",
    chunk_without_bytes=_set(1, LENGTH, 0),
    chunk_longer_than_storage=_set(1, LENGTH, 5001),
    chunk_of_4_gib=_set(1, LENGTH, 2**32 - 1),
    chunk_of_more_than_64_mib=lambda: Parts(
        index={"tensors": [tensor("w", dtype="uint8", shape=(64 * MIB + 1,))], "storages": [64 * MIB + 1], "files": []},
        chunks=[chunk(0, 0, 64 * MIB + 1, 0)],
        payload=bytes(4096),
    ).bytes(),
)
several(
    FormatError, "stored bytes for", chunk_that_shrank=_set(1, STORED, 4999), chunk_that_grew=_set(1, STORED, 2**32 - 1)
)
several(
    FormatError,
    "only a storage's last chunk",
    chunks_too_small=_chunks(lambda table: [table[0], [4096, 0, 2500, 2500, 1, 0, 0, 0, 0], *table[1:]]),
)
several(FormatError, "no storage left", chunk_too_many=_chunks(lambda table: [*table, chunk(16384, 0, 2, 3)]))
several(FormatError, "not covered", no_chunks=_chunks(lambda table: [[]][:0] or [table[0]]))
several(
    FormatError,
    "its chunks need",
    payload_too_long=lambda: Parts(chunks=chunks(_STORAGES), payload=payload(_STORAGES) + bytes(4096)).bytes(),
    payload_not_whole=lambda: Parts(chunks=chunks(_STORAGES), payload=payload(_STORAGES)[:-1]).bytes(),
)
