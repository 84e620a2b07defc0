"""``thaw demo kv``: a long prompt's KV cache frozen in one process and thawed in another."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import typer

_LENGTH = 4096
"""Tokens that prompt and answer may have together."""
_LINES = 170
_ROWS = (
    ("cold", "nothing cached"),
    ("cached", "from the prefix cache, same process"),
    ("thawed", "thawed in a new process"),
)


def long_prompt() -> str:
    """A question about a list of some 3,000 tokens."""
    things = ("glacier", "river", "harbour", "lantern", "orchard", "railway", "violin")
    lines = [
        f"{n}. The {things[n % 7]} number {n * 37 % 101} was seen {n * 13 % 17 + 1} times." for n in range(1, _LINES)
    ]
    return "Here is a list.\n" + "\n".join(lines) + "\nWhat kinds of things are in this list?"


def demo_kv(model: str, question: list[str] | None, max_tokens: int, path: Path | None, as_json: bool) -> None:
    """See ``demo``; ``path`` keeps the file."""
    from rich.console import Console

    from ..engines.vllm import fresh
    from ..weights.checkpoint import open_checkpoint
    from ..weights.provenance import checkpoint_id
    from .demo import introduced

    console = Console(stderr=as_json)
    engine_args = introduced(console, "thaw demo kv", model, _LENGTH)
    questions = ["\n".join(question) if question else long_prompt()]
    with console.status("0  the model id, which the cache belongs to"):
        ident = checkpoint_id(open_checkpoint(Path(model)))
    with tempfile.TemporaryDirectory(prefix="thaw-demo-") as folder:
        place = path or Path(folder) / f"{Path(model).name}.thawkv"

        def step(label: str, freeze: bool) -> dict[str, Any]:
            with console.status(label):
                found = fresh.run(
                    "kv",
                    model=model,
                    snapshot=None,
                    engine_args=engine_args,
                    questions=questions,
                    max_tokens=max_tokens,
                    environment={"VLLM_NO_USAGE_STATS": "1"},
                    kv={"path": str(place), "freeze": freeze, "model_id": ident},
                )
            console.print(f"  {label}: [green]{found['seconds']['total']:.1f} s[/]")
            return found

        first = step("1  ask twice, and freeze the cache", True)
        second = step("2  thaw it in a new process, and ask", False)
        size = place.stat().st_size
    equal = first["outputs"] == second["outputs"]
    result = {
        "model": model,
        "model_id": ident,
        "equal": equal,
        "prompt_tokens": first["prompt_tokens"],
        "cached": first["cached"] | second["cached"],
        "seconds": {name: (first["seconds"] | second["seconds"])[name] for name, _ in _ROWS},
        "frozen": first["report"],
        "thawed": second["report"],
        "file_size": size,
        "answer": second["outputs"][0]["text"],
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(console, result)
    if not equal:
        raise typer.Exit(1)


def _show(console: Any, result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(
        f"\n[bold]The file[/]: {result['frozen']['blocks']} blocks, {result['file_size'] / 1e6:.1f} MB, frozen in "
        f"{result['frozen']['seconds']:.2f} s, verified and thawed in {result['thawed']['seconds']:.2f} s"
    )
    console.print(f"\n[bold]The answer[/] {escape(result['answer'].strip())}")
    verdict = "[bold green]equal[/]" if result["equal"] else "[bold red]NOT EQUAL[/]"
    console.print(f"tokens and log-probabilities, thawed against the prefix cache of the first process: {verdict}\n")
    table = Table("", "tokens cached", "first token, s", title=f"A prompt of {result['prompt_tokens']} tokens")
    for name, label in _ROWS:
        table.add_row(label, str(result["cached"][name]), f"{result['seconds'][name]:.2f}")
    console.print(table)
