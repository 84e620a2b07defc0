"""Which blocks a window needs: against each token's own look back."""

from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.format.kv import Group
from thaw_vllm.sessions.windows import first_needed, kept_from, usable

FULL = Group("FullAttentionSpec", None, ("a",))


def sliding(window):
    return Group("SlidingWindowSpec", window, ("b",))


@given(blocks=st.integers(0, 20), size=st.integers(1, 9), window=st.integers(1, 60))
def test_a_sliding_window(blocks, size, window):
    """The next token after the prefix sees itself and ``window - 1`` before it."""
    seen = range(max(0, blocks * size - (window - 1)), blocks * size)
    wanted = min((token // size for token in seen), default=blocks)
    assert first_needed(sliding(window), blocks, size) == wanted
    assert first_needed(FULL, blocks, size) == 0


@given(blocks=st.integers(0, 20), size=st.integers(1, 9), chunk=st.integers(1, 60))
def test_chunks(blocks, size, chunk):
    begin = blocks * size // chunk * chunk
    wanted = min((token // size for token in range(begin, blocks * size)), default=None)
    assert first_needed(Group("ChunkedLocalAttentionSpec", chunk, ("c",)), blocks, size) == (
        min(blocks, begin // size) if wanted is None else wanted
    )


@given(total=st.integers(0, 12), window=st.integers(1, 40), data=st.data())
def test_what_is_usable(total, window, data):
    """The longest prefix of which nothing that is needed is missing."""
    groups = (FULL, sliding(window))
    absent = data.draw(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 1)), max_size=5))

    def there(number, group):
        return number < total and (number, group) not in absent

    def whole(count):
        return all(
            there(number, which)
            for which, group in enumerate(groups)
            for number in range(first_needed(group, count, 4), count)
        )

    found = usable(groups, total, 4, there)
    assert found == max(count for count in range(total + 1) if whole(count))
    kept = kept_from(groups, found, 4, there)
    assert kept[0] == 0 and all(there(number, 1) for number in range(kept[1], found))
    assert kept[1] <= first_needed(groups[1], found, 4) <= kept[1] + 1


def test_of_a_long_answer_only_the_window_of_its_prompt_may_be_there():
    """vLLM may cache a window's blocks at the end of a prompt only: 100 tokens of 320, in blocks of 16."""
    groups = (FULL, sliding(64))

    def there(number, group):
        return group == 0 or 2 <= number < 6

    assert usable(groups, 20, 16, there) == 6
    assert kept_from(groups, 6, 16, there) == (0, 2)


def test_one_more_is_kept_where_it_is_there():
    assert kept_from((FULL, sliding(9)), 6, 4, lambda number, group: True) == (0, 3)
    assert kept_from((FULL, sliding(9)), 0, 4, lambda number, group: True) == (0, 0)
