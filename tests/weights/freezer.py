"""A process that freezes on demand, each time in a copy of itself that can be killed.

``python -m tests.weights.freezer TARGET`` prints ``ready``. For each line ``VALUE`` on its input it freezes a module
whose every element is VALUE to TARGET, with force, and prints the id of the process that does it. That id stays taken
until another line comes; then it prints the exit status: 0, or 130 after Ctrl-C. Forking spares each freeze the seconds
that importing torch takes.
"""

import os
import signal
import sys

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
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = 1
            try:
                freeze_model(frozen, target, force=True)
                status = 0
            except KeyboardInterrupt:
                status = 130
            finally:
                os._exit(status)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
