"""What a server prints: the end of it is told, whatever becomes of the file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.disks import fill, small_disk
from tests.serve.loops import event_loops

from thaw_vllm.serve import log as subject
from thaw_vllm.serve.log import ServerLog


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[None]:
    with event_loops(request.param):
        yield


def printed(path: Path, program: str, *, ends: bool = True) -> str:
    """What is told of a program."""

    async def work() -> str:
        log = ServerLog(path)
        output = await log.open()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=output, stderr=output)
        os.close(output)
        await process.wait()
        told = await log.why("it ended")
        await log.close()
        return told

    return asyncio.run(work())


def test_a_file_of_the_users_alone_and_its_last_lines(tmp_path: Path):
    told = printed(tmp_path / "log", "for i in range(100): print('line', i)")
    assert told.split("; ") == [f"it ended (log: {tmp_path / 'log'})", *(f"line {i}" for i in range(88, 100))]
    assert (tmp_path / "log").read_text().splitlines() == [f"line {i}" for i in range(100)]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_lines_that_say_why(tmp_path: Path):
    told = printed(tmp_path / "log", "print('x'); print('ValueError: \\x1b[31mno room'); print('WARNING: Warning: y')")
    assert told == f"it ended (log: {tmp_path / 'log'}); ValueError: no room"


def test_the_cause_rather_than_what_points_to_it(tmp_path: Path):
    said = ["(EngineCore pid=3) ERROR x.py:7] thaw_vllm.errors.MismatchError: it holds another model"]
    said += ["Traceback (most recent call last):", "RuntimeError: Engine core failed. See root cause above. Failed: {}"]
    assert printed(tmp_path / "log", f"print({chr(10).join(said)!r})").split("; ")[1] == said[0]


def test_it_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "MOST", 100_000)
    monkeypatch.setattr(subject, "KEPT", 1000)
    printed(tmp_path / "log", "for i in range(50000): print(f'{i:09d}')")
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["log", "log.1"]
    assert all(path.stat().st_size < 100_000 + 65536 for path in files)
    _, *whole = ((tmp_path / "log.1").read_text() + (tmp_path / "log").read_text()).splitlines()
    assert whole == [f"{i:09d}" for i in range(50000 - len(whole), 50000)], "the end, without a gap"


def test_what_it_has_started_may_print_on(tmp_path: Path):
    program = "import subprocess, sys; print('started', flush=True); subprocess.Popen(['sleep', '30'])"
    try:
        assert printed(tmp_path / "log", program).endswith("started")
    finally:
        subprocess.run(["pkill", "-f", "^sleep 30$"], check=False)


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_or_none_takes_the_file_and_not_the_program(tmp_path: Path, there: bool):
    program = "for i in range(1000): print('line', i, flush=True)"
    with small_disk(tmp_path / "full") as folder:
        fill(folder)
        path = folder / "log" if there else tmp_path / "nowhere" / "log"
        assert printed(path, program).endswith("line 998; line 999")
