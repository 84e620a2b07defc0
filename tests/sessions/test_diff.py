"""Where two sessions part, and what they share."""

from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made import SIZE, context, save, session

from thaw_vllm.sessions.diff import common_tokens, difference, size

PAGE = context().page


def compare(store, *made):
    return difference(store, *(store.read(save(store, one)[0]) for one in made))


def test_where_they_part(store):
    found = compare(store, session(range(13)), session([*range(9), 99, 98, 97]))
    assert (found.common, found.tokens, found.comparable) == (9, (13, 12), True)
    assert (found.shared_blocks, found.shared_bytes) == (2, 2 * PAGE)
    assert (found.own_blocks, found.own_bytes, found.other) == ((1, 1), (PAGE, PAGE), ("prompt",))


def test_the_same(store):
    found = compare(store, session(range(8)), session(range(8)))
    assert (found.common, found.shared_blocks, found.own_blocks, found.other) == (8, 2, (0, 0), ())


def test_the_same_tokens_of_other_weights(store):
    other = context(model="tensors-blake3:" + "7" * 64)
    a, _ = save(store, session(range(8)))
    b, _ = save(store, session(range(8), contexts=[other], model=other.identity.model), [other])
    found = difference(store, store.read(a), store.read(b))
    assert (found.common, found.comparable, found.shared_blocks, found.other) == (8, False, 0, ("model",))


def test_salts_share_nothing(store):
    found = compare(store, session(range(8)), session(range(8), salt="s"))
    assert not found.comparable and found.shared_blocks == 0 and found.other == ("salt",)


def test_sizes(store):
    two = context(groups=2)
    id_, added = save(store, session(range(16), contexts=[two], kept=(0, 2)), [two])
    assert size(store, store.read(id_)) == (added, added * two.page)


@given(a=st.lists(st.integers(0, 1), max_size=9), b=st.lists(st.integers(0, 1), max_size=9))
def test_common_tokens(a, b):
    wanted = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_tokens(session(a), session(b)) == wanted
    assert SIZE
