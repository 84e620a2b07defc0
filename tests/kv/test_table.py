"""The forest of prefixes: what it says of itself, through its tensors and back, and what it refuses."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.errors import FormatError, UnsupportedError
from thaw_vllm.format.identity import Identity
from thaw_vllm.format.kv import EXTRA, HASHES, PARENTS, SLOTS, TOKENS, Group, Layout, Region
from thaw_vllm.kv.table import NONE, Block, Builder, Table, address, addresses, root

SIZE = 4


def layout(groups=1):
    return Layout(
        SIZE, "bfloat16", tuple(Group("Full", None, ()) for _ in range(groups)), (Region("r", "int8", (), (), 8),)
    )


@st.composite
def tables(draw):
    groups, hashed = draw(st.integers(1, 3)), draw(st.booleans())
    tokens = st.lists(st.integers(0, 2**31 - 1), min_size=SIZE, max_size=SIZE).map(tuple)
    blocks = []
    for number in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(NONE, number - 1))
        slots = tuple(draw(st.integers(NONE, 30)) for _ in range(groups))
        salt = draw(st.none() | st.text("abü😀", max_size=5)) if parent == NONE else None
        blocks.append(
            Block(parent, draw(tokens), slots, draw(st.binary(min_size=8, max_size=8)) if hashed else b"", salt)
        )
    return Table(SIZE, groups, tuple(blocks))


def coded(table):
    return {name: (shape, data) for name, (_, shape, data) in table.encode().items()}


@given(tables())
def test_through_its_tensors_and_back(table):
    assert Table.decode(layout(table.groups), coded(table), table.slots) == table


@given(tables())
def test_prefixes(table):
    depths = table.depths()
    reached = set()
    for leaf in table.leaves():
        chain = table.chain(leaf)
        assert table.blocks[chain[0]].parent == NONE
        assert all(table.blocks[b].parent == a for a, b in itertools.pairwise(chain))
        assert len(chain) == depths[leaf] == len(table.tokens(leaf)) / SIZE
        reached |= set(chain)
    assert reached == set(range(len(table.blocks)))
    assert [depths[leaf] for leaf in table.leaves()] == sorted((depths[leaf] for leaf in table.leaves()), reverse=True)


@given(tables(), st.randoms(use_true_random=False))
def test_a_builder_keeps_every_block_once(table, rng):
    builder = Builder(SIZE, table.groups)
    leaves = [*table.leaves(), *table.leaves()]
    rng.shuffle(leaves)
    for leaf in leaves:
        parent = NONE
        for number in table.chain(leaf):
            block = table.blocks[number]
            parent = builder.add(parent, block.tokens, block.slots, block.hash, block.salt)
    built = builder.table()
    base = bytes(32)
    assert set(addresses(built, base)) == set(addresses(table, base))
    assert len(set(addresses(built, base))) == len(built.blocks)


def test_addresses_tell_everything_apart():
    """Parent, tokens, their order, salt, and what the first parent stands for."""
    ids, one = Identity("kv", model="m", config="c", dtype="d"), layout()
    seen = {
        address(root(ids, one), packed(1, 2, 3, 4)),
        address(root(ids, one), packed(1, 2, 4, 3)),
        address(root(ids, one), packed(1, 2, 3, 4), "salt"),
        address(root(ids, one), packed(1, 2, 3, 4), ""),
        address(address(root(ids, one), packed(1, 2, 3, 4)), packed(1, 2, 3, 4)),
    }
    for changed in ({"model": "n"}, {"config": "e"}, {"dtype": "f"}, {"quantization": "q"}):
        other = Identity(**{"stage": "kv", "model": "m", "config": "c", "dtype": "d"} | changed)
        seen.add(address(root(other, one), packed(1, 2, 3, 4)))
    assert len(seen) == 9


def test_address_of_the_document():
    """docs/format.md, section 16."""
    base = root(Identity("kv", model="tensors-blake3:" + "0" * 64, dtype="bfloat16"), layout())
    assert base.hex() == "766f05a51951bb8d9d006ab3cd31649105312883a00d161e24afe682b046e8e4"
    tokens = packed(1, 2, 3, 4)
    assert address(base, tokens).hex() == "014994fa8e09004516839e9a4ee0b853cb7a1a94798c71f18818ba8c625e852a"
    assert (
        address(base, packed(1, 2, 3, 4), "s").hex()
        == "36662dd8d01341b163279a9ab1052cbee0a4eb6a2da884c02e582a4bc6358f36"
    )


def changed(table, name, shape=None, data=None):
    found = coded(table)
    if shape is None and data is None:
        del found[name]
    else:
        old = found.get(name, ((), b""))
        found[name] = (shape or old[0], old[1] if data is None else data)
    return found


def packed(*numbers):
    return b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)


TWO = Table(SIZE, 1, (Block(NONE, (1, 2, 3, 4), (0,), b"h1", "salt"), Block(0, (5, 6, 7, 8), (1,), b"h2")))


def extra(data):
    return changed(TWO, EXTRA, (len(data),), data)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed(TWO, TOKENS), "blocks.tokens is missing"),
        (changed(TWO, PARENTS), "blocks.parents is missing"),
        (changed(TWO, SLOTS), "blocks.slots is missing"),
        (coded(TWO) | {PARENTS: ((), packed(NONE))}, "its shape must be"),
        (changed(TWO, PARENTS, (2, 1)), "its shape must be"),
        (changed(TWO, SLOTS, (2, 2)), "its shape must be"),
        (changed(TWO, TOKENS, data=packed(1, 2, 3)), "12 bytes, its shape .* needs 32"),
        (changed(TWO, PARENTS, data=packed(NONE, 0) + b"!"), "9 bytes, its shape .* needs 8"),
        (changed(TWO, PARENTS, (1 << 24 | 1,)), "are too many; the limit is 16777216 blocks with 268435456 tokens"),
        (changed(TWO, HASHES, (2, 65), bytes(130)), "at most 64"),
        (changed(TWO, HASHES, (4,)), "its shape must begin with 2"),
        (changed(TWO, EXTRA, (1, 20)), "must be of one dimension"),
        (changed(TWO, EXTRA, ((64 << 20) + 1,)), "at most 67108864"),
        (extra(b'{"00": {"salt": "x"}}'), "is no block's number"),
        (changed(TWO, TOKENS, (2, 3)), "its shape must be"),
        (changed(TWO, PARENTS, data=packed(NONE, 1)), "block 1: its parent 1 does not come before it"),
        (changed(TWO, PARENTS, data=packed(0, 0)), "block 0: its parent 0 does not come before it"),
        (changed(TWO, PARENTS, data=packed(NONE, -2)), "block 1: its parent -2"),
        (changed(TWO, SLOTS, data=packed(0, 2)), "slot 2 is not below 2"),
        (changed(TWO, SLOTS, data=packed(-2, 1)), "slot -2 is not below 2"),
        (changed(TWO, TOKENS, data=packed(1, 2, 3, -4, 5, 6, 7, 8)), "a token id below 0"),
        (changed(TWO, HASHES, (3, 2)), "its shape must begin with 2"),
        (extra(b'{"1": {"salt": "x"}}'), "only a first block has a salt"),
        (extra(b'{"2": {"salt": "x"}}'), "there is no block 2"),
        (extra(b'{"-1": {"salt": "x"}}'), "is no block's number"),
        (extra(b'{"0": {"salt": 1}}'), "must be a string"),
        (extra(b'{"0": 1}'), "must be an object"),
        (extra(b"[]"), "JSON object"),
    ],
)
def test_tables_that_are_refused(tensors, words):
    with pytest.raises(FormatError, match=words):
        Table.decode(layout(), tensors, 2)


def test_random_bytes_are_refused_or_read_as_they_are():
    """No other error, and nothing that does not say what it was given."""
    rng = random.Random(5)
    refused = 0
    for _ in range(2000):
        found = coded(TWO)
        name = rng.choice(sorted(found))
        shape, data = found[name]
        data = bytearray(data)
        data[rng.randrange(len(data))] = rng.randrange(256)
        found[name] = (shape, bytes(data))
        try:
            table = Table.decode(layout(), found, 2)
        except FormatError:
            refused += 1
            continue
        again = coded(table)
        assert all(again[part] == found[part] for part in found if part != EXTRA)
    assert refused > 200


@pytest.mark.parametrize("salt", ["a\nb", "\x9b31m", "\ud800", "x" * 4097])
def test_salts_that_a_reader_would_refuse_are_not_written(salt):
    with pytest.raises(UnsupportedError, match="salt must be a string"):
        Table(SIZE, 1, (Block(NONE, (1, 2, 3, 4), (0,), b"", salt),)).encode()
