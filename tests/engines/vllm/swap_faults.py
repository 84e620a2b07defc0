"""An engine that is killed in the middle of a change, or parked without privileges: swap_faults.py ASKED ANSWER.

Both are JSON files. Asked for are ``model``, the snapshots ``first`` and ``second``, ``engine_args``, a ``folder``,
whether it is the worker's parent that is killed (``core``), and what goes wrong: ``swap``, ``park``, ``parked``,
``restore``, ``fill``, or ``nothing``.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from swap_engine import alive, ask, digests, refused


def killed(pid, work, when):
    """What comes of work during which a process is killed, once ``when`` says so."""
    killing = threading.Thread(target=lambda: (when(), os.kill(pid, signal.SIGKILL)))
    killing.start()
    found = refused(work)
    killing.join()
    return found


def within(name):
    """Waits until the driver is in the middle of such a call."""
    from thaw_vllm.transport.process_checkpoint import Libcuda

    begun, original = threading.Event(), getattr(Libcuda, name)

    def call(self, pid):
        begun.set()
        return original(self, pid)

    setattr(Libcuda, name, call)
    return lambda: (begun.wait(), time.sleep(0.1))


def main(asked, answer):
    import thaw_vllm
    from thaw_vllm.zygote import processes

    faulthandler.dump_traceback_later(240, exit=True)  # says where it hangs, if it does
    asked = json.loads(Path(asked).read_text())
    llm = thaw_vllm.load(asked["model"], asked["first"], **asked["engine_args"])
    found, what = {"before": ask(llm)["answers"], "digests": digests(llm)}, asked["what"]
    (pid,) = llm.collective_rpc("thaw_test_pid")
    if asked.get("core"):
        pid = int(processes.stat(pid)[1])
    below = processes.below(os.getpid())
    found["processes"] = [one for one in below if b"resource_tracker" not in Path(f"/proc/{one}/cmdline").read_bytes()]
    flag = Path(asked["folder"], "flag")

    def hung():
        while not flag.exists():
            time.sleep(0.001)

    if what in ("swap", "fill"):
        llm.collective_rpc("thaw_test_hang", args=(str(flag),))
    if what == "swap":
        found["told"] = killed(pid, lambda: thaw_vllm.swap_weights(llm, asked["second"]), hung)
    elif what == "park":
        found["told"] = killed(pid, lambda: thaw_vllm.park(llm, driver=True), within("checkpoint"))
    else:
        parked = thaw_vllm.park(llm, driver=None if what == "nothing" else True)
        found["parked"] = asdict(parked)
        if what == "parked":
            os.kill(pid, signal.SIGKILL)
            found["told"] = refused(lambda: thaw_vllm.wake(llm, parked))
        elif what == "restore":
            found["told"] = killed(pid, lambda: thaw_vllm.wake(llm, parked), within("restore"))
        elif what == "fill":
            found["told"] = killed(pid, lambda: thaw_vllm.wake(llm, parked), hung)
        else:
            found["woken"] = asdict(thaw_vllm.wake(llm, parked))
            found["after"], found["digests after"] = ask(llm)["answers"], digests(llm)
    if what != "nothing":
        try:
            found["asked again"] = str(ask(llm))
        except Exception as error:
            found["asked again"] = type(error).__name__
        until = time.monotonic() + 60
        while any(map(alive, found["processes"])) and time.monotonic() < until:
            time.sleep(0.1)
        found["alive"] = [one for one in found["processes"] if alive(one)]
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
