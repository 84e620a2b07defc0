"""Processes below one, whatever they are called."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.zygote.running import alive, made, until

from thaw_vllm.errors import UsageError
from thaw_vllm.zygote import processes, sources

NAMED = """
import ctypes, time
ctypes.CDLL(None).prctl(15, "\u043c\u043e\u0434\u0435\u043b\u044c\u043d\u044b\u0439".encode(), 0, 0, 0)
print("ready", flush=True)
time.sleep(600)
"""
"""The kernel cuts the name in the middle of a character."""


def test_a_name_that_is_no_text():
    with subprocess.Popen([sys.executable, "-c", NAMED], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with open(f"/proc/{process.pid}/stat", "rb") as file, pytest.raises(UnicodeDecodeError):
            file.read().decode()
        assert process.pid in processes.children(os.getpid())
        assert process.pid in processes.below(os.getpid())
        process.kill()


def test_what_cannot_be_ended_is_left(monkeypatch, capfd):
    monkeypatch.setattr(processes, "send_all", lambda processes, number: None)
    monkeypatch.setattr(processes, "reap", dict)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        processes.end_all_below(os.getpid(), 0.1)
        assert alive(process.pid) and str(process.pid) in capfd.readouterr().err
        process.kill()


def test_files_written_since_the_imports_began():
    files = sources.loaded(0.0)
    assert files and set(files.values()) == {None}
    assert sources.changed(files) in files
    assert any(sources.loaded(float(2**40)).values())


@pytest.mark.parametrize("entries", ["src", "/tmp:", ":/tmp", "/tmp:src:/"])
def test_module_paths_that_mean_another_directory_elsewhere(entries: str):
    with made() as zygote, pytest.raises(UsageError, match="PYTHONPATH"):
        zygote.start(PYTHONPATH=entries)


def test_a_program_that_is_asked_to_end_at_once(interruptible: None):
    with made() as zygote:
        zygote.start()
        for _ in range(10):
            process = zygote.popen("-c", "import time; time.sleep(600)")
            until(lambda: zygote.status()["programs"], "the program")
            process.terminate()
            assert process.wait(60) == -15
            zygote.idle()
