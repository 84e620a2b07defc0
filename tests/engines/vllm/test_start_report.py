"""What is read of a start: self times, the wall clock, files that are torn or of other starts, the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.engines.vllm import start_report
from thaw_vllm.engines.vllm.start_report import CORE, FRONT, HELPER, PHASES, WORKER, Event, read, report
from thaw_vllm.errors import StorageError, UsageError

TIMES = st.integers(0, 40).map(lambda tenths: 1000 + tenths / 10)
NAMES = st.sampled_from(["process", "imports", "config", "engine init", "device", "weights", "first token", "<b>&\"'"])


@st.composite
def starts(draw: st.DrawFn) -> list[Event]:
    """Any spans of up to five processes, whose parents are anybody."""
    pids = range(1, draw(st.integers(1, 5)) + 1)
    of = {pid: (draw(st.integers(0, 6)), draw(TIMES)) for pid in pids}
    found = []
    for pid, (parent, created) in of.items():
        for _ in range(draw(st.integers(1, 6))):
            begin, end = sorted((draw(TIMES), draw(TIMES)))
            found.append(Event(pid, parent, "", created, draw(NAMES), max(begin, created), max(end, created)))
    return found


def union(spans: list[tuple[float, float]]) -> float:
    covered, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, last))
        last = max(last, end)
    return covered


class TestAnySpans:
    @given(starts())
    def test_self_times_add_up_to_what_is_covered(self, events: list[Event]):
        for process in report(events).processes:
            seconds = [span.self_seconds for span in process.spans]
            assert min(seconds, default=0.0) >= 0
            assert sum(seconds) == pytest.approx(union([(s.begin, s.end) for s in process.spans]), abs=1e-9)
            assert all(s.self_seconds <= s.end - s.begin + 1e-9 for s in process.spans)

    @given(starts())
    def test_phases_add_up_to_the_total(self, events: list[Event]):
        found = report(events)
        assert sum(found.seconds.values()) == pytest.approx(found.total, abs=1e-9)
        assert all(phase.seconds >= 0 and 0 <= phase.begin <= phase.end <= found.total for phase in found.phases)
        assert [phase.begin for phase in found.phases] == sorted(phase.begin for phase in found.phases)

    @given(starts())
    def test_every_event_is_told_or_counted(self, events: list[Event]):
        found = report(events)
        told = {process.pid for process in found.processes}
        assert found.skipped == sum(event.pid not in told for event in events)

    @given(starts())
    def test_the_page_is_well_formed_and_loads_nothing(self, events: list[Event]):
        page = report(events).html()
        ElementTree.fromstring(re.sub(r"<meta [^>]*>", "", page.removeprefix("<!DOCTYPE html>\n")))
        assert "<b>" not in page and "<script" not in page and "href" not in page and "src=" not in page


def event(pid: int, parent: int, phase: str, begin: float, end: float, created: float = 0.0) -> dict[str, Any]:
    return {"pid": pid, "parent": parent, "name": "", "created": created, "phase": phase, "begin": begin, "end": end}


START = [
    event(10, 1, "process", 100, 101, 100),
    event(10, 1, "imports", 101, 105, 100),
    event(10, 1, "config", 105, 106, 100),
    event(10, 1, "front", 106, 131, 100),
    event(20, 10, "process", 107, 108, 107),
    event(20, 10, "imports", 108, 112, 107),
    event(20, 10, "engine init", 112, 130, 107),
    event(30, 20, "process", 113, 114, 113),
    event(30, 20, "imports", 114, 117, 113),
    event(30, 20, "device", 117, 118, 113),
    event(30, 20, "weights", 119, 122, 113),
    event(30, 20, "model loading", 118, 124, 113),
    event(30, 20, "profile", 124, 129, 113),
    event(20, 10, "first token", 133, 134, 107),
]


def write(directory: Path, events: list[dict[str, Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    for one in events:
        with (directory / f"{one['pid']}.jsonl").open("a") as file:
            file.write(json.dumps(one) + "\n")
    return directory


def test_a_start_of_three_processes(tmp_path: Path):
    found = read(write(tmp_path / "start", START))
    assert [(p.role, p.pid, p.depth) for p in found.processes] == [(FRONT, 10, 0), (CORE, 20, 1), (WORKER, 30, 2)]
    assert found.total == 34 and found.first_token and found.skipped == 0
    assert found.seconds == {
        "process": 1,
        "imports": 4,
        "config": 1,
        "front": 2,  # a second before the engine's process is there, and one after
        "engine process": 1,
        "engine imports": 4,
        "engine init": 2,
        "worker process": 1,
        "worker imports": 3,
        "device": 1,
        "model loading": 3,
        "weights": 3,
        "profile": 5,
        "until the request": 2,
        "first token": 1,
    }
    assert set(found.seconds) <= set(PHASES)
    worker = {span.phase: span.self_seconds for span in found.processes[2].spans}
    assert worker["model loading"] == 3 and worker["weights"] == 3
    assert found.to_json()["phases"][0] == {"phase": "process", "begin": 0, "end": 1, "seconds": 1}
    assert json.loads(json.dumps(found.to_json()))["processes"][2]["role"] == WORKER
    lines = found.waterfall().splitlines()
    assert len(lines) == len(found.phases) and lines[1].startswith("imports") and "4.000 s" in lines[1]


def test_a_start_without_a_token_ends_with_what_was_done_last(tmp_path: Path):
    found = read(write(tmp_path / "start", START[:-1]))
    assert found.total == 31 and not found.first_token and "end of what was recorded" in found.html()


def test_ranks_side_by_side_count_once(tmp_path: Path):
    second = [one | {"pid": 31} for one in START if one["pid"] == 30]
    found = read(write(tmp_path / "start", [*START, *second]))
    assert len(found.processes) == 4 and found.seconds["weights"] == 3 and sum(found.seconds.values()) == found.total


def test_a_process_that_only_imports_is_a_helper(tmp_path: Path):
    found = read(write(tmp_path / "start", [*START, event(15, 10, "imports", 105.25, 105.75, 105.25)]))
    assert [p.role for p in found.processes if p.pid == 15] == [HELPER]
    assert found.seconds["helper imports"] == 0.5 and found.seconds["config"] == 0.5


def test_torn_and_foreign_lines_are_counted(tmp_path: Path):
    directory = write(tmp_path / "start", START)
    whole = read(directory).to_json()
    with (directory / "30.jsonl").open("a") as file:
        file.write(json.dumps(event(99, 20, "weights", 1, 2)) + "\n")  # of another pid
        file.write('[1, 2]\n{"pid": 30}\n' + json.dumps(START[8] | {"begin": float("nan")}) + "\n\xff\n")
        file.write(json.dumps(START[8] | {"end": 0.0}) + "\n" + json.dumps(START[8])[:40])  # backwards; torn
    (directory / "notes.txt").write_text("not ours")
    found = read(directory)
    assert found.skipped == 7 and found.to_json() == whole | {"skipped": 7}


def test_the_last_start_of_a_directory_is_read(tmp_path: Path):
    """Also when the pid has come again."""
    later = [
        one | {name: one[name] + 1000 for name in ("created", "begin", "end")} for one in START if one["pid"] == 10
    ]
    found = read(write(tmp_path / "start", [*START, *later]))
    assert len(found.processes) == 1 and found.total == 31 and found.skipped == len(START)


def test_a_file_of_too_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start_report, "_LINES", 3)
    assert read(write(tmp_path / "start", START)).skipped == len(START) - 3 * 3


def test_nothing_to_read_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(StorageError, match=r"no directory.*THAW_START_REPORT"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match=r"holds no report.*THAW_START_REPORT=start/ vllm serve"):
        read(tmp_path)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_it(tmp_path: Path):
    """As wide as it says, every span drawn within the chart, and nothing to complain about."""
    found = [Event(1, 0, "", 0.0, "imports", 0.0, 10.0), Event(1, 0, "", 0.0, "config", 10.0, 12.0)]
    found += [Event(2, 1, "EngineCore", 3.0, "engine init", 4.0, 9.0), Event(2, 1, "EngineCore", 3.0, "<b>", 5.0, 6.0)]
    page = tmp_path / "page.html"
    script = """<script>
      const chart = document.querySelector("svg").getBoundingClientRect();
      const bars = [...document.querySelectorAll("svg rect")].map((bar) => bar.getBoundingClientRect());
      const inside = bars.filter((b) => b.width > 0 && b.left >= chart.left && b.right <= chart.right + 1);
      document.title = `${bars.length} bars, ${inside.length} inside, ${document.querySelectorAll("b").length} bold`;
    </script></body>"""
    page.write_text(report(found).html().replace("</body>", script))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    ran = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True)
    assert "<title>4 bars, 4 inside, 0 bold</title>" in ran.stdout
