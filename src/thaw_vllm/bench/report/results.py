"""The recorded lines, by the run they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..outcome import Outcome
from ..record import Record


@dataclass(frozen=True)
class Run:
    """Records that may be compared with one another.

    Attributes:
        id, date, command: as recorded; the date is that of the first line.
        machine, versions: likewise.
        outcome: its records.
    """

    id: str
    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    outcome: Outcome

    @property
    def works(self) -> list[str]:
        """In the order they were recorded."""
        return list(dict.fromkeys(record.work for record in self.outcome.records))


def load(directory: Path) -> list[Run]:
    """Every run in ``directory/*.jsonl``, the latest first; none where there is no such directory.

    Raises:
        UsageError: a line that is not a record, with its place.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    records: dict[str, list[Record]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                record = Record.from_json(line)
                lines.setdefault(line["run"], []).append(
                    {key: line[key] for key in ("run", "date", "command", "machine", "versions")}
                )
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{path}:{number} is not a record ({type(error).__name__}: {error}); a recorded line is never "
                    "edited by hand: take it out or bring it back from git"
                ) from None
            records.setdefault(line["run"], []).append(record)
    runs = [
        Run(run, found[0]["date"], found[0]["command"], _machine(found), found[0]["versions"], Outcome(records[run]))
        for run, found in lines.items()
    ]
    return sorted(runs, key=lambda run: (run.date, run.id), reverse=True)


def _machine(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all lines, with every file system that was used."""
    kinds = sorted({line["machine"]["file_system"] for line in lines if line["machine"].get("file_system")})
    first = {key: value for key, value in lines[0]["machine"].items() if key != "file_system"}
    return first | ({"file_systems": kinds} if kinds else {})
