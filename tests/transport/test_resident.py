import contextlib
import os
import random
import time

import pytest

from thaw_vllm.errors import CorruptionError, ReplacedError, StorageError
from thaw_vllm.transport import resident
from thaw_vllm.transport.medium import in_memory
from thaw_vllm.transport.pipeline import Range
from thaw_vllm.transport.readers import ROUTES, choose
from thaw_vllm.transport.resident import Locked, Resident
from thaw_vllm.transport.source import FileSource, read_bytes
from thaw_vllm.transport.straight import joined

pytestmark = pytest.mark.usefixtures("no_leaks")

DATA = random.Random(9).randbytes(300_001)


@contextlib.contextmanager
def held(path, route="auto", workers=3):
    with FileSource(path) as file, contextlib.closing(choose(file, route)) as reader:
        found = Resident(file, reader, None, workers)
        try:
            yield found
        finally:
            found.close()


@pytest.fixture
def mapped(memory_path):
    """A file on tmpfs."""
    path = memory_path / "f"
    path.write_bytes(DATA)
    with FileSource(path) as file:
        if not in_memory(file.descriptor):
            pytest.skip("no tmpfs")
    return path


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A file that counts as one on a disk; read in small tasks."""
    path = tmp_path / "f"
    path.write_bytes(DATA)
    monkeypatch.setattr(resident, "in_memory", lambda _: False)
    monkeypatch.setattr(resident, "TASK", 16 * 4096)
    return path


def check(found):
    assert found.size == len(DATA)
    assert found.locked is None
    for offset, length in [(0, len(DATA)), (1, 70_000), (len(DATA) - 3, 3), (len(DATA), 0), (65_536, 65_536)]:
        assert read_bytes(found, offset, length) == DATA[offset : offset + length]
    with pytest.raises(CorruptionError, match="bytes were needed"):
        read_bytes(found, 1, len(DATA))
    found.check_unchanged()


def test_file_in_memory_is_mapped(mapped):
    with held(mapped) as found:
        assert found.why == "the file is on tmpfs and is mapped as it is"
        assert found.name == str(mapped)
        check(found)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("workers", [1, 4])
def test_other_file_is_read_into_memory_of_its_own(copied, route, workers):
    with held(copied, route, workers) as found:
        assert found.why.startswith("read into memory of its own; ")
        check(found)
        copied.write_bytes(b"other")  # nobody minds any more
        check(found)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 16 * 4096, 16 * 4096 + 1])
def test_sizes(copied, size):
    copied.write_bytes(DATA[:size])
    with held(copied) as found:
        assert read_bytes(found, 0, size) == DATA[:size]


def test_empty_file(tmp_path, memory_path):
    for directory in (tmp_path, memory_path):
        (directory / "empty").touch()
        with held(directory / "empty") as found:
            assert found.size == 0
            assert read_bytes(found, 0, 0) == b""


@pytest.mark.parametrize("kind", ["mapped", "copied"])
def test_closed_twice(kind, request):
    with held(request.getfixturevalue(kind)) as found:
        found.close()
        found.close()
        with pytest.raises(ValueError, match="released"):
            read_bytes(found, 0, 1)


@pytest.mark.parametrize("how", ["byte", "cut", "emptied", "grown"])
def test_mapped_file_that_was_written_to(mapped, how):
    """Cut off memory is not touched: that would end the process."""
    with held(mapped) as found:
        time.sleep(0.02)  # more than the file system's clock tick
        if how == "byte":
            with mapped.open("r+b") as file:
                file.write(bytes([DATA[0] ^ 1]))
        else:
            os.truncate(mapped, {"cut": 5000, "emptied": 0, "grown": len(DATA) + 1}[how])
        with pytest.raises(ReplacedError, match="was written to"):
            found.check_unchanged()
        with pytest.raises(ReplacedError, match="was written to"):
            read_bytes(found, 200_000, 100_000)


def test_mapped_file_that_was_replaced_by_name(mapped):
    with held(mapped) as found:
        (mapped.parent / "other").write_bytes(b"x")
        os.replace(mapped.parent / "other", mapped)
        check(found)


@pytest.mark.parametrize("how", ["cut", "written"])
def test_file_that_changes_while_it_is_copied(copied, how):
    with FileSource(copied) as file, contextlib.closing(choose(file)) as reader:
        real = reader.read

        def read(offset, length, view):
            if offset:
                time.sleep(0.02)
                if how == "cut":
                    os.truncate(copied, 70_000)
                else:
                    os.utime(copied)
            return real(offset, length, view)

        reader.read = read
        with pytest.raises((ReplacedError, CorruptionError)) as raised:
            Resident(file, reader, None, 2)
    assert str(copied) in str(raised.value)


def test_no_memory(copied, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(resident.mmap, "mmap", refuse)
    with pytest.raises(StorageError, match=r"no memory for the 0\.00 GB of '.*': .*Cannot"), held(copied):
        pass


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 1), (0, 10), (9, 1), (9, 2), (3, 27), (10, 20), (25, 5)])
def test_pieces_stay_within_locked_parts(monkeypatch, offset, length):
    monkeypatch.setattr(resident, "LOCK", 10)
    memory = Locked.__new__(Locked)
    memory.address = 1000
    at = 1000 + offset
    for address, size in memory.pieces(offset, length):
        assert address == at
        assert size > 0
        assert (address - 1000) // 10 == (address - 1000 + size - 1) // 10
        at += size
    assert at == 1000 + offset + length


def test_copies_end_where_a_tensor_ends():
    """Two allocations may lie side by side, and CUDA refuses a copy from one into the other."""
    ranges = [Range(0, 10, 0, "a"), Range(10, 10, 0, "a"), Range(20, 10, 0, "b"), Range(40, 10, 0, "b")]
    runs = [(100, 10), (110, 10), (120, 10), (130, 10)]
    assert list(joined(ranges, runs)) == [(100, 0, 20), (120, 20, 10), (130, 40, 10)]
