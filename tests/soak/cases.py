"""Numbered random cases: a few by default, all of them under THAW_SOAK=1, resumable, with a record of each full run.

``THAW_SEED`` chooses the cases. Case n of a test draws from a generator seeded with the seed, the test's name and n
alone, so one case can be repeated without those before it. A full run that was stopped goes on where it stopped: what
is done is noted in ``.cache/soak/<seed>.json``. When it ends, one line is added to ``tests/soak/record.jsonl``.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("THAW_SOAK") == "1"
SEED = os.environ.get("THAW_SEED", "0")
RECORD = Path(__file__).with_name("record.jsonl")
PROGRESS = ROOT / ".cache" / "soak"
EXAMPLES = {"small": 60, "full": 1000}
"""Hypothesis's examples of each of its tests."""
PACKAGES = ("thaw-vllm", "torch", "numpy", "hypothesis", "pytest", "xxhash", "blake3")


@dataclass(frozen=True)
class Case:
    """One of a test's cases; ``random`` is its own generator."""

    number: int
    random: random.Random


class Progress:
    """What a seed's run has done: cases by test, kept in a file."""

    def __init__(self, path):
        self.path = path
        self.done = json.loads(path.read_text()) if path.exists() else {}

    def note(self, name, count):
        self.done[name] = count
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_suffix(".part")
        staged.write_text(json.dumps(self.done))
        os.replace(staged, self.path)


class Run:
    """The cases of one test session."""

    def __init__(self, *, full=FULL, seed=SEED, progress=None):
        self.full, self.seed = full, seed
        self.progress = (progress or Progress(PROGRESS / f"{seed}.json")) if full else None
        self.cases, self.ran, self.start = {}, 0, time.time()

    def of(self, name, small, full):
        """The cases of the test ``name`` that are left; each counts as done when the next one is asked for."""
        total = full if self.full else small
        first = min(self.progress.done.get(name, 0), total) if self.progress else 0
        self.cases[name] = first
        for number in range(first, total):
            yield Case(number, random.Random(f"{self.seed}/{name}/{number}"))
            self.cases[name] = number + 1
            self.ran += 1
            if self.progress:
                self.progress.note(name, number + 1)

    def record(self, failures):
        """The line for the record, as a dict."""
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": _commit(),
            "seed": self.seed,
            "failures": failures,
            "cases": dict(sorted(self.cases.items())),
            "hypothesis_examples": EXAMPLES["full"],
            "seconds": round(time.time() - self.start),
            "versions": {"python": platform.python_version(), "system": platform.release()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
        }


def _commit():
    """The commit that was tested, with a ``+`` where the source or the tests differ from it."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src", "tests"], capture_output=True)
    return found.stdout.strip() + "+" * bool(changed.returncode) if found.returncode == 0 else None
