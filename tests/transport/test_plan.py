import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.transport.plan import BLOCK, steps

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK]), st.integers(0, 90_000))


@st.composite
def layouts(draw):
    """Ranges in order of offset, with gaps and empty ones among them."""
    at, ranges = draw(SIZES), []
    for gap, length in draw(st.lists(st.tuples(SIZES, SIZES), max_size=12)):
        ranges.append((at + gap, length))
        at += gap + length
    return ranges


@given(layouts(), st.integers(2 * BLOCK, 9 * BLOCK), st.integers(0, 3 * BLOCK))
def test_every_byte_once_and_in_order(ranges, slot, join):
    taken = []
    for step in steps(ranges, slot, join):
        for cut in step.cuts:
            assert step.offset + cut.at == ranges[cut.range][0] + cut.begin
            taken.append((cut.range, cut.begin, cut.begin + cut.length))
    merged = []
    for number, begin, end in taken:
        assert begin < end
        if merged and merged[-1][0] == number:
            assert merged[-1][1] == begin
            merged[-1] = (number, end)
        else:
            assert begin == 0
            merged.append((number, end))
    assert merged == [(number, length) for number, (_, length) in enumerate(ranges) if length]


@given(layouts(), st.integers(2 * BLOCK, 9 * BLOCK), st.integers(0, 3 * BLOCK))
def test_steps_fit_their_slots_and_lie_in_order(ranges, slot, join):
    end = 0
    for step in steps(ranges, slot, join):
        assert 0 < step.length <= slot
        assert step.offset >= end
        end = step.offset + step.length
        at = 0
        for cut in step.cuts:
            assert 0 <= cut.at - at <= join
            at = cut.at + cut.length
        assert step.cuts[0].at == 0
        assert at == step.length


@given(layouts(), st.integers(2 * BLOCK, 9 * BLOCK), st.integers(0, 3 * BLOCK))
def test_ranges_are_cut_on_blocks(ranges, slot, join):
    for step in steps(ranges, slot, join):
        if step.cuts[0].begin:
            assert step.offset % BLOCK == 0


@given(layouts(), st.integers(2 * BLOCK, 9 * BLOCK), st.integers(0, 3 * BLOCK))
def test_what_would_fit_is_read_together(ranges, slot, join):
    for first, second in itertools.pairwise(steps(ranges, slot, join)):
        end = first.offset + first.length
        room = slot - (second.offset - first.offset)
        whole = ranges[second.cuts[0].range][1] - second.cuts[0].begin
        # Apart for one of three reasons: a gap, a full slot, or too little room to end on a block.
        assert second.offset - end > join or whole > room or room < 1


def test_small_neighbours_share_a_step():
    ranges = [(number * 12, 10) for number in range(1000)]
    (step,) = steps(ranges, 3 << 20)
    assert (step.offset, step.length, len(step.cuts)) == (0, 11998, 1000)


@pytest.mark.parametrize(("gap", "count"), [(0, 1), (100, 1), (101, 2)])
def test_gap_that_is_still_joined(gap, count):
    assert len(list(steps([(0, 10), (10 + gap, 10)], 2 * BLOCK, join=100))) == count


def test_default_join_is_a_block():
    assert len(list(steps([(0, 10), (10 + BLOCK, 10)], 8 * BLOCK))) == 1
    assert len(list(steps([(0, 10), (11 + BLOCK, 10)], 8 * BLOCK))) == 2


def test_long_range_is_cut_so_that_all_but_the_first_read_begin_on_blocks():
    found = [(step.offset, step.length) for step in steps([(100, 50_000)], 4 * BLOCK)]
    assert found == [(100, 4 * BLOCK - 100), (4 * BLOCK, 4 * BLOCK), (8 * BLOCK, 4 * BLOCK), (12 * BLOCK, 948)]


def test_nothing():
    assert list(steps([], 2 * BLOCK)) == []
    assert list(steps([(5, 0), (3, 0), (9, 0)], 2 * BLOCK)) == []


@pytest.mark.parametrize("slot", [0, -1, BLOCK, 2 * BLOCK - 1])
def test_slot_that_is_too_small(slot):
    with pytest.raises(ValueError, match=f"at least {2 * BLOCK} bytes, not {slot}"):
        list(steps([], slot))


@pytest.mark.parametrize("ranges", [[(10, 5), (0, 5)], [(0, 5), (4, 5)], [(0, 5), (0, 5)], [(0, 90_000), (89_999, 1)]])
def test_ranges_out_of_order(ranges):
    with pytest.raises(ValueError, match=rf"range 1 begins at {ranges[1][0]}, the one before it ends at"):
        list(steps(ranges, 2 * BLOCK))


def test_nothing_is_joined_across_a_none():
    found = list(steps([(0, 10), None, (10, 10), (20, 5), None, None, (25, 1)], 2 * BLOCK))
    assert [step and (step.offset, step.length) for step in found] == [(0, 10), None, (10, 15), None, None, (25, 1)]
    assert [cut.range for step in found if step for cut in step.cuts] == [0, 1, 2, 3]
