import itertools
import random
import threading

import pytest

from thaw_vllm.errors import CorruptionError, StorageError
from thaw_vllm.format.chunks import RAW
from thaw_vllm.transport.checksum import xxh3
from thaw_vllm.transport.read import STEP, Piece, read
from thaw_vllm.transport.source import MemorySource

pytestmark = pytest.mark.usefixtures("no_leaks")

DATA = random.Random(1).randbytes(3 * STEP + 77)
CUTS = [0, 1, 5000, STEP, 2 * STEP + 1, len(DATA)]
SPANS = list(itertools.pairwise(CUTS))


def pieces(deliver=None, into=None, wrong=None):
    for number, (start, stop) in enumerate(SPANS):
        checksum = xxh3(memoryview(DATA[start:stop])) ^ (number == wrong)
        given = None if into is None else into[start:stop]
        yield Piece(
            start, stop - start, stop - start, RAW, checksum, f"piece {number}", given, deliver and deliver(number)
        )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("workers", [1, 4])
def test_into_memory(workers, verify):
    room = bytearray(len(DATA))
    read(MemorySource(DATA), pieces(into=memoryview(room)), workers=workers, verify=verify)
    assert room == DATA


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("workers", [1, 4])
def test_delivered(workers, verify):
    found = {}

    def deliver(number):
        return lambda data: found.update({number: bytes(data)})

    read(MemorySource(DATA), pieces(deliver), workers=workers, verify=verify)
    assert found == {number: DATA[start:stop] for number, (start, stop) in enumerate(SPANS)}


@pytest.mark.parametrize("workers", [1, 4])
def test_only_checked(workers):
    read(MemorySource(DATA), pieces(), workers=workers)
    with pytest.raises(CorruptionError):
        read(MemorySource(DATA), pieces(wrong=3), workers=workers)


@pytest.mark.parametrize("wrong", range(len(SPANS)))
def test_wrong_checksum_is_named_and_not_delivered(wrong):
    found = []

    def deliver(number):
        return lambda data: found.append(number)

    start, stop = SPANS[wrong]
    words = rf"'memory' is damaged: the checksum of piece {wrong} \(bytes {start} to {stop}\) does not agree"
    with pytest.raises(CorruptionError, match=words):
        read(MemorySource(DATA, "memory"), pieces(deliver, wrong=wrong), workers=1)
    assert found == list(range(wrong))
    read(MemorySource(DATA, "memory"), pieces(deliver, wrong=wrong), workers=1, verify=False)


@pytest.mark.parametrize("flip", [0, 4999, STEP + 5, 2 * STEP, len(DATA) - 1])
def test_every_byte_counts(flip):
    data = bytearray(DATA)
    data[flip] ^= 16
    with pytest.raises(CorruptionError):
        read(MemorySource(data), pieces(into=memoryview(bytearray(len(DATA)))), workers=2)


def test_source_that_ends_early():
    with pytest.raises(CorruptionError, match="bytes were needed"):
        read(MemorySource(DATA[:-1]), pieces(), workers=2)


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_reaches_the_end(workers):
    counted, lock = [], threading.Lock()

    def progress(count):
        with lock:
            counted.append(count)

    read(MemorySource(DATA), pieces(), workers=workers, progress=progress)
    assert sorted(counted) == sorted(stop - start for start, stop in SPANS)


@pytest.mark.parametrize("error", [StorageError("device"), MemoryError(), KeyboardInterrupt()])
def test_error_while_delivering(error):
    def deliver(number):
        def fail(data):
            raise error

        return fail

    with pytest.raises(type(error)):
        read(MemorySource(DATA), pieces(deliver), workers=4)
