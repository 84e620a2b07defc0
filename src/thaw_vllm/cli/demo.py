"""``thaw demo``: a real model, or its KV cache, frozen and thawed in fresh processes; answers compared, or ranked."""

from __future__ import annotations

import json
import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

QUESTIONS = (
    "Name the capital of France.",
    "Name three things that melt when they thaw.",
    "Write one sentence about the sea.",
)

PHASES = (
    ("process", "process start"),
    ("imports", "imports of vLLM"),
    ("engine", "engine (weights included)"),
    ("weights", "  of it: weights"),
    ("first_token", "first token"),
    ("total", "whole process, answers included"),
)


class What(str, Enum):
    """What is frozen."""

    weights = "weights"
    kv = "kv"
    fork = "fork"
    rollouts = "rollouts"


def demo(
    what: Annotated[
        What,
        typer.Argument(metavar="WHAT", help="weights, kv (a long prompt's cache), fork (a conversation), or rollouts."),
    ] = What.weights,
    *,
    model: Annotated[str | None, typer.Option(help="A model directory with weights, config and tokenizer.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead of the three built-in questions; repeat for more.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate for each answer. [default: 48]")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Keep the snapshot, or the sessions, here; default: a temporary place.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The record of rollouts: to look at, or with --model to make.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, max=512, help="How many rollouts. [default: 8]")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Which rollout to show token by token. [default: 1, the best]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Freeze a model, its KV cache, or a conversation, and thaw it; or sample answers to a task, and rank them.

    For weights three processes run one after the other: one freezes while vLLM loads the checkpoint, one starts vLLM as
    usual and answers, one starts it from the snapshot and answers. For kv one process answers a long prompt, with
    nothing cached and from the cache, and freezes that; another thaws it and answers. For fork one process forks a
    conversation into hypotheses and keeps them as sessions; another goes on with the best of them. Every token and
    every log-probability is compared.

    For rollouts one process forks a small task into seeded answers, which are kept as sessions and in a record with
    their rewards and the log-probability of every token. Such a record is looked at without --model, anywhere.
    """
    from ..errors import UsageError

    if what is not What.rollouts and (records is not None or count is not None or rank is not None):
        raise UsageError("--records, --count and --rank are of thaw demo rollouts")
    if model is None:
        making = {"--question": question or None, "--snapshot": snapshot, "--count": count, "--max-tokens": max_tokens}
        given = " and ".join(option for option, value in making.items() if value is not None)
        if records is None:
            also = ", or --records with a record to look at" * (what is What.rollouts)
            if also and given:
                also = f" for {given}; without it, --records looks at a record"
            raise UsageError(f"thaw demo needs --model with a model directory{also}")
        if given:
            raise UsageError(f"a record is looked at as it is, not with {given}; --model makes another one")
        from ..sessions.rollouts import read
        from .rollouts import show

        show(read(records), records, rank or 1, as_json)
        return
    from rich.console import Console

    from ..engines.vllm import fresh
    from ..engines.vllm.api import check_model, require_vllm_installed

    require_vllm_installed()
    check_model(model)
    max_tokens = max_tokens or 48
    if snapshot is not None:
        require_free("--snapshot", snapshot)
    if what is What.kv:
        from .demo_kv import demo_kv

        demo_kv(model, question, max_tokens, snapshot, as_json)
        return
    if what is What.fork:
        from .demo_fork import demo_fork

        if question:
            raise UsageError("the conversation of thaw demo fork is its own; leave --question out")
        demo_fork(model, None, max_tokens, snapshot, as_json)
        return
    if what is What.rollouts:
        from .demo_rollouts import demo_rollouts

        if question:
            raise UsageError("thaw demo rollouts can tell right answers to its own question only; leave --question out")
        demo_rollouts(model, None, max_tokens, snapshot, records, as_json, count=count or 8, rank=rank or 1)
        return
    questions = list(question or QUESTIONS)
    console = Console(stderr=as_json)
    engine_args = introduced(console, "thaw demo", model, 2048)
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="thaw-demo-") as folder:
        path = snapshot or Path(folder) / f"{Path(model).name}.thaw"

        def step(label: str, action: str, frozen: Path | None) -> dict[str, Any]:
            with console.status(label):
                found = fresh.run(
                    action,
                    model=model,
                    snapshot=frozen,
                    engine_args=engine_args,
                    questions=questions,
                    max_tokens=max_tokens,
                    environment=environment,
                )
            console.print(f"  {label}: [green]{found['seconds']['total']:.1f} s[/]")
            return found

        frozen = step("1  freeze while vLLM loads the checkpoint", "freeze", path)
        plain = step("2  start vLLM as usual and ask", "ask", None)
        thawed = step("3  start vLLM from the snapshot and ask", "ask", path)
        info = _summary(path)
    equal = plain["outputs"] == thawed["outputs"]
    result = {
        "model": str(model),
        "snapshot": info,
        "equal": equal,
        "questions": questions,
        "answers": [output["text"] for output in thawed["outputs"]],
        "tokens": sum(len(output["tokens"]) for output in thawed["outputs"]),
        "freeze": frozen["seconds"],
        "default": plain["seconds"],
        "thaw": thawed["seconds"],
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(console, result, plain, thawed)
    if not equal:
        raise typer.Exit(1)


def require_free(option: str, path: Path) -> None:
    """Nothing is where an option says that something be made, before minutes are spent on it.

    Raises:
        ExistsError, StorageError, UsageError: there is, or it could not be made.
    """
    from ..errors import ExistsError
    from ..transport.writer import check_target

    try:
        check_target(path, force=False)
    except ExistsError:  # there is no --force here
        raise ExistsError(f"{str(path)!r} exists; remove it, or give {option} another name") from None


def introduced(console: Console, what: str, model: str, max_model_len: int) -> dict[str, Any]:
    """Engine arguments for this machine, once it is said what is shown, and in which mode."""
    import torch

    console.print(f"[bold]{what}[/] with [bold]{Path(model).name}[/]")
    if torch.cuda.is_available():
        return {"max_model_len": max_model_len}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    console.print(
        "No GPU here, so vLLM runs on the CPU, with enforce_eager=True: compiling for the CPU takes minutes. "
        "All starts below run in this mode."
    )
    return {"max_model_len": max_model_len, "enforce_eager": True}


def _summary(path: Path) -> dict[str, Any]:
    from ..weights.open import open_snapshot

    with open_snapshot(path, with_chunks=False) as opened:
        header, index = opened.snapshot.header, opened.snapshot.index
        return {
            "file_size": opened.source.size,
            "tensors": len(index.tensors),
            "bytes": opened.snapshot.bytes,
            "stage": header.identity.stage,
            "architecture": header.identity.architecture,
            "dtype": header.identity.dtype,
            "engine": f"{header.identity.engine} {header.identity.engine_version}",
            "model_id": header.identity.model,
            "content_id": header.content,
            "ties": {name: list(others) for name, others in index.ties.items()},
            "files": [f.name for f in index.files],
        }


def _show(console: Any, result: dict[str, Any], plain: dict[str, Any], thawed: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    info = result["snapshot"]
    console.print(
        f"\n[bold]The snapshot[/] (thaw info shows every tensor): {info['tensors']} tensors, "
        f"{info['file_size'] / 1e6:.1f} MB, {info['architecture']} {info['dtype']}, frozen by {info['engine']} at the "
        f"{info['stage']} stage\n  model   {info['model_id']}\n  content {info['content_id']}"
    )
    console.print("\n[bold]The answers[/]")
    for question, before, after in zip(result["questions"], plain["outputs"], thawed["outputs"], strict=True):
        console.print(f"[bold]Q[/] {escape(question)}")
        console.print(f"   as usual  {escape(before['text'].strip())}")
        console.print(f"   thawed    {escape(after['text'].strip())}")
    verdict = "[bold green]equal[/]" if result["equal"] else "[bold red]NOT EQUAL[/]"
    console.print(f"\nall {result['tokens']} tokens and their log-probabilities: {verdict}\n")
    table = Table("phase", "as usual, s", "thawed, s", title="Where the time went", title_justify="left")
    for key, label in PHASES:
        cells = [f"{times[key]:.2f}" if key in times else "–" for times in (result["default"], result["thaw"])]
        table.add_row(label, *cells)
    console.print(table)
    share = result["default"].get("weights", 0.0) / result["default"]["total"]
    console.print(
        f"Its {info['bytes'] / 1e6:.0f} MB of weights are {share:.1%} of the usual start: with a small model on a CPU, "
        "imports and the engine's own start are nearly all of it. What this shows is that the thawed engine is the "
        "same, bit for bit."
    )
