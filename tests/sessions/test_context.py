"""What an address depends on: everything that a block's bytes do, and nothing else."""

import dataclasses

import pytest
from tests.sessions.made import SIZE, context

from thaw_vllm.errors import FormatError
from thaw_vllm.format.document import canonical, parse
from thaw_vllm.format.identity import Identity
from thaw_vllm.sessions.context import Context

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]


def first(found, tokens=TOKENS, salt=None):
    return next(found.addresses(tokens, salt, 1))


def test_it_survives_being_written_down():
    made = context(groups=3, rank=1, world=2)
    assert Context.from_json(parse(canonical(made.to_json()), "context")) == made
    assert len(made.id) == 32 and made.page == 128


OTHERS = {
    "other pages": {"page": 64},
    "other groups": {"groups": 2},
    "another rank": {"rank": 1, "world": 2},
    "another number of ranks": {"world": 2},
    "other weights": {"model": "tensors-blake3:" + "6" * 64},
    "another config": {"config": "d" * 64},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_bytes_have_other_addresses(what):
    assert first(context(**OTHERS[what])) != first(context())


@pytest.mark.parametrize("field", ["dtype", "quantization", "engine", "engine_version", "architecture"])
def test_of_the_identity_every_field_counts(field):
    made = context()
    other = Context(dataclasses.replace(made.identity, **{field: "other"}), made.layout)
    assert first(other) != first(made)


def test_the_element_type_of_the_cache_counts():
    made = context()
    assert first(Context(made.identity, dataclasses.replace(made.layout, cache_dtype="fp8"))) != first(made)


def test_how_an_engine_hashes_does_not_count():
    assert context(algorithm="sha256", none_hash="00").id == context().id


def test_tokens_parents_and_salt_count():
    made = context()
    plain = [*made.addresses(TOKENS, None, 2)]
    assert len(set(plain)) == 2 and [*made.addresses([*TOKENS, 1], None, 2)] == plain
    salted = [*made.addresses(TOKENS, "s", 2)]
    moved = [*made.addresses([4, *TOKENS[1:]], None, 2)]
    assert not {*plain} & {*salted} and not {*plain} & {*moved}
    assert [*made.addresses(TOKENS, None, 1)] == plain[:1] and not [*made.addresses(TOKENS[: SIZE - 1], None, 0)]


def test_it_knows_its_weights():
    made = context()
    with pytest.raises(FormatError, match="which weights"):
        Context(dataclasses.replace(made.identity, model=None), made.layout)
    with pytest.raises(FormatError, match="of KV blocks"):
        Context(Identity("raw", model=made.identity.model), made.layout)
