"""``thaw demo fork``: a conversation forked into hypotheses, one chosen, and taken up again in another process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import typer

from .demo_kv import long_prompt

_LENGTH = 4096
_HYPOTHESES = (
    "Assistant: The list is mostly about places. Let me name three of them:",
    "Assistant: The list is mostly about things that were made. Let me name three of them:",
    "Assistant: The list follows a rule. The rule is that",
    "Assistant: The list looks random. I say so because",
)
_FOLLOW_UP = "\nUser: Thank you. Say it in one sentence.\nAssistant:"
_ROWS = (
    ("context", "the context, computed"),
    ("checkpoint", "kept"),
    ("fork", "forked into {n}, all answers"),
    ("alone", "the same, each with its own prefill"),
    ("rewind", "rewound to its middle"),
    ("checkout", "brought back in another process"),
    ("answer", "and asked a further question"),
)


def demo_fork(
    model: str, snapshot: Path | None, max_tokens: int, store: Path | None, as_json: bool, full_cycle: bool = True
) -> None:
    """See ``demo``.

    Args:
        snapshot: weights for the engines; None: vLLM loads the model.
        store: keeps the sessions; None: they are temporary.
        full_cycle: a second process takes the chosen branch up.
    """
    from rich.console import Console
    from transformers import AutoTokenizer

    from ..engines.vllm import fresh
    from ..weights.checkpoint import open_checkpoint
    from ..weights.provenance import checkpoint_id
    from .demo import introduced

    console = Console(stderr=as_json)
    engine_args = introduced(console, "thaw demo fork", model, _LENGTH)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    with console.status("0  the model id, which the sessions belong to"):
        ident = checkpoint_id(open_checkpoint(Path(model)))
    with tempfile.TemporaryDirectory(prefix="thaw-demo-") as folder:
        asked: dict[str, Any] = {
            "context": ids(f"User: {long_prompt()}\n"),
            "hypotheses": [ids(text) for text in _HYPOTHESES],
            "follow_up": ids(_FOLLOW_UP),
            "max_tokens": max_tokens,
            "store": str(store or Path(folder) / "sessions"),
            "model_id": ident,
        }

        def step(label: str, **more: Any) -> dict[str, Any]:
            with console.status(label):
                found = fresh.run(
                    "fork",
                    model=model,
                    snapshot=snapshot,
                    engine_args=engine_args,
                    environment={"VLLM_NO_USAGE_STATS": "1"},
                    fork=asked | more,
                )
            console.print(f"  {label}: [green]{found['seconds']['total']:.1f} s[/]")
            return found

        first = step("1  fork a conversation, choose, rewind")
        second = None
        if full_cycle:
            second = step("2  in a new process, go on with the chosen one", session=first["chosen"])
    equal = second is None or second["outputs"] == first["outputs"]
    seconds = first["seconds"] | ({} if second is None else second["seconds"])
    result = {
        "model": model,
        "model_id": ident,
        "equal": equal,
        "context_tokens": len(asked["context"]),
        "cached": None if second is None else second["cached"],
        "sessions": {name: first[name] for name in ("trunk", "chosen", "rewound")},
        "branches": first["branches"],
        "bytes": first["bytes"],
        "seconds": {name: seconds[name] for name, _ in _ROWS if name in seconds},
        "answer": first["outputs"][0]["text"],
        "store": None if store is None else str(store),
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(console, result, second is not None)
    if not equal:
        raise typer.Exit(1)


def _show(console: Any, result: dict[str, Any], twice: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    own = result["bytes"]
    console.print(
        f"\n[bold]The sessions[/]: a trunk of {result['context_tokens']} tokens, {own['trunk'] / 1e6:.1f} MB; with "
        f"{len(result['branches'])} branches {own['all'] / 1e6:.1f} MB"
    )
    for one in result["branches"]:
        mark = "[bold green]chosen[/]" if one["session"] == result["sessions"]["chosen"] else ""
        text = " ".join(one["text"].split())
        console.print(f"  {one['session'][:12]}  {one['score']:.3f} a token  {escape(text[:60])} {mark}")
    console.print(f"\n[bold]The further answer[/] {escape(result['answer'].strip())}")
    if twice:
        verdict = "[bold green]equal[/]" if result["equal"] else "[bold red]NOT EQUAL[/]"
        console.print(f"tokens and log-probabilities, in the new process against the first one: {verdict}")
    table = Table("", "s", title="Where the time went", title_justify="left")
    for name, label in _ROWS:
        if name in result["seconds"]:
            table.add_row(label.format(n=len(result["branches"])), f"{result['seconds'][name]:.3f}")
    console.print(table)
    if result["store"] is not None:
        console.print(f"The sessions are in {escape(result['store'])}: thaw log --store {escape(result['store'])}")
