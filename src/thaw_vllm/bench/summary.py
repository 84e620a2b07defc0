"""An outcome as rows for a person: speed, spread, and ratios to the limit and the best rival of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .outcome import Missed, Outcome, spread
from .record import Record
from .rivals import OUR_VARIANTS, OURS

HEAD = ("", "GB/S", "SPREAD", "OF LIMIT", "OF BEST RIVAL", "PEAK MIB", "EQUAL")
KV_SECONDS = ("ttft-cold", "ttft-prefix", "ttft-thawed", "kv-restore")
KV_HEAD = (
    *("TOKENS", "MB", "COLD S", "PREFIX S", "THAWED S", "RESTORE S", "GB/S", "OF LIMIT", "FREEZE S"),
    *("COLD/THAWED", "COLD/(RESTORE+THAWED)", "EQUAL"),
)
FORK_SECONDS = ("fork-prefills", "fork-prefix", "fork", "fork-thawed", "session-restore", "checkpoint", "fork-pool")
FORK_HEAD = (
    *("TOKENS", "N", "MB", "PREFILLS S", "PREFIX S", "FORK S", "THAWED S", "RESTORE S", "CHECKPOINT S"),
    *("POOL 4×64 S", "GB/S", "OF LIMIT", "PREFILLS/FORK", "PREFILLS/(RESTORE+THAWED)", "EQUAL"),
)
COMPRESSED, EXPECTED = "-compressed", "-expected"
"""How a work is called whose snapshot is compressed (bytes and speeds are of the original bytes), and one which the
process has said would come; also both."""
LIMITS: Mapping[str, tuple[str, ...]] = {
    "restore-tmpfs": ("h2d",),
    "restore-pagecache": ("h2d",),
    "restore-warm": ("h2d",),
    "restore-disk": ("h2d", "disk-read"),
    "freeze-tmpfs": ("d2h", "tmpfs-write"),
    "freeze-disk": ("d2h", "disk-write"),
    "kv-freeze": ("d2h", "tmpfs-write"),
    "kv-restore": ("h2d",),
    "session-restore": ("h2d",),
}
"""What a work cannot be faster than: all of these, each by its fastest route."""
ON_DISK = {"kv-freeze": ("d2h", "disk-write")}
"""The same of a work that goes by one name wherever its files are."""
ON_HOST = {
    "tmpfs": ("memory-read",),
    "pagecache": ("memory-read",),
    "pinned": ("memory-read",),
    "disk": ("disk-read",),
    "freeze-tmpfs": ("tmpfs-write",),
    "freeze-disk": ("disk-write",),
}
"""The same where the model is in host memory, by medium or work."""


def recorded(work: str, system: str) -> tuple[str, str]:
    """Work and system as a record has them: a variant is a work of thaw's, not a system."""
    return (work + system.removeprefix(OURS), OURS) if system in OUR_VARIANTS else (work, system)


def general(work: str) -> str:
    """The same of a snapshot that is not compressed, in a process that knew nothing."""
    return work.removesuffix(EXPECTED).removesuffix(COMPRESSED)


def limit_of(record: Record, outcome: Outcome) -> Record | None:
    """The limit of the same run that ``record`` is held against; None if it was not measured.

    A compressed one is held against the limit of the bytes that it becomes: it may be faster.
    """
    directory, work = record.extra.get("directory"), general(record.work)
    if work == "restore-cpu":
        return outcome.limit(*ON_HOST.get(str(record.extra.get("medium")), ("memory-read",)), directory=directory)
    chains = [works[work] for works in (LIMITS, ON_DISK, ON_HOST) if work in works]
    found = (outcome.limit(*chain, directory=directory) for chain in chains)
    return next((limit for limit in found if limit is not None), None)


def of_limit(record: Record, outcome: Outcome) -> float | None:
    """Speed over the limit's of the same run; None for a limit itself, and where there is none."""
    limit = None if record.system == "limit" else limit_of(record, outcome)
    return None if limit is None else record.gb_per_s / limit.gb_per_s


def of_rival(record: Record, outcome: Outcome) -> float | None:
    """thaw's speed over the best rival's of the same run, by their seconds for the same work; None for the others."""
    rival = best_rival(record, outcome.records) if record.system == "thaw" else None
    return None if rival is None else rival.median / record.median


def section(record: Record) -> tuple[str, str, str]:
    """Which table it is a row of: work, medium or kind of start, directory."""
    kind = record.extra.get("medium") or record.extra.get("start") or ""
    return general(record.work), str(kind), str(record.extra.get("directory", ""))


def alone(record: Record, outcome: Outcome) -> Record | None:
    """What one rank took for the same, of a record of several; None for that itself, and where it was not measured."""
    if record.extra.get("ranks", 1) == 1:
        return None
    same = (one for one in outcome.records if section(one) == section(record))
    return next((one for one in same if one.extra.get("ranks") == 1), None)


def prompt_tokens(record: Record) -> int:
    """Of the prompt whose KV cache or first token it is about; 0 for everything else."""
    found = record.extra.get("tokens")
    return found if isinstance(found, int) else 0


def group(record: Record) -> tuple[str, str, str, int]:
    """What is compared with one another: within a table, prompts of one length."""
    return *section(record), prompt_tokens(record)


def is_rival(record: Record) -> bool:
    """Whether it is another system's, neither ours nor a limit."""
    return record.system not in ("thaw", "limit")


def best_rival(record: Record, records: Iterable[Record]) -> Record | None:
    """The fastest rival of the same group that gave equal bytes."""
    rivals = [
        other for other in records if group(other) == group(record) and is_rival(other) and other.equal is not False
    ]
    return max(rivals, key=lambda other: other.gb_per_s, default=None)


def label(record: Record) -> str:
    """Which line it is, within its group."""
    checked = ", verified" if record.verified else ", unverified" if record.system == "thaw" else ""
    length = f"{prompt_tokens(record)} tokens, " if prompt_tokens(record) else ""
    variant = record.work.removeprefix(general(record.work)).replace("-", " ")
    moved = f", {record.extra['wire_gb_per_s']:.1f} GB/s moved" if "wire_gb_per_s" in record.extra else ""
    checked = checked if record.work.startswith("restore") else ""
    return f"{length}{record.system}{variant}{checked}: {record.route}{moved}"


def row(record: Record, outcome: Outcome) -> tuple[str, ...]:
    """Cells under HEAD."""
    limit, rival = of_limit(record, outcome), of_rival(record, outcome)
    return (
        label(record),
        f"{record.gb_per_s:.2f}" if record.bytes else "",
        f"{spread(record):.0%}",
        "" if limit is None else f"{limit:.3f}",
        "" if rival is None else f"{rival:.2f}",
        "" if record.peak_host_mib is None else f"{record.peak_host_mib:.0f}",
        _told_equal(record),
    )


def tables(outcome: Outcome) -> dict[str, list[tuple[str, ...]]]:
    """Rows by title; limits in one table, then each work in each directory."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for record in outcome.records:
        work, medium, directory = section(record)
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
        rows.append((record.work, f"{record.system}: {record.route}", *times, _told_equal(record)))
    return rows


def phase_tables(records: Sequence[Record]) -> dict[str, list[tuple[str, ...]]]:
    """Of starts, by their work: a row a phase, a column a loader; median seconds, and the range of several runs."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for work in dict.fromkeys(record.work for record in records if "asked" in record.extra):
        starts = [r for r in records if r.work == work and r.extra.get("phases") != r.extra.get("asked")]
        names = dict.fromkeys(name for record in starts for name in record.extra["phases"])
        if names:
            rows = [(name, *(_seconds(record.extra["phases"].get(name, ())) for record in starts)) for name in names]
            total = [[sum(run) for run in zip(*r.extra["phases"].values(), strict=True)] for r in starts]
            head = ("PHASE", *(f"{record.system}: {record.route}" for record in starts))
            found[work] = [head, *rows, ("total", *map(_seconds, total))]
    return found


def _seconds(runs: Sequence[float]) -> str:
    if not runs:
        return ""
    spread_out = f" ({min(runs):.2f}–{max(runs):.2f})" if len(runs) > 1 else ""
    return f"{statistics.median(runs):.2f}{spread_out}"


def kv_table(outcome: Outcome) -> list[tuple[str, ...]]:
    """Of prompts by their length: seconds to the first token, and of freezing and restoring what they have cached."""
    rows: list[tuple[str, ...]] = [KV_HEAD]
    for tokens, found in _by_length(outcome):
        seconds = {work: record.median for work, record in found.items()}
        restore, cold, thawed = found.get("kv-restore"), seconds.get("ttft-cold"), seconds.get("ttft-thawed")
        limit = None if restore is None else of_limit(restore, outcome)
        whole = with_restore(found["ttft-thawed"]) if "ttft-thawed" in found else None
        rows.append(
            (
                str(tokens),
                _megabytes(found),
                *(_median(work, found) for work in KV_SECONDS),
                "" if restore is None else f"{restore.gb_per_s:.2f}",
                "" if limit is None else f"{limit:.3f}",
                _median("kv-freeze", found),
                f"{cold / thawed:.1f}" if cold and thawed else "",
                f"{cold / whole:.1f}" if cold and whole else "",
                _all_equal(found),
            )
        )
    return rows


def fork_table(outcome: Outcome) -> list[tuple[str, ...]]:
    """Of trunks by their length: seconds until all first tokens of N continuations, and of keeping and restoring it."""
    rows: list[tuple[str, ...]] = [FORK_HEAD]
    for tokens, found in _by_length(outcome):
        restore, prefills, forked = (found.get(work) for work in ("session-restore", "fork-prefills", "fork"))
        limit = None if restore is None else of_limit(restore, outcome)
        whole = with_restore(found["fork-thawed"]) if "fork-thawed" in found else None
        rows.append(
            (
                str(tokens),
                next((str(record.extra["branches"]) for record in found.values() if "branches" in record.extra), ""),
                _megabytes(found),
                *(_median(work, found) for work in FORK_SECONDS),
                "" if restore is None else f"{restore.gb_per_s:.2f}",
                "" if limit is None else f"{limit:.3f}",
                f"{prefills.median / forked.median:.1f}" if prefills and forked else "",
                f"{prefills.median / whole:.1f}" if prefills and whole else "",
                _all_equal(found),
            )
        )
    return rows


def _by_length(outcome: Outcome) -> Iterator[tuple[int, dict[str, Record]]]:
    """Records by their work, for each length of a prompt."""
    for tokens in dict.fromkeys(filter(None, map(prompt_tokens, outcome.records))):
        yield tokens, {record.work: record for record in outcome.records if prompt_tokens(record) == tokens}


def _median(work: str, found: Mapping[str, Record]) -> str:
    return f"{found[work].median:.4f}" if work in found else ""


def _megabytes(found: Mapping[str, Record]) -> str:
    return f"{max(record.bytes for record in found.values()) / 1e6:.1f}"


def _all_equal(found: Mapping[str, Record]) -> str:
    equal = [record.equal for record in found.values() if record.equal is not None]
    return "NO" if not all(equal) else "yes" if equal else ""


def with_restore(record: Record) -> float:
    """Of ``ttft-thawed`` and ``fork-thawed``: median seconds of the restore and the first tokens together."""
    return float(statistics.median(record.extra["with_restore"]))


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
    partial = {"interrupted": True} if outcome.interrupted else {}
    return {"records": records, "missed": [vars(item) for item in outcome.missed]} | partial


def _told_equal(record: Record) -> str:
    return "" if record.equal is None else "yes" if record.equal else "NO"
