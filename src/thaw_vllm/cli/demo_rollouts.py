"""``thaw demo rollouts``: a task forked into seeded answers, each kept, rewarded, and recorded token by token."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import UsageError
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
    """
    from .demo import engine_arguments, require_free

    if rank > count:
        raise UsageError(f"there are {count} rollouts, none of rank {rank}")
    if records is not None:
        require_free("--records", records)
    from rich.console import Console
    from transformers import AutoTokenizer

    from ..engines.vllm import fresh
    from ..weights.checkpoint import open_checkpoint
    from ..weights.provenance import checkpoint_id
    from .rollouts import show

    console = Console(stderr=True)
    engine_args, note = engine_arguments(_LENGTH)
    console.print(f"[bold]thaw demo rollouts[/] with [bold]{Path(model).name}[/]")
    if note:
        console.print(note)
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
    if records is not None:
        record.write(records, made)
    show(made, records, rank, as_json)


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
