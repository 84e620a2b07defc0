"""Ranges of a source into device memory: many threads, each reading into its own slots and copying from them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..errors import CorruptionError, ThawError
from . import parallel
from .checksum import damaged
from .dispatch import dispatch
from .links import CudaLink, Link, Sums
from .plan import Step, steps
from .readers import Reader
from .reading_helpers import Helpers
from .staging import Slot, Staging

SLOT = 6 << 20
RING = 84 << 20
"""Bytes of a thread's slot, and of all slots together.

Measured on five H100 hosts with 16 cores, 16 GB from tmpfs. Every step of a thread takes the interpreter lock two or
three times, 60 to 100 µs among 16 threads: with slots of 1 MiB that is the limit (14 GB/s), with 3 MiB it can be (20 to
47, by the host). Beyond about 100 MiB in all, what was read is in memory and no longer in the processor's cache when it
is copied, and memory is the limit (16 slots of 8 MiB: 33 to 47). 12 to 14 threads with 6 MiB each were among the best
everywhere (38 to 45); a second slot a thread gained nothing."""


class Range(NamedTuple):
    """A run of the source that goes to the link's range of the same number.

    Attributes:
        offset: absolute, in the source.
        length: bytes there.
        wordsum: expected of the original bytes (docs/format.md, section 6).
        label: what a message calls it.
        coded: whether those are compressed.
    """

    offset: int
    length: int
    wordsum: int
    label: str
    coded: bool = False


def _damaged(name: str, found: Range) -> CorruptionError:
    return damaged(name, found.label, found.offset, found.length)


def deliver(
    reader: Reader,
    name: str,
    ranges: Sequence[Range],
    link: Link,
    *,
    workers: int,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
    admit: Callable[[int], bool] | None = None,
    landed: Callable[[int], None] | None = None,
    slot: int = SLOT,
    helpers: Helpers | None = None,
    damage: Callable[[str, Range], CorruptionError] = _damaged,
) -> bool:
    """Bring every range to its place and check it there. Staging memory is a slot a thread, RING in all.

    With helpers they read, and this thread copies; should they all end, threads do what is left.

    Args:
        reader: reads the source.
        name: what messages call the source.
        ranges: in order of offset.
        link: whose ranges have the same numbers and lengths.
        workers: threads.
        verify: hold every range against its word sum, on the device, while others arrive.
        progress: called with the bytes that landed since the last call, in the calling thread.
        admit: asked before the first byte of a range is read, by its number, in order, one call at a time, in any
            thread; a range that is refused is asked for again. Once admitted its place must be known to the link. It
            may also put the range in its place in ``ranges`` with its sum, which is looked at when all are there.
        landed: called with the number of a range that is in place, in the calling thread; not checked yet.
        slot: bytes of a slot.
        helpers: processes that read the reader's source, for a CudaLink and plain reads. The caller's to close. None
            reads by threads of this process.
        damage: what to raise for a range of the source of this name that does not agree with its sum.

    Returns:
        Whether helpers read all of it.

    Raises:
        CorruptionError: a range's bytes do not agree with its sum, or the source ends early. The bytes of that range
            and of others are in place then: nobody must use them.
        StorageError, DeviceError: reading or copying failed.
    """
    left = [found.length for found in ranges]
    complete: list[int] = []
    lock = threading.Lock()
    arrived = told = 0
    slot = helpers.slot if helpers is not None else slot
    workers = max(1, min(workers, RING // slot, -(-sum(left) // slot)))

    stop = threading.Event()

    def admitted() -> Iterator[tuple[int, int] | None]:
        for number, found in enumerate(ranges):
            for admits in (link.admits, admit) if admit is not None else (link.admits,):
                while not admits(number):
                    if stop.is_set():
                        return
                    yield None  # what has been admitted is read meanwhile: it may be what makes room
            if not found.length:
                with lock:
                    complete.append(number)
            yield found.offset, found.length

    plan = parallel.Shared(steps(admitted(), slot - reader.margin))

    def arrive(step: Step) -> None:
        nonlocal arrived
        whole = []
        with lock:
            for cut in step.cuts:
                arrived += cut.length
                left[cut.range] -= cut.length
                if not left[cut.range]:
                    whole.append(cut.range)
        for number in whole:
            link.landed(number)
        with lock:
            complete.extend(whole)

    def body(_: threading.Event) -> None:
        with lock:
            mine = spare.pop()
        with link.lane(mine) as lane:
            for step in plan:
                if stop.is_set():
                    return
                if step is None:
                    time.sleep(parallel.POLL / 4)
                    continue
                lane.send(step, reader.read(step.offset, step.length, mine.view))
                arrive(step)

    with contextlib.ExitStack() as stack:
        sums: Sums | None = None
        spare: list[Slot] = []

        def meanwhile() -> None:
            nonlocal sums, told
            if verify and sums is None:  # made while the first bytes are on their way
                sums = stack.enter_context(link.sums(len(ranges)))
            with lock:
                ready, here = complete[:], arrived
                complete.clear()
            if sums is not None and ready:
                sums.add(ready)
            if landed is not None:
                for number in ready:
                    landed(number)
            if progress is not None and here > told:
                progress(here - told)
            told = here

        whole = False
        if helpers is not None and isinstance(link, CudaLink):
            stack.enter_context(link.context.entered())
            whole = dispatch(iter(plan), helpers, link, arrive, meanwhile)
        if not whole:
            with Staging(workers, slot) as staging:
                spare += staging.slots
                parallel.crew(body, workers, meanwhile, stop=stop)
        meanwhile()
        link.settle()
        found = sums.results() if sums is not None else {}
    if any(left) or (verify and len(found) != len(ranges)):
        raise ThawError(f"{name!r} was not read whole, through a fault of thaw; please report it")
    for number, sum_ in sorted(found.items()):
        if sum_ != ranges[number].wordsum:
            raise damage(name, ranges[number])
    return whole
