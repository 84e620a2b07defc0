"""What a helper process runs: read the ranges it is given into its slots of shared memory, and say so.

Run by path with an interpreter that has neither site packages nor our package (``python -I -S``). It imports the least
that does, so as to be there in milliseconds; ``reading_helpers`` is its other side.
"""

import mmap
import posix
import sys
import time

PAGE = 4096
"""Bytes of a helper's control page, made of 64-bit words: what it is told and what it tells, on cache lines apart."""
GIVEN, STOP = 0, 1
"""Written by the parent: how many ranges it has given so far; whether to end."""
FILLED, FAILED, AT, READY = 8, 9, 10, 11
"""Written by the helper: how many ranges are in their slots; why it cannot go on, and at which offset; whether its
slots have their pages.

FAILED is an errno, or ENDED when the file ends at AT."""
ENDED = 1 << 16
JOBS = 16
"""Word of the first slot's offset; its length follows, and then the other slots'."""

_POPULATE = 23
"""MADV_POPULATE_WRITE of <linux/mman.h>, since Linux 5.14: bring in pages at once, as if they had been written."""
_SPINS, _YIELDS = 500, 2500
"""Looks at GIVEN before a helper lets others run in between, 50 µs each, and before it sleeps: some milliseconds, more
than a range takes on its way."""
_NAP = 0.0005


def main(arguments: list[str]) -> None:
    """
    Args:
        arguments: the numbers of two descriptors, the shared memory and the file; the parent's process number; offsets
            of the control page and of the first slot in the shared memory; slots, and bytes of each.
    """
    shared, file, parent, control, first, slots, size = map(int, arguments)
    # What is listed, not a range: without close_range(2) that is a call for each of a billion numbers.
    for name in posix.listdir("/proc/self/fd"):
        if int(name) not in (shared, file):
            try:  # noqa: SIM105 - contextlib takes longer to import than all the rest
                posix.close(int(name))
            except OSError:  # the one that listed them
                pass
    mapped = mmap.mmap(shared, 0)
    try:  # noqa: SIM105 - as above
        mapped.madvise(_POPULATE, first, slots * size)
    except OSError:  # an older kernel: they come with the first range
        pass
    memory = memoryview(mapped)
    words = memory[control : control + PAGE].cast("Q")
    views = [memory[first + number * size : first + (number + 1) * size] for number in range(slots)]
    words[READY] = 1
    count = 0
    while True:
        looks = 0
        while words[GIVEN] <= count:
            looks += 1
            if words[STOP] or (looks > _YIELDS and posix.getppid() != parent):
                return
            if looks > _SPINS:
                time.sleep(_NAP if looks > _YIELDS else 0)
        slot = count % slots
        offset, length = words[JOBS + 2 * slot], words[JOBS + 2 * slot + 1]
        done = 0
        while done < length:
            try:
                got = posix.preadv(file, [views[slot][done:length]], offset + done)
            except OSError as error:
                words[AT] = offset + done
                words[FAILED] = error.errno or ENDED
                return
            if not got:
                words[AT] = offset + done
                words[FAILED] = ENDED
                return
            done += got
        count += 1
        words[FILLED] = count


if __name__ == "__main__":
    main(sys.argv[1:])
