"""Ranges of a source into device memory: many threads, each reading into its own slots and copying from them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import CorruptionError
from . import parallel
from .links import Link, Sums
from .plan import Step, steps
from .readers import Reader
from .staging import Staging

SLOT = 3 << 20
"""Bytes of a slot. Smaller ones stay in faster caches, but every step takes the interpreter lock twice, some 60 µs
among 16 threads: with 1 MiB that is the limit (14 GB/s), with 8 MiB memory is (33 to 47 GB/s, by the host). On two
H100 hosts 3 MiB with two slots a thread reached 46 to 47 GB/s, of 54 that the link bears."""
DEPTH = 2
"""Slots of one thread: one is being filled while the other is being copied."""


@dataclass(frozen=True, slots=True)
class Range:
    """A run of the source that goes to the link's range of the same number.

    Attributes:
        offset: absolute, in the source.
        length: bytes.
        wordsum: expected (docs/format.md, section 6).
        label: what a message calls it.
    """

    offset: int
    length: int
    wordsum: int
    label: str


def deliver(
    reader: Reader,
    name: str,
    ranges: Sequence[Range],
    link: Link,
    *,
    workers: int,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
    slot: int = SLOT,
) -> None:
    """Bring every range to its place and check it there. Staging memory is ``workers * DEPTH`` slots.

    Args:
        reader: reads the source.
        name: what messages call the source.
        ranges: in order of offset.
        link: whose ranges have the same numbers and lengths.
        workers: threads.
        verify: hold every range against its word sum, on the device, while others arrive.
        progress: called with the bytes that landed since the last call, in the calling thread.
        slot: bytes of a slot.

    Raises:
        CorruptionError: a range's bytes do not agree with its sum, or the source ends early. The bytes of that range
            and of others are in place then: nobody must use them.
        StorageError, DeviceError: reading or copying failed.
    """
    left = [found.length for found in ranges]
    complete: list[int] = []
    lock = threading.Lock()
    arrived = told = 0
    plan = parallel.Shared(steps(((r.offset, r.length) for r in ranges), slot - reader.margin))
    workers = max(1, min(workers, -(-sum(left) // slot)))

    def landed(step: Step) -> None:
        nonlocal arrived
        with lock:
            for cut in step.cuts:
                arrived += cut.length
                left[cut.range] -= cut.length
                if not left[cut.range]:
                    complete.append(cut.range)

    def body(stop: threading.Event) -> None:
        with lock:
            mine = spare.pop()
        with link.lane(mine, landed) as lane:
            for step in plan:
                if stop.is_set():
                    return
                room = lane.take()
                lane.send(step, reader.read(step.offset, step.length, room.view))
            lane.finish()

    with Staging(workers * DEPTH, slot) as staging, contextlib.ExitStack() as stack:
        sums: Sums | None = None
        spare = [staging.slots[at : at + DEPTH] for at in range(0, workers * DEPTH, DEPTH)]

        def meanwhile() -> None:
            nonlocal sums, told
            if verify and sums is None:  # made while the first bytes are on their way
                sums = stack.enter_context(link.sums())
            with lock:
                ready, here = complete[:], arrived
                complete.clear()
            if sums is not None and ready:
                sums.add(ready)
            if progress is not None and here > told:
                progress(here - told)
            told = here

        parallel.crew(body, workers, meanwhile)
        meanwhile()
        found = sums.results() if sums is not None else {}
    assert not any(left) and (not verify or len(found) == len(ranges)), "a range was passed over"
    for number, sum_ in sorted(found.items()):
        if sum_ != ranges[number].wordsum:
            raise damaged(name, ranges[number])


def damaged(name: str, found: Range) -> CorruptionError:
    """What to raise when the sum of a range of the source ``name`` is not the expected one."""
    return CorruptionError(
        f"{name!r} is damaged: the checksum of {found.label} (bytes {found.offset} to {found.offset + found.length}) "
        "does not agree; copy the file again or freeze again"
    )
