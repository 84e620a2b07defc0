"""What helper processes run: read the ranges they are given into their slots of shared memory, and say so.

Run by path with an interpreter that has neither site packages nor our package (``python -I -S``). It imports the least
that does, so as to be there in milliseconds; the first of them forks the others, which takes a tenth of starting them.
``reading_helpers`` is its other side.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import mmap
import posix
import sys
import time

PAGE = 4096
"""Bytes of a helper's control page, made of 64-bit words: what it is told and what it tells, on cache lines apart."""
GIVEN, OVER = 0, 1
"""Written by the parent: how many ranges it has given so far; how many deliveries are over."""
FILLED, FAILED, AT = 8, 9, 10
"""Written by the helper: how many ranges are in their slots; why it cannot go on, and at which offset.

FAILED is an errno, or ENDED when the file ends at AT."""
ENDED = 1 << 16
JOBS = 16
"""Word of the first slot's offset; its length follows, and then the other slots'."""

PLAIN, LISTED = b"\0", b"\1"
"""What comes with the descriptor of a delivery: it is of the file to read, or of a list of files (``files.Files``)."""

_POPULATE = 23
"""MADV_POPULATE_WRITE of <linux/mman.h>, since Linux 5.14: bring in pages at once, as if they had been written."""
_SPINS, _YIELDS = 500, 2500
"""Looks at GIVEN before a helper lets others run in between, 50 µs each, and before it sleeps: some milliseconds, more
than a range takes on its way."""
_NAP = 0.0005


def main(arguments: list[str]) -> None:
    """
    Args:
        arguments: the number of the shared memory's descriptor, which those of the helpers' sockets follow; helpers;
            offset of the first slot in the shared memory; slots of each helper, and bytes of each.
    """
    shared, count, first, slots, size = map(int, arguments)
    lines = range(shared + 1, shared + 1 + count)
    # What is listed, not a range: without close_range(2) that is a call for each of a billion numbers.
    for name in posix.listdir("/proc/self/fd"):
        if int(name) != shared and int(name) not in lines:
            _close(int(name))
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # who ended is gone, and nobody has to wait for it
    own = 0
    for number in range(1, count):
        try:
            child = posix.fork()
        except OSError:  # the socket that nobody holds says so
            _close(lines[number])
            continue
        if not child:
            own = number
            break
    for number in range(count):
        if number != own:
            _close(lines[number])
    line = _socket.socket(fileno=lines[own])
    try:
        _serve(shared, line, own * PAGE, first + own * slots * size, slots, size)
    finally:
        line.close()
        try:  # noqa: SIM105 - see below
            posix.wait()  # for all of them, since SIGCHLD is ignored: then none is left to others to wait for
        except OSError:  # there are none any more
            pass


def _serve(shared: int, line: _socket.socket, control: int, first: int, slots: int, size: int) -> None:
    """Read what comes on the socket, a file or a list of them for each delivery, until its other end is closed."""
    mapped = mmap.mmap(shared, 0)
    memory = memoryview(mapped)
    words = memory[control : control + PAGE].cast("Q")
    views = [memory[first + number * size : first + (number + 1) * size] for number in range(slots)]
    done = deliveries = 0
    while True:
        said, carried, _, _ = line.recvmsg(1, _socket.CMSG_SPACE(4))
        if not said:
            return
        file = int.from_bytes(carried[0][2][:4], sys.byteorder)
        stride, paths = _listed(file) if said == LISTED else (0, [])
        deliveries += 1
        while _given(words, done, deliveries, line):
            slot = done % slots
            if done < slots:
                _populate(mapped, first + slot * size, size)
            job = (views[slot], words[JOBS + 2 * slot], words[JOBS + 2 * slot + 1], words)
            if not (_read_of(paths, stride, *job) if paths else _read(file, *job)):
                return
            done += 1
            words[FILLED] = done
        _close(file)


def _populate(mapped: mmap.mmap, at: int, size: int) -> None:
    """Bring in a slot's pages before its first range. The parent is taking them, but this process sees none yet."""
    try:  # noqa: SIM105 - see main
        mapped.madvise(_POPULATE, at, size)
    except OSError:  # an older kernel: they come with the range
        pass


def _given(words: memoryview, done: int, delivery: int, line: _socket.socket) -> bool:
    """Wait for another range; False when the delivery is over."""
    looks = 0
    while words[GIVEN] <= done:
        looks += 1
        if words[OVER] >= delivery:
            return False
        if looks > _YIELDS and _gone(line):
            sys.exit()
        if looks > _SPINS:
            time.sleep(_NAP if looks > _YIELDS else 0)
    return bool(words[OVER] < delivery)  # looked at last: else the range may be the next delivery's, of another file


def _gone(line: _socket.socket) -> bool:
    """Whether the other end is closed."""
    try:
        return not line.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    except OSError:
        return False


def _listed(file: int) -> tuple[int, list[bytes]]:
    """How far the files of a list lie apart, and their paths."""
    stride, *paths = posix.pread(file, posix.fstat(file).st_size, 0).split(b"\0")
    return int(stride), paths


def _read_of(paths: list[bytes], stride: int, view: memoryview, offset: int, length: int, words: memoryview) -> bool:
    """A range of one of several files, as ``_read``."""
    number, at = divmod(offset, stride)
    try:
        file = posix.open(paths[number], posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError as error:
        words[AT] = offset
        words[FAILED] = error.errno or ENDED
        return False
    try:
        return _read(file, view, at, length, words, offset - at)
    finally:
        _close(file)


def _read(file: int, view: memoryview, offset: int, length: int, words: memoryview, first: int = 0) -> bool:
    """A range into the beginning of a slot; False when that failed, and the words say why.

    Args:
        first: where in the source the file begins.
    """
    done = 0
    while done < length:
        try:
            got = posix.preadv(file, [view[done:length]], offset + done)
        except OSError as error:
            words[AT] = first + offset + done
            words[FAILED] = error.errno or ENDED
            return False
        if not got:
            words[AT] = first + offset + done
            words[FAILED] = ENDED
            return False
        done += got
    return True


def _close(descriptor: int) -> None:
    try:  # noqa: SIM105 - contextlib takes longer to import than all the rest
        posix.close(descriptor)
    except OSError:  # the one that listed them, or closed before
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
