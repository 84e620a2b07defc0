"""``thaw demo rollouts``: a task forked into seeded answers, each kept, rewarded, and recorded token by token."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import StorageError, UsageError
from ..sessions import rollouts as record

_LENGTH = 2048
_TASK = "There are 3 rows of 7 trees each in a garden. How many trees are there?"
_RIGHT = "21"
_PROMPT = f"""\
Q: There are 3 boxes with 4 apples each. How many apples are there?
A: 3 boxes of 4 apples are 3 * 4 = 12 apples. The answer is 12.

Q: Tom has 9 pens and gives 2 of them away. How many pens has he left?
A: 9 pens less 2 pens are 9 - 2 = 7 pens. The answer is 7.

Q: A train has 5 cars with 6 seats each. How many seats does it have?
A: 5 cars of 6 seats are 5 * 6 = 30 seats. The answer is 30.

Q: Ann has 8 coins and finds 5 more. How many coins has she now?
A: 8 coins and 5 coins are 8 + 5 = 13 coins. The answer is 13.

Q: {_TASK}
A:"""
_SEEDS = 1 << 63
_TOP = 5
"""Of the most likely tokens at each step so many are recorded."""


def reward(text: str) -> float:
    """1 where the last number of an answer is the right one, else 0."""
    numbers = re.findall(r"\d+", text)
    return float(numbers[-1:] == [_RIGHT])


def demo_rollouts(
    model: str,
    snapshot: Path | None,
    max_tokens: int,
    store: Path | None,
    records: Path | None,
    as_json: bool,
    *,
    count: int,
    rank: int,
    seed: int = 1,
) -> None:
    """See ``demo``.

    Args:
        snapshot: weights for the engine; None: vLLM loads the model.
        store: keeps the sessions; None: they are temporary, and the record names none.
        records: the file that is made; None: the record is shown, and not kept.
        count: rollouts.
        rank: of the rollout that is shown token by token.
        seed: of the first one; the others have the numbers after it.

    Raises:
        UsageError, ExistsError, StorageError: what is asked for cannot be made; no engine was started.
        ThawError: the engine could not make it, or the record could not be written.
    """
    from .demo import introduced, require_free

    _check_numbers(max_tokens, count, rank, seed)
    if not os.path.isdir(model):
        raise StorageError(f"there is no model directory {model!r}; give one with weights, config and tokenizer")
    if records is not None:
        if store is not None and os.path.realpath(store) == os.path.realpath(records):
            raise UsageError(f"{str(records)!r} cannot be both the sessions' directory and the record; name another")
        require_free("--records", records)
    if store is not None:
        _check_store(store)
    from rich.console import Console
    from transformers import AutoTokenizer

    from ..engines.vllm import fresh
    from ..weights.checkpoint import open_checkpoint
    from ..weights.provenance import checkpoint_id
    from .rollouts import show

    console = Console(stderr=True)
    engine_args = introduced(console, "thaw demo rollouts", model, _LENGTH)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    prompt = list(tokenizer.encode(_PROMPT, add_special_tokens=False))
    with console.status("0  the model id, which the sessions belong to"):
        ident = checkpoint_id(open_checkpoint(Path(model)))
    with tempfile.TemporaryDirectory(prefix="thaw-demo-") as folder:
        label = f"1  fork the task into {count} answers"
        with console.status(label):
            found = fresh.run(
                "rollouts",
                model=model,
                snapshot=snapshot,
                engine_args=engine_args | {"logprobs_mode": "raw_logprobs"},
                environment={"VLLM_NO_USAGE_STATS": "1"},
                fork={
                    "prompt": prompt,
                    "n": count,
                    "sampling": sampling(seed, max_tokens),
                    "store": str(store or Path(folder) / "sessions"),
                    "model_id": ident,
                },
            )
        seconds = found["seconds"]
        console.print(f"  {label}: [green]{seconds['fork']:.1f} s[/] of {seconds['total']:.1f}\n")
    made = recorded(found, model, ident, prompt, kept=store is not None)
    written = None
    try:
        if records is not None:
            record.write(records, made)
            written = records
    finally:  # what took minutes is shown where it cannot be kept
        show(made, written, rank, as_json)


def _check_numbers(max_tokens: int, count: int, rank: int, seed: int) -> None:
    if not 1 <= count <= record.MAX_ROLLOUTS:
        raise UsageError(f"there can be 1 to {record.MAX_ROLLOUTS} rollouts, not {count}")
    if not 1 <= rank <= count:
        raise UsageError(f"there are {count} rollouts, none of rank {rank}")
    if not 0 <= seed <= _SEEDS - count:
        raise UsageError(f"the seeds of {count} rollouts are from 0 and below 2^63; {seed} cannot be the first")
    if not 1 <= max_tokens < _LENGTH:
        raise UsageError(f"answers have 1 token at least, and less than {_LENGTH} with their prompt, not {max_tokens}")


def _check_store(store: Path) -> None:
    """Sessions can be kept there, as far as can be told without making it."""
    from ..sessions.store import Store

    if os.path.lexists(store):
        Store(store, create=True)
        return
    above = next(one for one in Path(os.path.abspath(store)).parents if os.path.lexists(one))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"the directory {str(store)!r} cannot be made, for {str(above)!r} takes none")


def sampling(seed: int, max_tokens: int) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``: the model's own distribution, so that what is recorded is what it was."""
    return {"temperature": 1.0, "seed": seed, "max_tokens": max_tokens, "logprobs": _TOP, "stop": ["\n"]}


def recorded(found: dict[str, Any], model: str, ident: str, prompt: list[int], *, kept: bool) -> record.Rollouts:
    """The record of what the engine's process has told.

    Args:
        found: as ``roll`` gives it, JSON.
        prompt: token ids.
        kept: its sessions are.
    """
    return record.Rollouts(
        created=round(time.time(), 3),
        versions=found["versions"],
        model=ident,
        source=model,
        sampling=found["sampling"],
        logprobs="raw_logprobs",
        task={"question": _TASK, "reward": f"1 where the last number of the answer is {_RIGHT}, else 0"},
        prompt=_PROMPT,
        prompt_tokens=tuple(prompt),
        session=found["session"] if kept else None,
        pieces={int(token): piece for token, piece in found["pieces"].items()},
        rollouts=tuple(
            record.Rollout(
                seed=one["seed"],
                session=one["session"] if kept else None,
                finished=one["finished"],
                text=one["text"],
                reward=reward(one["text"]),
                steps=tuple(
                    record.Step(**step | {"top": tuple((token, logprob) for token, logprob in step["top"])})
                    for step in one["steps"]
                ),
            )
            for one in found["rollouts"]
        ),
    )
