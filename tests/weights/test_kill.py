"""A freeze that is killed, or interrupted, at any moment: the old snapshot or the new one, whole."""

import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.weights.freezer import SIZES, module

from thaw_vllm import restore_model

ROOT = Path(__file__).resolve().parents[2]


class Freezer:
    """The other process; ``seconds`` is how long the fastest freeze took that no signal ended.

    Any single one, such as the first, may be slow by chance, and signals on its scale would all come too late.
    """

    def __init__(self, target):
        self.target = target
        command = [sys.executable, "-m", "tests.weights.freezer", target]
        # Without buffers, so that select() tells whether a line is there.
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.process.stdout.readline() == b"ready\n"
        self.seconds = math.inf
        for _ in range(3):
            assert self.freeze(1) == 0

    def freeze(self, value, send=None, moment=0.0):
        """Freeze ``value``, and send a signal after a part of the time that it takes; the exit status."""
        self.process.stdin.write(b"%d\n" % value)
        child = self._hear(b"begun")
        start = time.perf_counter()
        if send is not None and not select.select([self.process.stdout], [], [], moment * self.seconds)[0]:
            os.kill(child, send)  # a process that has ended still has its id
        status = self._hear(b"ended")
        if status == 0:
            self.seconds = min(self.seconds, time.perf_counter() - start)
        self.process.stdin.write(b"next\n")
        return status

    def _hear(self, what):
        word, number = self.process.stdout.readline().split()
        assert word == what
        return int(number)

    def value(self):
        """What the snapshot at the target holds, every bit of it checked."""
        thawed = module(0)
        restore_model(thawed, self.target)
        values = {float(t.min()) for t in thawed.buffers()} | {float(t.max()) for t in thawed.buffers()}
        (value,) = values
        return value

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def freezer(tmp_path, no_leaks):
    found = Freezer(tmp_path / "w.thaw")
    yield found
    found.close()
    for path in tmp_path.iterdir():  # they are large, and pytest keeps what lies there
        path.unlink()


def moment(rng):
    """Anywhere, and more often near the end, where files are synced and named."""
    return rng.choice((rng.uniform(0, 1.1), rng.uniform(0.8, 1.05)))


@pytest.mark.soak
def test_killed_at_any_moment(soak, freezer, parts, tmp_path):
    assert sum(SIZES) * 4 > 200_000_000
    held, ran, killed, left = 1, 0, 0, 0
    for case in soak(small=6, full=100):
        new = held + 1
        status = freezer.freeze(new, signal.SIGKILL, moment(case.random))
        found = freezer.value()
        assert status in (0, -9), case
        assert found == new if status == 0 else found in (held, new), (case, status, found)
        held = int(found)
        ran += 1
        killed += status == -9
        stale = parts(tmp_path)
        left += len(stale)
        assert len(stale) <= 1, case  # each removes what the one before it left
    assert freezer.freeze(held + 1) == 0
    assert not parts(tmp_path)
    assert freezer.value() == held + 1
    assert killed or ran < 4, "no freeze was killed before its end"
    assert left or ran < 4, "no killed freeze left a hidden file"


@pytest.mark.soak
def test_interrupted_at_any_moment(soak, freezer, parts, tmp_path):
    """Ctrl-C ends it soon, and removes the hidden file."""
    held, ran, interrupted = 1, 0, 0
    for case in soak(small=4, full=50):
        new = held + 1
        start = time.perf_counter()
        status = freezer.freeze(new, signal.SIGINT, case.random.uniform(0.05, 1.0))
        assert time.perf_counter() - start < 2 * freezer.seconds + 10
        found = freezer.value()
        assert status in (0, 130), case
        assert found == new if status == 0 else found in (held, new), (case, status, found)
        held = int(found)
        ran += 1
        interrupted += status == 130
        assert not parts(tmp_path), case
    assert interrupted or ran < 4, "no freeze was interrupted before its end"
