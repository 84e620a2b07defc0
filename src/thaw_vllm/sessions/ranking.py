"""Rollouts compared: which is the best, how much better than its group, and where each leaves the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .diff import common_prefix
from .lineage import drawn
from .rollouts import Rollout, Step

SURPRISING = 2.0
"""Nats below the most likely token from which on a sampled one is told as surprising: e² is seven times less likely."""


@dataclass(frozen=True)
class Parting:
    """Where a rollout leaves another one.

    Both have the same tokens before it, so both steps are of the same distribution, as far as an engine computes the
    same for two requests: their log-probabilities may be compared.

    Attributes:
        at: tokens that both begin with.
        own: what it goes on with; None: it ends there.
        other: what the other one goes on with; None: that ends there.
    """

    at: int
    own: Step | None
    other: Step | None


@dataclass(frozen=True)
class Ranked:
    """A rollout in its group.

    Attributes:
        rank: 1 for the best.
        rollout: itself.
        advantage: of its reward within the group, as ``advantages`` has it.
        leaves: the best one, where; None: it is the best one, or has the same tokens.
    """

    rank: int
    rollout: Rollout
    advantage: float
    leaves: Parting | None


@dataclass(frozen=True)
class Way:
    """A way on from a place where rollouts part.

    Attributes:
        at: tokens that all had in common who came there.
        step: the first token of this way, as its first member's record has it; None: its members end there.
        members: which rollouts take it, as indices into what ``ways`` was given.
        last: for each parting on the way to it, this one last, whether it is of the last way there.
    """

    at: int
    step: Step | None
    members: tuple[int, ...]
    last: tuple[bool, ...]

    @property
    def lines(self) -> str:
        """What a tree of text has before it."""
        return drawn(self.last)


def advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards relative to their group, as GRPO has them: ``(r - mean) / std`` (DeepSeekMath, arXiv 2402.03300, 4.1.2).

    The standard deviation is that of a sample (n − 1), as in TRL and verl, which add a small number to it, too; here
    nothing is added. Where all rewards are the same, or there is only one, nothing is to be learned, and all are 0.

    Args:
        rewards: of the rollouts of one prompt.

    Returns:
        One for each.
    """
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(one - mean) / deviation if deviation else 0.0 for one in rewards]


def ranked(rollouts: Sequence[Rollout]) -> list[Ranked]:
    """The best first: by reward, then by log-probability per token, then by seed."""
    pairs = zip(rollouts, advantages([one.reward for one in rollouts]), strict=True)
    ordered = sorted(pairs, key=lambda pair: (-pair[0].reward, -pair[0].mean_logprob, pair[0].seed))
    best = ordered[0][0]
    return [Ranked(rank, one, gain, parting(one, best)) for rank, (one, gain) in enumerate(ordered, 1)]


def parting(own: Rollout, other: Rollout) -> Parting | None:
    """Where a rollout leaves another one; None: nowhere."""
    at = common_prefix(own.tokens, other.tokens)
    if at == len(own.steps) == len(other.steps):
        return None
    return Parting(at, _at(own, at), _at(other, at))


def ways(rollouts: Sequence[Rollout]) -> Iterator[Way]:
    """Every way on from every place where rollouts part, as a tree: each is followed by those that it divides into.

    At each place the likeliest comes first, and what ends there last. Rollouts of the same tokens stay together.
    """
    tokens = [one.tokens for one in rollouts]
    order = sorted(range(len(tokens)), key=tokens.__getitem__)  # who goes the same way stands together
    shared = [common_prefix(tokens[a], tokens[b]) + (tokens[a] == tokens[b]) for a, b in pairwise(order)]

    def parted(begin: int, end: int, before: tuple[bool, ...]) -> list[tuple[Way, int, int]]:
        if tokens[order[begin]] == tokens[order[end - 1]]:
            return []
        at = min(shared[begin : end - 1])
        cuts = [begin, *(one + 1 for one in range(begin, end - 1) if shared[one] == at), end]
        found = [(tuple(sorted(order[a:b])), a, b) for a, b in pairwise(cuts)]
        found.sort(key=lambda way: (-_likely(rollouts[way[0][0]], at), way[0]))
        lasts = [*[False] * (len(found) - 1), True]
        return [
            (Way(at, _at(rollouts[group[0]], at), group, (*before, last)), a, b)
            for (group, a, b), last in zip(found, lasts, strict=True)
        ]

    # No recursion: each of thousands may part from the rest one token later.
    stack = parted(0, len(order), ())[::-1] if order else []
    while stack:
        way, begin, end = stack.pop()
        yield way
        stack += parted(begin, end, way.last)[::-1]


def _likely(one: Rollout, at: int) -> float:
    step = _at(one, at)
    return -math.inf if step is None else step.logprob


def _at(one: Rollout, at: int) -> Step | None:
    return one.steps[at] if at < len(one.steps) else None
