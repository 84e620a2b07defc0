"""What helpers have read, copied to the GPU by one thread: who has a free slot gets a range, what is full is sent."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator

from . import parallel
from .cuda import Stream
from .links import CudaLink
from .numa import pinned_to
from .plan import Step
from .reading_helpers import Helper, Helpers

_STREAMS, _TOGETHER = 4, 4
"""Streams, and the most slots that are copied from on one of them before the next: a driver's call takes 5 to 10 µs,
and this way a slot needs one and a half of them, not three. Together they hold half of what helpers have."""

_END = Step(0, 0, ())
_SPINS = 8
"""Looks in vain after which other threads are let run, which takes 50 µs."""


def dispatch(
    plan: Iterator[Step | None],
    helpers: Helpers,
    link: CudaLink,
    arrive: Callable[[Step], None],
    meanwhile: Callable[[], None],
) -> bool:
    """Have helpers read every step of a plan, and copy each to its places. The caller has entered the link's context.

    Args:
        plan: steps no longer than the helpers' slots; taken from as slots come free. A None says: not now.
        helpers: stay the caller's.
        link: where to.
        arrive: called with a step that has landed.
        meanwhile: called every ``parallel.POLL`` seconds.

    Returns:
        Whether the whole plan has landed. If not, every helper has ended; what it was given has landed all the same.

    Raises:
        CorruptionError, StorageError, DeviceError, and what the callbacks raise; nothing is under way then.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned_to(link.cores))
        queues = [_Queue(link, found) for found in helpers.helpers]
        streams = [stack.enter_context(contextlib.closing(Stream(link.context, events=1))) for _ in range(_STREAMS)]
        idle, under_way = deque(streams), deque[tuple[Stream, list[tuple[_Queue, Step]]]]()
        turns = itertools.cycle(range(len(queues)))
        looked, rests = time.perf_counter(), 0
        while True:
            moved = False
            while under_way and under_way[0][0].passed(0):
                stream, landed = under_way.popleft()
                for queue, step in landed:
                    queue.landed += 1
                    arrive(step)
                idle.append(stream)
                moved = True
            if idle:
                first = next(turns)
                sent = _send(queues[first:] + queues[:first], idle[0])
                if sent:
                    stream = idle.popleft()
                    stream.mark(0)
                    under_way.append((stream, sent))
                    moved = True
            for queue in queues:
                moved = queue.give(plan) or moved
            if time.perf_counter() - looked > parallel.POLL:
                meanwhile()
                for found in helpers.helpers:
                    found.check()
                looked = time.perf_counter()
            if not moved:
                if all(queue.landed == queue.helper.given for queue in queues):
                    if any(queue.done for queue in queues):
                        return True
                    if all(queue.helper.ended for queue in queues):
                        return False
                rests += 1
                if rests % _SPINS == 0:
                    time.sleep(0)  # let other threads run


def _send(queues: list[_Queue], stream: Stream) -> list[tuple[_Queue, Step]]:
    """Copy from slots that are filled, a few of them."""
    sent: list[tuple[_Queue, Step]] = []
    for queue in queues:
        while len(sent) < _TOGETHER and (step := queue.send(stream)) is not None:
            sent.append((queue, step))
    return sent


class _Queue:
    """A helper's slots on their way: ``landed <= sent <= helper.filled <= helper.given`` steps, of all deliveries.

    Attributes:
        helper, landed: as above.
        done: the plan has no more steps.
    """

    def __init__(self, link: CudaLink, helper: Helper) -> None:
        self.helper, self.landed, self.done = helper, helper.given, False
        self._link, self._sent = link, helper.given
        self._tried = [False] * len(helper.slots)
        self._steps: list[Step | None] = [None] * len(helper.slots)

    def send(self, stream: Stream) -> Step | None:
        """Copy from the next slot if it has been filled, and page-locking it was tried."""
        if self._sent >= self.helper.filled:
            return None
        number = self._sent % len(self._steps)
        if not self._tried[number]:
            lock = self.helper.locks[number]
            if not lock.done():
                return None
            self._tried[number] = True
            self._link.refused(lock.result())
        step = self._steps[number]
        assert step is not None
        self.helper.windows[number].send(step, 0, self._link, stream)
        self._sent += 1
        return step

    def give(self, plan: Iterator[Step | None]) -> bool:
        """Have slots filled that are free; whether there were any, and steps for them."""
        before = self.helper.given
        while not self.helper.ended and not self.done and self.helper.given < self.landed + len(self._steps):
            step = next(plan, _END)
            if step is _END:
                self.done = True
            if step is None or step is _END:
                break
            self._steps[self.helper.given % len(self._steps)] = step
            self.helper.give(step.offset, step.length)
        return self.helper.given > before
