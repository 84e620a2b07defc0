"""Header, index, chunk table and preamble: what is written is read back, equal."""

import dataclasses
import hashlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.format.strategies import chunks, headers, identities, indexes, parallels

from thaw_vllm.errors import CorruptionError, FormatError, MismatchError, VersionError
from thaw_vllm.format import chunks as chunk_table
from thaw_vllm.format import header, identity, index, preamble
from thaw_vllm.format.document import dump, parse
from thaw_vllm.format.identity import Experts, Identity, Parallel, require
from thaw_vllm.format.index import Tensor, covers
from thaw_vllm.format.limits import MAX_BYTES, MAX_CHUNKS, MAX_HEADER, MAX_INDEX
from thaw_vllm.format.preamble import Preamble

digests = st.binary(min_size=32, max_size=32)
preambles = st.builds(
    Preamble,
    header=st.integers(0, MAX_HEADER),
    index=st.integers(0, MAX_INDEX),
    chunks=st.integers(0, MAX_CHUNKS),
    payload=st.integers(0, MAX_BYTES),
    header_digest=digests,
    index_digest=digests,
    chunks_digest=digests,
)


@given(headers())
def test_header(value):
    assert header.from_json(parse(dump(value.to_json()), "header")) == value


@given(identities())
def test_identity(value):
    assert Identity.from_json(value.to_json()) == value
    require(value, value, "w.thaw")


@given(indexes())
def test_index(value):
    assert index.from_json(parse(dump(value.to_json()), "index")) == value


@given(indexes())
def test_ties_are_the_names_that_share_a_storage(value):
    for owner, others in value.ties.items():
        (storage,) = {t.storage for t in value.tensors if t.name in (owner, *others)}
        assert [t.name for t in value.tensors if t.storage == storage] == [owner, *others]
    tied = {name for owner, others in value.ties.items() for name in (owner, *others)}
    alone = [t.storage for t in value.tensors if t.name not in tied and t.storage is not None]
    assert len(set(alone)) == len(alone)


@given(st.lists(chunks, max_size=5))
def test_chunk_table(table):
    data = chunk_table.encode(table)
    assert len(data) == 48 * len(table)
    assert chunk_table.decode(data) == (tuple(table), True)


@given(st.lists(chunks, min_size=1, max_size=3), st.integers(1, 2**16 - 1), st.data())
def test_chunk_table_tells_a_reserved_field(table, value, data):
    encoded = bytearray(chunk_table.encode(table))
    at = 48 * data.draw(st.integers(0, len(table) - 1)) + 30
    encoded[at : at + 2] = value.to_bytes(2, "little")
    assert chunk_table.decode(bytes(encoded)) == (tuple(table), False)


@given(preambles)
def test_preamble(value):
    assert preamble.decode(value.encode(), value.file_size) == value


@given(preambles)
def test_sections_follow_one_another(value):
    assert value.index_at == 256 + value.header
    assert value.chunks_at == value.index_at + value.index
    assert value.chunks_end == value.chunks_at + 48 * value.chunks
    assert 0 <= value.payload_at - value.chunks_end < 4096
    assert value.payload_at % 4096 == 0


@given(preambles, st.integers(0, 2047))
def test_every_bit_of_the_preamble_counts(value, bit):
    data = bytearray(value.encode())
    data[bit // 8] ^= 1 << bit % 8
    kinds = (FormatError,) if bit < 64 else (VersionError,) if bit < 96 else (CorruptionError,)
    with pytest.raises(kinds):
        preamble.decode(bytes(data), value.file_size)


@given(preambles, st.integers(0, 255))
def test_preamble_cut_off(value, length):
    kind = FormatError if length < 12 else CorruptionError
    with pytest.raises(kind, match="fewer than its shortest header" if length < 12 else "truncated"):
        preamble.decode(value.encode()[:length], length)


@given(preambles, st.integers(-(2**60), 2**60))
def test_file_of_another_size(value, more):
    assume(more)
    with pytest.raises(CorruptionError, match="truncated" if more < 0 else "too long"):
        preamble.decode(value.encode(), value.file_size + more)


def test_preamble_bytes_are_where_the_format_says():
    found = Preamble(1, 2, 3, 4096, b"h" * 32, b"i" * 32, b"c" * 32).encode()
    numbers = [int.from_bytes(found[at : at + 8], "little") for at in range(16, 64, 8)]
    assert found[:8] == b"\x89THAW\r\n\x1a"
    assert found[8:16] == bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert numbers == [8192, 1, 2, 3, 4096, 4096]
    assert found[64:160] == b"h" * 32 + b"i" * 32 + b"c" * 32
    assert found[160:224] == bytes(64)
    assert found[224:] == hashlib.sha256(found[:224]).digest()


@given(parallels())
def test_ranks_are_counted_tensor_parallel_first(value):
    assert 0 <= value.rank < value.world
    every = [
        dataclasses.replace(value, tp_rank=tp, pp_rank=pp, dp_rank=dp).rank
        for dp in range(value.dp_size)
        for pp in range(value.pp_size)
        for tp in range(value.tp_size)
    ]
    assert every == list(range(value.world))
    assert [value.at(rank).rank for rank in every] == every
    assert {value.at(rank).world for rank in every} == {value.world}


DIGEST = "tensors-blake3:" + "0" * 64
KNOWN = Identity(
    "raw",
    engine="vllm",
    engine_version="0.26",
    architecture="Llama",
    config="0" * 64,
    dtype="bfloat16",
    quantization="fp8",
    model=DIGEST,
    parallel=Parallel(tp_rank=1, tp_size=2),
)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"stage": "module", "engine": None}, "'raw' stage of vllm, a plain module needs the 'module' stage"),
        ({"engine": "sglang"}, "sglang needs the 'raw' stage"),
        ({"architecture": "Qwen"}, "holds architecture 'Llama', the engine has 'Qwen'; thaw it into"),
        ({"config": "1" * 64}, "config.json or its overrides changed"),
        ({"dtype": "float16"}, "holds dtype 'bfloat16', the engine has 'float16'; pass the same dtype"),
        ({"quantization": "awq"}, "holds quantization 'fp8', the engine has 'awq'"),
        ({"quantization": None}, "holds quantization 'fp8', the engine has none"),
        ({"model": "files-blake3:" + "0" * 64}, "frozen from other weights"),
        (
            {"parallel": Parallel(tp_rank=1, tp_size=4)},
            "tensor-parallel rank 1 of 2, this engine process is tensor-parallel rank 1 of 4; freeze again with "
            "tensor_parallel_size=4",
        ),
        ({"parallel": Parallel(0, 2)}, "this engine process is tensor-parallel rank 0 of 2"),
        (
            {"parallel": Parallel(1, 2, 1, 2)},
            "pipeline rank 1 of 2; freeze again with pipeline_parallel_size=2, or start the engine with "
            "pipeline_parallel_size=1",
        ),
        (
            {"parallel": Parallel(1, 2, 0, 1, 1, 2)},
            "expert rank 1 of 2; freeze again with enable_expert_parallel=True, or start the engine with "
            "enable_expert_parallel=False",
        ),
        (
            {"parallel": Parallel(1, 2, 0, 1, 0, 1, 1, 2)},
            "data rank 1 of 2; freeze again with data_parallel_size=2, or start the engine with data_parallel_size=1",
        ),
        (
            {"parallel": Parallel(1, 4, 0, 2, 1, 8, 0, 2)},
            "freeze again with tensor_parallel_size=4 and pipeline_parallel_size=2 and data_parallel_size=2 and "
            "enable_expert_parallel=True, or",
        ),
        ({"parallel": Parallel(0, 2)}, "give the manifest's path (rank 0's file) of a set frozen by an engine of"),
        (
            {"experts": Experts("linear", "a" * 64)},
            "holds no experts of its own, this engine has experts placed linear",
        ),
    ],
)
def test_another_identity_is_refused_with_its_cure(wanted, words):
    with pytest.raises(MismatchError) as raised:
        require(KNOWN, dataclasses.replace(KNOWN, **wanted), "llama.thaw")
    assert str(raised.value).startswith("'llama.thaw' holds ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "other", [Experts("round_robin", "a" * 64), Experts("linear", "b" * 64), None], ids=["rule", "map", "none"]
)
def test_experts_that_lie_elsewhere_are_refused_with_their_cure(other):
    """Their tensors have the same names and shapes."""
    parallel = Parallel(1, 2, ep_rank=1, ep_size=2)
    ours = dataclasses.replace(KNOWN, parallel=parallel, experts=Experts("linear", "a" * 64))
    theirs = dataclasses.replace(ours, experts=other)
    require(ours, ours, "moe.thaw")
    words = r"^'moe.thaw' holds experts placed linear \(aaaaaaaaaaaa…\).*expert_placement_strategy, the all2all_backend"
    with pytest.raises(MismatchError, match=words):
        require(ours, theirs, "moe.thaw")
    kv = [dataclasses.replace(one, stage="kv") for one in (ours, theirs)]
    require(*kv, "moe.thawkv")


def test_experts_are_written_only_where_they_are_divided():
    assert "experts" not in KNOWN.to_json()
    held = dataclasses.replace(KNOWN, experts=Experts("linear", "a" * 64))
    assert held.to_json()["experts"] == {"placement": "linear", "map": "a" * 64}
    assert Identity.from_json(held.to_json()) == held
    for wrong in (
        "linear",
        {},
        {"placement": "linear"},
        {"placement": 1, "map": "a" * 64},
        {"placement": "x", "map": "a"},
    ):
        with pytest.raises(FormatError, match=r"identity\.experts"):
            Identity.from_json(KNOWN.to_json() | {"experts": wrong})


@pytest.mark.parametrize("name", ["engine_version", "architecture", "config", "dtype", "model"])
def test_what_is_not_known_is_not_compared(name):
    unknown = dataclasses.replace(KNOWN, **{name: None})
    require(unknown, KNOWN, "llama.thaw")
    require(KNOWN, unknown, "llama.thaw")


def test_quantisation_none_is_known():
    with pytest.raises(MismatchError, match="holds quantization none, the engine has 'fp8'"):
        require(dataclasses.replace(KNOWN, quantization=None), KNOWN, "llama.thaw")


@pytest.mark.parametrize("value", ["tensors-blake3:" + "0" * 63, "0" * 64, ":" + "0" * 64, "files-blake3", 7, None])
def test_model_id_has_a_known_scheme_and_a_digest(value):
    with pytest.raises(FormatError):
        identity.model_id(value, "model")
    assert identity.model_id(DIGEST, "model") == DIGEST


@pytest.mark.parametrize(
    ("shape", "stride", "length", "expected"),
    [
        ((), (), 4, True),
        ((), (), 8, False),
        ((2, 3), (3, 1), 24, True),
        ((2, 3), (1, 2), 24, True),
        ((2, 3), (4, 1), 28, False),
        ((2, 3), (3, 1), 28, False),
        ((2, 3), (0, 1), 12, True),
        ((2, 3), (0, 0), 4, True),
        ((2, 1, 3), (3, 99, 1), 24, True),
        ((2, 3), (1, 1), 16, False),
        ((2, 2, 2), (4, 1, 2), 32, True),
        ((2, 2, 2), (4, 2, 2), 28, False),
    ],
)
def test_covers(shape, stride, length, expected):
    assert covers(Tensor("t", "tensor", "float32", shape, stride, 0), length) is expected


def test_tensor_counts_its_bytes_and_their_extent():
    tensor = Tensor("t", "tensor", "bfloat16", (2, 3), (10, 2), 0, 8)
    assert (tensor.elements, tensor.bytes, tensor.extent) == (6, 12, 30)
    empty = Tensor("t", "tensor", "bfloat16", (2, 0), (10, 2), None)
    assert (empty.elements, empty.bytes, empty.extent) == (0, 0, 0)
