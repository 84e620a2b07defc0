"""Rollouts of no engine."""

from __future__ import annotations

from hypothesis import strategies as st
from tests.sessions.made import MODEL

from thaw_vllm.sessions.rollouts import Rollout, Rollouts, Step, single

ID = "0123456789abcdef" * 2


def step(token, logprob=-1.0, rank=2, likely=-0.5):
    """A token that was sampled where 9 was the most likely one."""
    return Step(token, logprob, rank, ((9, likely),))


def rollout(tokens, reward=0.0, seed=1, logprob=-1.0, **more):
    values = {"session": None, "finished": "stop", "text": " ".join(map(str, tokens))}
    return Rollout(seed=seed, reward=reward, steps=tuple(step(one, logprob) for one in tokens), **values | more)


def rollouts(*made, **more):
    tokens = {pair[0] for one in made for at in one.steps for pair in ((at.token, 0), *at.top)}
    values = {
        "created": 1.5,
        "versions": {"thaw": "0"},
        "model": MODEL,
        "source": "M",
        "sampling": {"temperature": 1.0},
        "logprobs": "raw_logprobs",
        "task": {"question": "?"},
        "prompt": "Q\n",
        "prompt_tokens": (5, 6),
        "session": ID,
        "pieces": {token: f"t{token}" for token in tokens},
    }
    return Rollouts(rollouts=made, **values | more)


logprobs = st.floats(-1e3, 0, width=32).map(single)
tokens = st.integers(0, (1 << 31) - 1)
tops = st.dictionaries(tokens, logprobs, min_size=1, max_size=3).map(
    lambda found: tuple(sorted(found.items(), key=lambda pair: -pair[1]))
)


@st.composite
def steps(draw):
    """Of the likeliest tokens, or of any other."""
    top = draw(tops)
    rank = draw(st.integers(1, 1 << 20))
    if rank <= len(top):
        return Step(*top[rank - 1], rank, top)
    return Step(draw(tokens.filter(lambda token: token not in dict(top))), draw(logprobs), rank, top)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
any_rollout = st.builds(
    Rollout,
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    session=st.sampled_from([None, ID]),
    finished=st.sampled_from(["stop", "length"]),
    text=texts,
    reward=st.floats(-1e9, 1e9),
    steps=st.lists(steps(), max_size=4).map(tuple),
)
any_rollouts = st.lists(any_rollout, min_size=1, max_size=4, unique_by=lambda one: one.seed).map(
    lambda made: rollouts(*sorted(made, key=lambda one: one.seed))
)
