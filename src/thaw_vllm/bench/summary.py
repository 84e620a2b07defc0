"""An outcome as rows for a person: speed, spread, and ratios to the limit and the best rival of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .outcome import Missed, Outcome, spread
from .record import Record

HEAD = ("", "GB/S", "SPREAD", "OF LIMIT", "OF BEST RIVAL", "PEAK MIB", "EQUAL")
LIMITS: Mapping[str, tuple[str, ...]] = {
    "restore-tmpfs": ("h2d",),
    "restore-pagecache": ("h2d",),
    "restore-warm": ("h2d",),
    "restore-disk": ("h2d", "disk-read"),
    "freeze-tmpfs": ("d2h", "tmpfs-write"),
    "freeze-disk": ("d2h", "disk-write"),
}
"""What a work cannot be faster than: all of these, each by its fastest route."""
ON_HOST = {
    "tmpfs": ("memory-read",),
    "pagecache": ("memory-read",),
    "pinned": ("memory-read",),
    "disk": ("disk-read",),
    "freeze-tmpfs": ("tmpfs-write",),
    "freeze-disk": ("disk-write",),
}
"""The same where the model is in host memory, by medium or work."""


def limit_of(record: Record, outcome: Outcome) -> Record | None:
    """The limit of the same run that ``record`` is held against; None if it was not measured."""
    directory = record.extra.get("directory")
    if record.work == "restore-cpu":
        return outcome.limit(*ON_HOST.get(str(record.extra.get("medium")), ("memory-read",)), directory=directory)
    found = outcome.limit(*LIMITS.get(record.work, ()), directory=directory) if record.work in LIMITS else None
    return found or (outcome.limit(*ON_HOST[record.work], directory=directory) if record.work in ON_HOST else None)


def of_limit(record: Record, outcome: Outcome) -> float | None:
    """Speed over the limit's of the same run; None for a limit itself, and where there is none."""
    limit = None if record.system == "limit" else limit_of(record, outcome)
    return None if limit is None else record.gb_per_s / limit.gb_per_s


def of_rival(record: Record, outcome: Outcome) -> float | None:
    """thaw's speed over the best rival's of the same run, by their seconds for the same work; None for the others."""
    rival = best_rival(record, outcome.records) if record.system == "thaw" else None
    return None if rival is None else rival.median / record.median


def group(record: Record) -> tuple[str, str, str]:
    """What is compared with one another: work, medium or kind of start, directory."""
    kind = record.extra.get("medium") or record.extra.get("start") or ""
    return record.work, str(kind), str(record.extra.get("directory", ""))


def best_rival(record: Record, records: Iterable[Record]) -> Record | None:
    """The fastest of the same group that is neither ours nor a limit and gave equal bytes."""
    rivals = [
        other
        for other in records
        if group(other) == group(record) and other.system not in ("thaw", "limit") and other.equal is not False
    ]
    return max(rivals, key=lambda other: other.gb_per_s, default=None)


def label(record: Record) -> str:
    """Which line it is, within its group."""
    checked = ", verified" if record.verified else ", unverified" if record.system == "thaw" else ""
    return f"{record.system}{checked if record.work.startswith('restore') else ''}: {record.route}"


def row(record: Record, outcome: Outcome) -> tuple[str, ...]:
    """Cells under HEAD."""
    limit, rival = of_limit(record, outcome), of_rival(record, outcome)
    return (
        label(record),
        f"{record.gb_per_s:.2f}",
        f"{spread(record):.0%}",
        "" if limit is None else f"{limit:.3f}",
        "" if rival is None else f"{rival:.2f}",
        "" if record.peak_host_mib is None else f"{record.peak_host_mib:.0f}",
        "" if record.equal is None else "yes" if record.equal else "NO",
    )


def tables(outcome: Outcome) -> dict[str, list[tuple[str, ...]]]:
    """Rows by title; limits in one table, then each work in each directory."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for record in outcome.records:
        work, medium, directory = group(record)
        title = "limits" if record.system == "limit" else " ".join(filter(None, (work, medium, directory)))
        rows = found.setdefault(title, [HEAD])
        cells = row(record, outcome)
        if record.system == "limit":
            cells = (f"{work}: {record.route}" + (f", {directory}" if directory else ""), *cells[1:])
        rows.append(cells)
    return found


def seconds_table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """For works whose seconds say more than their speed."""
    rows: list[tuple[str, ...]] = [("", "LOADER", "SECONDS", "LOW", "HIGH", "EQUAL")]
    for record in records:
        times = (f"{t:.2f}" for t in (record.median, min(record.seconds), max(record.seconds)))
        rows.append((record.work, f"{record.system}: {record.route}", *times, "yes" if record.equal else "NO"))
    return rows


def failures(missed: Iterable[Missed]) -> list[str]:
    """One line a system and reason, however many works it is missing from."""
    works: dict[tuple[str, str], list[str]] = {}
    for item in missed:
        who = " ".join(filter(None, (item.system, f"({item.route})" if item.route else "")))
        works.setdefault((who, item.why), []).append(item.work)
    return [
        f"{', '.join(dict.fromkeys(names))}: " + ": ".join(filter(None, (who, why)))
        for (who, why), names in works.items()
    ]


def plain(outcome: Outcome) -> dict[str, Any]:
    """For ``--json``: records with their ratios, and what is missing."""
    records = []
    for record in outcome.records:
        ratios = {"of_limit": of_limit(record, outcome), "of_best_rival": of_rival(record, outcome)}
        told = {name: round(ratio, 4) for name, ratio in ratios.items() if ratio is not None}
        records.append(record.to_json() | told)
    return {"records": records, "missed": [vars(item) for item in outcome.missed]}
