"""A process is ended with everything that it has started."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from thaw_vllm.engines.vllm import ending, fresh
from thaw_vllm.zygote.processes import of_group

SLEEPER = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', '{}']); print(p.pid, flush=True)"
SLEEPS = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def started(inner, rest):
    leader = subprocess.Popen(
        [sys.executable, "-c", f"{SLEEPER.format(inner)}; {rest}"], stdout=subprocess.PIPE, start_new_session=True
    )
    with leader.stdout:
        leader.stdout.readline()
    return leader


@pytest.mark.parametrize("inner", [SLEEPS, DEAF])
@pytest.mark.parametrize("rest", ["time.sleep(600)", "sys.exit(3)"])
def test_nothing_is_left(inner, rest, monkeypatch):
    monkeypatch.setattr(ending, "GRACE", 0.5)
    leader = started(inner, rest)
    time.sleep(0.3)  # until it is deaf
    if "exit" in rest:
        os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
    ending.end_group(leader)
    assert leader.returncode == (3 if "exit" in rest else -signal.SIGTERM)
    assert not of_group(leader.pid)


def test_ctrl_c_leaves_no_process(monkeypatch, interruptible):
    """In place of an engine: a process whose child would outlive it."""
    leaders, real = [], subprocess.Popen

    def popen(command, **how):
        leaders.append(real([sys.executable, "-c", f"{SLEEPER.format(SLEEPS)}; time.sleep(600)"], **how))
        return leaders[-1]

    monkeypatch.setattr(fresh.subprocess, "Popen", popen)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fresh.run("ask", model="M", snapshot=None, engine_args={})
    timer.join()
    (leader,) = leaders
    assert leader.returncode is not None and not of_group(leader.pid)
