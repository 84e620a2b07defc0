"""docs/benchmarks.md as text: a pure function of the runs and the hand-written notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..outcome import spread
from ..record import Record
from ..summary import (
    COMPRESSED,
    FORK_SECONDS,
    fork_table,
    general,
    is_rival,
    label,
    of_limit,
    of_rival,
    prompt_tokens,
    section,
)
from .goals import GOALS, full_size
from .method import METHOD
from .results import Run

TITLES = {
    "h2d": "Limit: host to device",
    "d2h": "Limit: device to host",
    "disk-read": "Limit: direct reads from disk",
    "disk-write": "Limit: direct writes to disk",
    "tmpfs-write": "Limit: writes to tmpfs",
    "memory-read": "Limit: reads of files in memory",
    "restore-tmpfs": "Restore from tmpfs",
    "restore-tmpfs-compressed": "Restore from tmpfs, compressed",
    "restore-tmpfs-expected": "Restore from tmpfs in a process that expects it",
    "restore-tmpfs-compressed-expected": "Restore from tmpfs, compressed, in a process that expects it",
    "restore-pagecache": "Restore from the page cache",
    "restore-pagecache-compressed": "Restore from the page cache, compressed",
    "restore-pagecache-expected": "Restore from the page cache in a process that expects it",
    "restore-pagecache-compressed-expected": "Restore from the page cache, compressed, in a process that expects it",
    "restore-disk": "Restore from a cold disk",
    "restore-disk-compressed": "Restore from a cold disk, compressed",
    "restore-warm": "Restore from pinned memory, again and again",
    "restore-warm-compressed": "Restore from pinned memory, again and again, compressed",
    "restore-cpu": "Restore into host memory",
    "restore-cpu-compressed": "Restore into host memory, compressed",
    "freeze-tmpfs": "Freeze to tmpfs",
    "freeze-tmpfs-compressed": "Freeze to tmpfs, compressed",
    "freeze-disk": "Freeze to disk",
    "freeze-disk-compressed": "Freeze to disk, compressed",
    "vllm-load-weights": "vLLM: loading the weights",
    "start-eager": "vLLM: process start to first token, eager",
    "start-graphs": "vLLM: process start to first token, with CUDA graphs",
    "start-eager-cold": "vLLM: process start to first token, eager, caches of kernels empty",
    "start-graphs-cold": "vLLM: process start to first token, with CUDA graphs, caches of kernels empty",
    "server-healthy": "vLLM's server: process start to healthy, eager",
    "server-healthy-cpu": "vLLM's server: process start to healthy, eager, on the CPU",
    "swap": "vLLM: other weights in place, to the first token",
    "park": "vLLM: an engine parked",
    "wake": "vLLM: an engine woken, to the first token",
    "ttft-cold": "KV cache: first token, nothing cached",
    "ttft-prefix": "KV cache: first token, from the engine's own prefix cache",
    "ttft-thawed": "KV cache: first token, thawed in a fresh engine",
    "kv-restore": "KV cache: restore of a prefix",
    "kv-restore-compressed": "KV cache: restore of a prefix, compressed",
    "kv-freeze": "KV cache: freeze of a prefix",
    "fork": "Fork: first tokens of N continuations of a trunk",
}
"""Headings in the page's order; a work that is not here comes after them under its own name."""
_PLAIN = ("restore-tmpfs", "restore-pagecache", "restore-disk", "restore-warm", "freeze-tmpfs", "freeze-disk")
PLOTTED = (*_PLAIN, *(work + COMPRESSED for work in _PLAIN))
"""Those of compressed snapshots beside the same run's of plain ones."""
KV_PLOTTED, KV_PLOT, KV_TITLE = "ttft-cold", "kv", "Seconds to the first token by tokens of the prompt"
"""The work of whose first run one plot shows all lengths, its file's name, its title."""
FORKED = "fork"
"""The work whose section tells all of ``thaw bench fork``."""
AS_WRITTEN = {"N": "N", "MB": "MB", "GB/S": "GB/s", "NO": "**no**"}
"""Cells of a table for a terminal that are not in small letters on the page."""
HEAD = "| system: route | GB/s | seconds | spread | of the limit | of the best rival | peak MiB | equal |"
RULE = "|---|---:|---:|---:|---:|---:|---:|---|"


def page(runs: Sequence[Run], notes: str) -> str:
    """The whole page.

    Args:
        runs: the latest first.
        notes: the text of the notes file, without a heading of its own; may be empty.
    """
    parts = ["# Benchmarks", METHOD.strip(), _goals(runs)]
    if not runs:
        parts.append(
            "## Results\n\nNothing has been recorded yet: `thaw bench weights --record`, then `thaw bench report`."
        )
    if notes.strip():
        parts.append("## Notes on these results\n\n" + notes.strip())
    parts += [_work(work, runs) for work in works(runs)]
    return "\n\n".join(parts) + "\n"


def works(runs: Sequence[Run]) -> list[str]:
    """Those with records and a section of their own, in the page's order."""
    found = {work for run in runs for work in run.works} - ({*FORK_SECONDS} - {FORKED})
    return [work for work in TITLES if work in found] + sorted(found - set(TITLES))


def _goals(runs: Sequence[Run]) -> str:
    lines = ["## Goals", "", "| | goal | latest run that tells | |", "|---|---:|---:|---|"]
    for goal in GOALS:
        figure, verdict = goal.reached(runs)
        lines.append(f"| {goal.text} | {goal.goal} | {figure} | {verdict} |")
    return "\n".join(lines)


def first(work: str, runs: Sequence[Run]) -> list[Run]:
    """The runs with this work, that which stands for it first: of full size if any is, with most rivals, the latest.

    A variant's is beside those of the general work and of other variants, if any is.
    """

    def order(run: Run) -> tuple[bool, int, int]:
        records = [record for record in run.outcome.records if record.work == work]
        rivals = {(record.system, record.route) for record in records if is_rival(record)}
        beside = {record.work for record in run.outcome.records if work != general(work) == general(record.work)}
        return not any(full_size(record, run.outcome) for record in records), -len(rivals), -len(beside)

    return sorted((run for run in runs if work in run.works), key=order)


def _work(work: str, runs: Sequence[Run]) -> str:
    head, *others = first(work, runs)
    lines = [f"## {TITLES.get(work, work)}", ""]
    if work in PLOTTED:
        lines += [f"![{TITLES[work]}](plots/{work}.svg)", ""]
    if work == KV_PLOTTED:
        lines += [f"![{KV_TITLE}](plots/{KV_PLOT}.svg)", ""]
    lines += _about(work, head) + (_forked(head) if work == FORKED else _groups(work, head))
    if others:
        lines += ["", "Other runs:", ""]
        lines += [f"- {run.date[:10]}, {_short_machine(run.machine)}: {_short(work, run)}" for run in others]
    return "\n".join(lines)


def _about(work: str, run: Run) -> list[str]:
    sized = [record.bytes for record in run.outcome.records if record.work == work and record.bytes]
    lines = [f"`{work}`, {run.date[:10]}" + (f", {max(sized) / 1e9:.2f} GB" if sized else "") + "."]
    return [
        *lines,
        f"Machine: {_machine(run.machine)}. Versions: {_versions(run.versions)}.",
        f"Command: `{run.command}`.",
    ]


def _forked(run: Run) -> list[str]:
    """Each trunk in a row, then each work with its spread."""
    head, *rows = [[AS_WRITTEN.get(cell, cell.lower()) for cell in row] for row in fork_table(run.outcome)]
    lines = ["", *(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *rows)), "", HEAD, RULE]
    records = [record for record in run.outcome.records if record.work in FORK_SECONDS]
    for tokens in dict.fromkeys(map(prompt_tokens, records)):
        lines += [_row(record, run, f"{record.work}, ") for record in records if prompt_tokens(record) == tokens]
    return lines


def _groups(work: str, run: Run) -> list[str]:
    lines: list[str] = []
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in run.outcome.records:
        if record.work == work:
            groups.setdefault(section(record), []).append(record)
    for (_, kind, directory), records in groups.items():
        told = " ".join(filter(None, (kind, f"in `{directory}`" if directory else "")))
        lines += ["", *([told[0].upper() + told[1:] + ":", ""] if told else []), HEAD, RULE]
        lines += [_row(record, run) for record in sorted(records, key=lambda r: (prompt_tokens(r), -r.gb_per_s))]
    return lines


def _row(record: Record, run: Run, before: str = "") -> str:
    limit, rival = of_limit(record, run.outcome), of_rival(record, run.outcome)
    cells = (
        f"**{before}{label(record)}**" if record.system == "thaw" else before + label(record),
        f"{record.gb_per_s:.2f}" if record.bytes else "",
        f"{record.median:.3f}",
        f"{spread(record):.0%} of {len(record.seconds)}",
        "" if limit is None else f"{limit:.3f}",
        "" if rival is None else f"{rival:.2f}",
        "" if record.peak_host_mib is None else f"{record.peak_host_mib:.0f}",
        "" if record.equal is None else "yes" if record.equal else "**no**",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short(work: str, run: Run) -> str:
    told = []
    for record in run.outcome.records:
        if record.work == work and (not is_rival(record) or prompt_tokens(record)):
            limit = of_limit(record, run.outcome)
            share = f" ({limit:.2f} of the limit)" if limit is not None else ""
            share += " (**not equal**)" if record.equal is False else ""
            told.append(f"{label(record)} {_figure(record)}{share}")
    rival = max(
        (
            record
            for record in run.outcome.records
            if record.work == work and is_rival(record) and record.equal is not False
            if not prompt_tokens(record)
        ),
        key=lambda record: record.gb_per_s,
        default=None,
    )
    if rival is not None:
        told.append(f"best rival {rival.system} {_figure(rival)}")
    return "; ".join(told)


def _figure(record: Record) -> str:
    """A start takes its time whatever the size of the weights."""
    by_size = record.bytes and not record.work.startswith(("start-", "server-"))
    return f"{record.gb_per_s:.2f} GB/s" if by_size else f"{record.median:.3f} s"


def _short_machine(machine: dict[str, Any]) -> str:
    return str(machine.get("gpu") or machine.get("cpu") or "unknown machine")


def _machine(machine: dict[str, Any]) -> str:
    parts = []
    if machine.get("gpu"):
        parts.append(f"{machine['gpu']} ({machine.get('gpu_memory_gib')} GiB, driver {machine.get('driver')})")
    parts.append(f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB")
    parts.append(f"Linux {machine.get('kernel')}")
    if machine.get("file_systems"):
        parts.append("files on " + " and ".join(machine["file_systems"]))
    return "; ".join(parts)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
