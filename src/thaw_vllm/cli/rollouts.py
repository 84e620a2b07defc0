"""What is shown of a record of rollouts: the ranking, where the answers part, and one of them token by token."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..sessions.ranking import SURPRISING, Parting, Ranked, Way, parting, ranked, ways
from ..sessions.rollouts import Rollouts, Step
from .output import document, pairs, plain, table
from .sessions import SHOWN, when


def show(made: Rollouts, path: Path | None, rank: int, as_json: bool) -> None:
    """Print what a record holds.

    Args:
        path: where it is kept; None: nowhere.
        rank: of the rollout that is shown token by token.

    Raises:
        UsageError: there is none of that rank.
    """
    group = ranked(made.rollouts)
    if rank > len(group):
        raise UsageError(f"there are {len(group)} rollouts, none of rank {rank}")
    tree = [*ways([one.rollout for one in group])]
    if as_json:
        document(_document(path, made, group, tree, group[rank - 1]))
        return
    rewards = [one.rollout.reward for one in group]
    likely = statistics.fmean(one.rollout.mean_logprob for one in group)
    versions = ", ".join(f"{plain(name)} {plain(one)}" for name, one in made.versions.items())
    kept = "not kept; --records FILE keeps it" if path is None else f"{plain(str(path))}, {made.id}"
    rows = [("record", kept), ("made", f"{when(made.created)} by {versions}")]
    rows += [("model", made.model), ("source", plain(made.source))]
    rows += [(f"task: {plain(name)}", plain(text)) for name, text in made.task.items()]  # no name is another row's
    rows += [
        ("sampling", plain(json.dumps(made.sampling, sort_keys=True))),
        ("log-probs", f"{made.logprobs}, natural logarithms"),
        ("group", f"{len(group)} rollouts; mean reward {statistics.fmean(rewards):.3f}, per token {likely:.3f}"),
    ]
    pairs(rows)
    print("\nranked:")
    _ranking(made, group)
    print("\nwhere they part:")
    _tree(made, group, tree)
    print("\nwhat they say:")
    for one in group:
        print(f"#{one.rank}  {plain(one.rollout.text)}")
    print(f"\n#{rank}, token by token; ! is {SURPRISING:g} or more below the likeliest:")
    _steps(made, group, group[rank - 1])


def _ranking(made: Rollouts, group: list[Ranked]) -> None:
    rows: list[tuple[str, ...]] = [
        ("", "SEED", "REWARD", "ADVANTAGE", "PER TOKEN", "LOGPROB", "TOKENS", "SESSION", "LEAVES #1 AT", "WITH")
    ]
    for one in group:
        own, leaves = one.rollout, one.leaves
        rows.append(
            (
                f"#{one.rank}",
                str(own.seed),
                f"{own.reward:g}",
                f"{one.advantage:+.3f}",
                f"{own.mean_logprob:.3f}",
                f"{own.sum_logprob:.2f}",
                str(len(own.steps)),
                (own.session or "")[:SHOWN],
                "" if leaves is None else str(leaves.at),
                "" if leaves is None else f"{_said(made, leaves.own)}, not {_said(made, leaves.other)}",
            )
        )
    table(rows, right=frozenset({1, 2, 3, 4, 5, 6, 8}))


def _tree(made: Rollouts, group: list[Ranked], tree: list[Way]) -> None:
    rows: list[tuple[str, ...]] = [("TOKEN", "AT", "LOGPROB", "RANK", "REWARD", "ROLLOUTS")]
    for way in tree:
        reward = statistics.fmean(group[one].rollout.reward for one in way.members)
        likely = ("", "") if way.step is None else (f"{way.step.logprob:.3f}", str(way.step.rank))
        names = " ".join(f"#{group[one].rank}" for one in way.members)
        rows.append((way.lines + _piece(made, way.step), str(way.at), *likely, f"{reward:.2f}", names))
    if not tree:
        print("nowhere: they are the same")
        return
    table(rows, right=frozenset({1, 2, 3, 4}))


def _steps(made: Rollouts, group: list[Ranked], chosen: Ranked) -> None:
    left = _left(group, chosen)
    rows: list[tuple[str, ...]] = [("", "AT", "TOKEN", "LOGPROB", "RANK", "LIKELIEST", "LEFT BY")]
    for at, step in enumerate(chosen.rollout.steps):
        likely = "" if step.rank == 1 else _said(made, Step(*step.top[0], 1, step.top))
        mark = "!" if step.gap >= SURPRISING else ""
        names = " ".join(f"#{rank}" for rank in left.get(at, []))
        rows.append((mark, str(at), _piece(made, step), f"{step.logprob:.3f}", str(step.rank), likely, names))
    table(rows, right=frozenset({1, 3, 4}))


def _left(group: list[Ranked], chosen: Ranked) -> dict[int, list[int]]:
    """At which of its tokens which others leave a rollout, by rank."""
    found: dict[int, list[int]] = {}
    for one in group:
        if (where := parting(one.rollout, chosen.rollout)) is not None:
            found.setdefault(where.at, []).append(one.rank)
    return found


def _piece(made: Rollouts, step: Step | None) -> str:
    return "(end)" if step is None else repr(made.pieces[step.token])


def _said(made: Rollouts, step: Step | None) -> str:
    return _piece(made, step) + ("" if step is None else f" {step.logprob:.2f}")


def _document(
    path: Path | None, made: Rollouts, group: list[Ranked], tree: list[Way], chosen: Ranked
) -> dict[str, Any]:
    rewards = [one.rollout.reward for one in group]
    left = _left(group, chosen)
    return {
        "record": None if path is None else str(path),
        "id": made.id,
        "created": made.created,
        "versions": made.versions,
        "model": made.model,
        "source": made.source,
        "sampling": made.sampling,
        "logprobs": made.logprobs,
        "task": made.task,
        "prompt_tokens": len(made.prompt_tokens),
        "session": made.session,
        "mean_reward": statistics.fmean(rewards),
        "ranking": [_ranked(made, one) for one in group],
        "tree": [
            {"at": way.at, "depth": len(way.last), "rollouts": [group[one].rank for one in way.members]}
            | {"token": None if way.step is None else _step(made, way.step)}
            for way in tree
        ],
        "rollout": {
            "rank": chosen.rank,
            "steps": [
                _step(made, step)
                | {"surprising": step.gap >= SURPRISING, "left_by": left.get(at, [])}
                | {"top": [_token(made, *pair) for pair in step.top]}
                for at, step in enumerate(chosen.rollout.steps)
            ],
        },
    }


def _ranked(made: Rollouts, one: Ranked) -> dict[str, Any]:
    own = one.rollout
    return {
        "rank": one.rank,
        "seed": own.seed,
        "session": own.session,
        "reward": own.reward,
        "advantage": one.advantage,
        "mean_logprob": own.mean_logprob,
        "sum_logprob": own.sum_logprob,
        "tokens": len(own.steps),
        "finished": own.finished,
        "text": own.text,
        "leaves_best": None if one.leaves is None else _parting(made, one.leaves),
    }


def _parting(made: Rollouts, where: Parting) -> dict[str, Any]:
    sides = (("token", where.own), ("best_token", where.other))
    return {"at": where.at} | {name: None if step is None else _step(made, step) for name, step in sides}


def _step(made: Rollouts, step: Step) -> dict[str, Any]:
    return _token(made, step.token, step.logprob) | {"rank": step.rank, "below_likeliest": step.gap}


def _token(made: Rollouts, token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "text": made.pieces[token], "logprob": logprob}
