"""The CUDA state of a process, off the GPU and back: what it holds there is equal, and meanwhile the GPU is free of it.

Wants the GPU for itself: what other processes take meanwhile counts in nvidia-smi's sum.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from thaw_vllm.errors import DeviceError
from thaw_vllm.transport import process_checkpoint
from thaw_vllm.transport.process_checkpoint import park, state, wake

MIB = 64
"""What each process holds on the GPU, beside its context."""

CHILD = f"""
import sys, torch
expected = torch.randint(0, 256, ({MIB} << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
held = expected.cuda()
torch.cuda.synchronize()
print("ready", flush=True)
for _ in sys.stdin:
    print("equal" if torch.equal(held.cpu(), expected) else "different", flush=True)
    held.add_(1)
    expected.add_(1)
    torch.cuda.synchronize()
    print("added", flush=True)
"""


class Child:
    """A process that holds a tensor, changes it when asked, and says whether it is what it should be."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.pid = process, process.pid

    def ask(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def is_equal(self) -> bool:
        self.ask()
        return [self.said(), self.said()] == ["equal", "added"]


@contextmanager
def child() -> Iterator[Child]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            made = Child(process)
            assert made.said() == "ready"
            yield made
        finally:
            process.kill()


def used() -> int:
    """MiB in use on all GPUs."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def parked(*pids: int) -> None:
    try:
        park(pids, timeout=60)
    except DeviceError as error:
        if "NOT_PERMITTED" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def supported() -> None:
    lacking = process_checkpoint.unsupported()
    if lacking:
        pytest.skip(lacking)


def test_off_the_gpu_and_back() -> None:
    with child() as held:
        assert state(held.pid) == "running" and held.is_equal()
        for _ in range(2):
            before = used()
            parked(held.pid)
            assert state(held.pid) == "checkpointed"
            asleep = used()
            assert before - asleep >= MIB
            park([held.pid], timeout=60)
            assert state(held.pid) == "checkpointed" and used() - asleep < MIB
            wake([held.pid])
            assert state(held.pid) == "running" and used() - asleep >= MIB
            wake([held.pid])
            assert held.is_equal()


def test_what_it_asks_of_the_gpu_waits() -> None:
    with child() as held:
        parked(held.pid)
        held.ask()
        assert state(held.pid) == "checkpointed"
        wake([held.pid])
        assert held.said() == "equal" and held.said() == "added" and held.is_equal()


def test_several_at_once() -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(child()) for _ in range(2)]
        pids, before = [held.pid for held in children], used()
        parked(*pids)
        assert [state(pid) for pid in pids] == ["checkpointed"] * 2 and before - used() >= 2 * MIB
        wake(pids)
        assert [held.is_equal() for held in children] == [True, True]


def test_one_that_cannot_leaves_the_other_running() -> None:
    with child() as held, subprocess.Popen(["sleep", "600"]) as other:
        try:
            parked(held.pid)
            wake([held.pid])
            with pytest.raises(DeviceError, match=f"process {other.pid} cannot"):
                park([held.pid, other.pid], timeout=60)
            assert state(held.pid) == "running" and held.is_equal()
        finally:
            other.kill()
