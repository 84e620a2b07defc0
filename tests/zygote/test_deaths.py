"""Every way in which a client, a program, its keeper and the zygote end; nothing is left of what should have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tests.zygote.running import COMMAND, Zygote, alive, state, until

from thaw_vllm.zygote import processes

FAMILY = """
import os, signal, subprocess, sys, time
deaf = "deaf" in sys.argv
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
found = [os.getpid()]
for options in ({}, {"start_new_session": True}, {"env": {}}):
    child = subprocess.Popen(sleep, stdout=subprocess.PIPE, **options)
    child.stdout.readline()
    found.append(child.pid)
if not os.fork():  # a daemon: its parent has ended
    os.setsid()
    if (pid := os.fork()):
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    os._exit(0)
os.wait()
print(*found, flush=True)
if "exit" in sys.argv:
    os._exit(9) if "_exit" in sys.argv else sys.exit(9)
time.sleep(600)
"""


class Family:
    """A program with children in its group, in sessions of their own, and one that was left by its parent."""

    def __init__(self, zygote: Zygote, *arguments: str) -> None:
        self.client = zygote.popen("-c", FAMILY, *arguments)
        line = self.client.stdout.readline()
        assert line, self.client.stderr.read()
        self.program, *self.children = map(int, line.split())
        if "exit" not in arguments:
            assert len(zygote.left()) == 7, "client, keeper, program, three children, a daemon"
            (self.keeper,) = processes.children(zygote.pid)

    def ended(self, code: int) -> str:
        """The client's exit code was this; what it said."""
        _, said = self.client.communicate(timeout=60)
        assert self.client.returncode == code, said
        return said


@pytest.mark.parametrize("deaf", [[], ["deaf"]], ids=["", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_client_is_killed(zygote: Zygote, deaf: list[str], number: int):
    family = Family(zygote, *deaf)
    family.client.send_signal(number)
    family.ended(-number)
    zygote.all_gone()


@pytest.mark.parametrize("how", [[], ["_exit"]], ids=["exit", "_exit"])
def test_program_leaves_children(zygote: Zygote, how: list[str]):
    """The client is there until they have ended."""
    family = Family(zygote, "exit", *how)
    family.ended(9)
    assert not zygote.left_of_programs()


def test_program_is_killed(zygote: Zygote):
    family = Family(zygote)
    os.kill(family.program, signal.SIGKILL)
    family.ended(-signal.SIGKILL)
    assert not zygote.left_of_programs()


@pytest.mark.parametrize("deaf", [[], ["deaf"]], ids=["", "deaf"])
def test_keeper_is_killed(zygote: Zygote, deaf: list[str]):
    family = Family(zygote, *deaf)
    os.kill(family.keeper, signal.SIGKILL)
    assert "keeper was killed" in family.ended(1)
    zygote.all_gone()
    assert zygote.run("-c", "print(1)").stdout == "1\n"


@pytest.mark.parametrize("deaf", [[], ["deaf"]], ids=["", "deaf"])
def test_keeper_is_asked_to_end(zygote: Zygote, deaf: list[str]):
    family = Family(zygote, *deaf)
    os.kill(family.keeper, signal.SIGTERM)
    family.ended(-signal.SIGKILL if deaf else -signal.SIGTERM)
    assert not zygote.left_of_programs()


def test_another_program_is_left_alone(zygote: Zygote):
    """One keeper's death ends its own program and no other."""
    other = zygote.popen("-c", "import os; print(os.getpid(), flush=True); print(input())", stdin=subprocess.PIPE)
    pid = int(other.stdout.readline())
    client = zygote.popen("-c", "import time; print(flush=True); time.sleep(600)")
    client.stdout.readline()
    (keeper,) = [p["keeper"] for p in zygote.status()["programs"] if p["pid"] != pid]
    os.kill(keeper, signal.SIGKILL)
    client.communicate(timeout=60)
    until(lambda: len(zygote.status()["programs"]) == 1)
    assert other.communicate("still here\n", timeout=60)[0] == "still here\n" and other.returncode == 0


def test_stopped_program_is_ended(zygote: Zygote):
    family = Family(zygote)
    os.kill(family.program, signal.SIGSTOP)
    family.client.kill()
    family.ended(-signal.SIGKILL)
    zygote.all_gone()


def test_detached(zygote: Zygote, tmp_path):
    code = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.02)\n"
    code += "open('done', 'w').write(str(os.getpid()))"
    client = zygote.popen("--detach", "-c", code, cwd=tmp_path)
    assert client.wait(60) == 0
    pid = int(client.stdout.readline())
    (about,) = zygote.status()["programs"]
    assert alive(pid) and about["pid"] == pid and about["detached"] and about["arguments"] == ["-c"]
    (tmp_path / "go").touch()
    until(lambda: not alive(pid))
    assert (tmp_path / "done").read_text() == str(pid)
    client.communicate()


def test_detached_leaves_children(zygote: Zygote):
    """They are ended with nobody there to be told."""
    client = zygote.popen("--detach", "-c", FAMILY, "exit")
    assert client.wait(60) == 0
    assert int(client.stdout.readline())
    children = list(map(int, client.stdout.readline().split()))
    assert len(children) == 4
    zygote.all_gone()
    client.communicate()


class TestZygote:
    def talk(self, zygote: Zygote) -> subprocess.Popen:
        process = zygote.popen("-c", "print('ready', flush=True); print(input())", stdin=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        return process

    def test_is_killed(self, own: Zygote):
        own.start()
        process = self.talk(own)
        first = own.pid
        os.kill(own.pid, signal.SIGKILL)
        until(lambda: state(first) is None)  # nor does it stay in the table of processes
        assert own.start() != first
        assert own.run("-c", "print(1)").stdout == "1\n"
        assert process.communicate("goes on\n", timeout=60)[0] == "goes on\n" and process.returncode == 0

    def test_is_killed_and_client_then(self, own: Zygote):
        """A keeper needs no zygote to do its work."""
        own.start()
        family = Family(own)
        os.kill(own.pid, signal.SIGKILL)
        family.client.kill()
        family.ended(-signal.SIGKILL)
        own.all_gone()

    @pytest.mark.parametrize("how", ["command", "signal"])
    def test_is_stopped(self, own: Zygote, how: str):
        own.start()
        process = self.talk(own)
        if how == "command":
            ran = subprocess.run([*COMMAND, "zygote", "stop"], capture_output=True, text=True, timeout=60)
            assert ran.stdout == "stopped; 1 program goes on\n" and ran.returncode == 0, ran.stderr
        else:
            os.kill(own.pid, signal.SIGTERM)
        until(lambda: state(own.pid) is None)
        assert not own.place.socket.exists()
        again = subprocess.run([*COMMAND, "zygote", "stop"], capture_output=True, text=True, timeout=60)
        assert again.returncode == 2 and "no zygote 'default' runs; thaw zygote start" in again.stderr
        process.send_signal(signal.SIGTSTP)
        process.send_signal(signal.SIGCONT)
        assert process.communicate("goes on\n", timeout=60)[0] == "goes on\n" and process.returncode == 0

    def test_starter_is_interrupted(self, own: Zygote, tmp_path):
        """Ctrl-C while it imports: no zygote is left."""
        (tmp_path / "slow.py").write_text("import time; print('slow', flush=True); time.sleep(600)")
        code = "import sys; from thaw_vllm.zygote import start, place; start.VLLM = 'tests.zygote.light'\n"
        code += "start.start(place.place(), imports=['slow'], models=[])"
        environment = os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{tmp_path}"}
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
        until(lambda: own.place.log.exists() and "slow" in own.place.log.read_text())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        until(lambda: not own.left())
        own.start()

    def test_is_left_by_its_starter(self, own: Zygote):
        """It has a session of its own, and none of its starter's files."""
        own.start()
        time.sleep(0.1)
        assert os.getsid(own.pid) == own.pid and os.readlink(f"/proc/{own.pid}/cwd") == "/"
        own.idle()
