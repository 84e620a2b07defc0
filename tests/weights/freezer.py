"""A process that freezes on demand, each time in a copy of itself that can be killed.

``python -m tests.weights.freezer TARGET`` prints ``ready``. For each line ``VALUE`` on its input a process begins that
freezes a module whose every element is VALUE to TARGET, with force. It prints ``begun ID``, its id, once it can be
interrupted; when it ends, ``ended STATUS`` is printed: 0, or 130 after Ctrl-C. The id stays taken until another line
comes. Forking spares each freeze the seconds that importing torch takes.
"""

import os
import signal
import sys
import traceback

import torch

from thaw_vllm import freeze_model

SIZES = [13_000_000] * 3 + [3_000_001] * 4 + [1]
"""Elements of four bytes: about 200 MB."""


def module(value):
    found = torch.nn.Module()
    for number, size in enumerate(SIZES):
        found.register_buffer(f"t{number}", torch.full((size,), float(value)))
    return found


def main():
    target = sys.argv[1]
    torch.set_num_threads(1)  # or the copies would wait for threads that they do not have
    print("ready", flush=True)
    for line in sys.stdin:
        frozen = module(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                print("begun", os.getpid(), flush=True)
                freeze_model(frozen, target, force=True)
                status = 0
            except KeyboardInterrupt:
                status = 130
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print("ended", ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
