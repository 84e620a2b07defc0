"""Which rollout is the best, how much better than its group, and where they part."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made_rollouts import rollout

from thaw_vllm.sessions.ranking import Parting, advantages, parting, ranked, ways

few = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=6)


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert advantages([2.0, 2.0]) == [0.0, 0.0] and advantages([3.0]) == [0.0] and advantages([]) == []


@given(rewards=st.lists(st.integers(-100, 100).map(float), min_size=2, max_size=9))
def test_advantages_are_of_a_group(rewards):
    found = advantages(rewards)
    assert statistics.fmean(found) == pytest.approx(0, abs=1e-9)
    if len(set(rewards)) > 1:
        assert statistics.stdev(found) == pytest.approx(1)
        assert sorted(range(len(found)), key=found.__getitem__) == sorted(range(len(found)), key=rewards.__getitem__)
    moved = advantages([3 * one + 7 for one in rewards])
    assert moved == pytest.approx(found)


def test_rewards_that_nearly_are_the_same():
    """Their deviation may be rounded to nothing."""
    assert advantages([5e-324, 0.0, 0.0]) == pytest.approx([0.0] * 3, abs=2)


def test_ranked():
    likely = rollout([1, 2], reward=0.0, seed=1, logprob=-0.5)
    right = rollout([1, 3], reward=1.0, seed=2, logprob=-3.0)
    second = rollout([1, 3, 4], reward=0.0, seed=4, logprob=-1.0)
    twin = rollout([1, 3, 4], reward=0.0, seed=3, logprob=-1.0)
    found = ranked([likely, second, twin, right])
    assert [(one.rank, one.rollout.seed) for one in found] == [(1, 2), (2, 1), (3, 3), (4, 4)]
    assert [one.advantage for one in found] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert [None if one.leaves is None else one.leaves.at for one in found] == [None, 1, 2, 2]
    assert found[1].leaves == Parting(1, likely.steps[1], right.steps[1])
    assert found[2].leaves == Parting(2, twin.steps[2], None)


@given(a=st.lists(st.integers(0, 1), max_size=6), b=st.lists(st.integers(0, 1), max_size=6))
def test_parting(a, b):
    found = parting(rollout(a, seed=1), rollout(b, seed=2))
    if a == b:
        assert found is None
        return
    wanted = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    sides = [None if step is None else step.token for step in (found.own, found.other)]
    assert (found.at, *sides) == (wanted, *[one[wanted] if wanted < len(one) else None for one in (a, b)])


@given(answers=few)
def test_ways_are_the_tree_of_all_answers(answers):
    made = [rollout(one, seed=seed) for seed, one in enumerate(answers)]
    found = [*ways(made)]
    alike = {one: {other for other in range(len(made)) if answers[other] == answers[one]} for one in range(len(made))}
    if len(alike[0]) == len(made):
        assert found == []
        return
    ends = set()
    stack = [(set(range(len(made))), [])]  # who is together, and which ways divide them
    for way in found:
        while not set(way.members) < stack[-1][0]:
            stack.pop()
        together, divide = stack[-1]
        assert len(way.last) == len(stack)
        divide.append(way)
        begin = {tuple(answers[one][: way.at]) for one in together}
        assert len(begin) == 1 and all(len(answers[one]) >= way.at for one in together)
        token = None if way.step is None else way.step.token
        assert set(way.members) == {one for one in together if [*answers[one], None][way.at] == token}
        assert way.last[-1] == (sum(len(one.members) for one in divide) == len(together))
        if set(way.members) == alike[way.members[0]]:
            ends |= set(way.members)
        stack.append((set(way.members), []))
    assert ends == set(range(len(made)))


def test_the_likeliest_way_comes_first_and_an_end_last():
    made = [
        rollout([7], seed=0),
        rollout([7, 1], seed=1, logprob=-3.0),
        rollout([7, 2], seed=2, logprob=-0.25),
        rollout([7, 1, 5], seed=3, logprob=-3.0),
    ]
    found = [*ways(made)]
    assert [(way.lines, way.at, way.step and way.step.token, way.members) for way in found] == [
        ("├─ ", 1, 2, (2,)),
        ("├─ ", 1, 1, (1, 3)),
        ("│  ├─ ", 2, 5, (3,)),
        ("│  └─ ", 2, None, (1,)),
        ("└─ ", 1, None, (0,)),
    ]
    assert [*ways([])] == [] == [*ways(made[:1])]


def test_each_of_many_may_part_one_token_later():
    made = [rollout([1] * one + [2], seed=one) for one in range(1100)]
    assert max(len(way.last) for way in ways(made)) == 1099
