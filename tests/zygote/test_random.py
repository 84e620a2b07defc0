"""Programs by the handful, and random signals at random moments to whoever is there: nothing is left of any."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest
from tests.zygote.running import Zygote, until
from tests.zygote.test_deaths import FAMILY

from thaw_vllm.zygote import processes

ENDS = "import time; time.sleep(0.1)"
NUMBERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGABRT, signal.SIGHUP)
STOPPED = (signal.SIGSTOP, signal.SIGCONT)


@pytest.mark.soak
def test_any_signal_to_anyone_at_any_moment(zygote: Zygote, soak: Callable):
    """But the zygote, and keepers are not stopped: one that is does nothing until it is continued."""
    hit: Counter[str] = Counter()
    first = zygote.pid
    for case in soak(small=12, full=500):
        random = case.random
        programs = [random.choice((("-c", FAMILY), ("-c", FAMILY, "deaf"), ("-c", FAMILY, "exit"), ("-c", ENDS)))]
        programs *= random.randrange(1, 4)
        clients = [zygote.popen(*random.choice((["--detach"], [], [])), *program) for program in programs]
        for _ in range(random.randrange(4)):
            time.sleep(random.choice((0, random.uniform(0, 0.5))))
            keepers = processes.children(zygote.pid)
            others = sorted({*processes.below(zygote.pid)} - {*keepers})
            there = {"client": [client.pid for client in clients if client.poll() is None]}
            there |= {"keeper": keepers, "program or below": others}
            kind = random.choice([kind for kind, found in there.items() if found] or [""])
            if kind:
                numbers = NUMBERS if kind == "keeper" else NUMBERS + STOPPED
                processes.send_all([random.choice(there[kind])], random.choice(numbers))
                hit[kind] += 1
        processes.send_all(zygote.left(), signal.SIGCONT)
        for client in clients:
            client.send_signal(random.choice((signal.SIGKILL, signal.SIGTERM)))
        until(lambda: _none_left(zygote), "programs to end that are asked to")
        for client in clients:
            client.communicate(timeout=60)
        zygote.idle()
        assert zygote.pid == first == zygote.status()["pid"], case
    assert zygote.run("-c", "print(1)").stdout == "1\n"
    assert len(hit) == 3 or sum(hit.values()) < 20, hit


def _none_left(zygote: Zygote) -> bool:
    """Detached programs have no client that could be ended, and deaf ones do not end for a signal to theirs."""
    processes.send_all(processes.children(zygote.pid), signal.SIGTERM)
    return not zygote.left()
