import contextlib
import errno
import mmap
import os
import random
import threading

import pytest

from thaw_vllm.errors import CorruptionError, StorageError, UsageError
from thaw_vllm.transport import medium, readers
from thaw_vllm.transport.medium import in_memory
from thaw_vllm.transport.plan import BLOCK
from thaw_vllm.transport.readers import Cached, Direct, Through, choose
from thaw_vllm.transport.source import FileSource, MemorySource, read_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZES = [5 * BLOCK + 777, 4 * BLOCK, 700]
"""No multiple of a block, one, and less than one."""
DATA = {size: random.Random(size).randbytes(size) for size in SIZES}
CANARY = b"\xa5"


def room(length):
    """Memory aligned to a block, full of canaries."""
    found = memoryview(mmap.mmap(-1, length + 3 * BLOCK))
    found[:] = CANARY * len(found)
    return found


def got(reader, offset, length):
    """What a read brings; nothing beyond its margin is written."""
    view = room(length)
    head = reader.read(offset, length, view[: length + reader.margin])
    assert 0 <= head <= reader.margin
    assert view[length + reader.margin :] == CANARY * (3 * BLOCK - reader.margin)
    return bytes(view[head : head + length])


def error(number):
    return OSError(number, os.strerror(number))


@pytest.fixture(params=SIZES)
def data(request):
    return DATA[request.param]


@pytest.fixture(params=["memory", "disk"])
def path(request, data, tmp_path, memory_path):
    found = (memory_path if request.param == "memory" else tmp_path) / "source.bin"
    found.write_bytes(data)
    return found


class Contract:
    """What every reader promises; ``reader`` reads ``data``."""

    def test_any_range(self, reader, data):
        end = len(data)
        edges = {0, 1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7, end - BLOCK, end - 1, end}
        for offset in sorted(edges):
            for length in sorted(edges):
                if min(offset, length) >= 0 and offset + length <= end:
                    assert got(reader, offset, length) == data[offset : offset + length], (offset, length)

    def test_end_of_the_source(self, reader, data):
        for offset, length in [(0, len(data) + 1), (len(data) - 1, 2), (len(data), 1), (len(data) + 3 * BLOCK, 10)]:
            with pytest.raises(CorruptionError, match=r"ends at \d+, \d+ bytes were needed"):
                got(reader, offset, length)
        assert got(reader, len(data) - 5, 5) == data[-5:]

    def test_many_threads(self, reader, data):
        wrong = []

        def work(seed):
            rng = random.Random(seed)
            for _ in range(40):
                offset = rng.randrange(len(data))
                length = rng.randrange(len(data) - offset + 1)
                if got(reader, offset, length) != data[offset : offset + length]:
                    wrong.append((offset, length))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_summary_adds_up(self, reader, data):
        assert sum(reader.summary().values()) == 0
        for length in (0, 1, 600, len(data)):
            got(reader, len(data) - length, length)
        assert sum(reader.summary().values()) in ((601 + len(data)), 0)
        assert bool(reader.summary()) == isinstance(reader, Direct)

    def test_says_how_and_why(self, reader):
        assert reader.route
        assert reader.why
        assert reader.margin % BLOCK == 0

    def test_closed_twice(self, reader):
        reader.close()
        reader.close()

    def test_through_it_like_any_source(self, reader, data, source, monkeypatch):
        monkeypatch.setattr(Through, "STEP", 2 * BLOCK)
        through = Through(source, reader)
        assert (through.name, through.size) == (source.name, len(data))
        for offset, length in [(0, len(data)), (1, len(data) - 1), (len(data) - 3, 3), (300, 0), (300, 301)]:
            assert read_bytes(through, offset, length) == data[offset : offset + length]
        with pytest.raises(CorruptionError):
            read_bytes(through, 1, len(data))
        through.check_unchanged()
        through.close()
        assert read_bytes(source, 0, 3) == data[:3]


class FileContract(Contract):
    """And what those of files promise; with ``preadv`` replaced, which they read with."""

    @pytest.fixture
    def source(self, path):
        with FileSource(path) as source:
            yield source

    @pytest.fixture
    def replaced(self, monkeypatch):
        """``replaced(function)``: ``os.preadv``, whose original is its first argument; flags are 0 or RWF_NOWAIT."""
        real = os.preadv

        def replace(function):
            def preadv(descriptor, views, offset, flags=0):
                return function(lambda: real(descriptor, views, offset, flags), descriptor, views, offset, flags)

            monkeypatch.setattr(os, "preadv", preadv)

        return replace

    @pytest.mark.parametrize("most", [1, 100, 512, BLOCK - 1, BLOCK, 2 * BLOCK + 512])
    def test_short_reads(self, reader, data, replaced, most):
        """The rest of the memory holds anything."""

        def short(real, descriptor, views, offset, flags):
            count = min(real(), most)
            views[0][count:] = CANARY * (len(views[0]) - count)
            return count

        replaced(short)
        for offset, length in [(0, len(data)), (13, len(data) - 13), (13, 500), (len(data) - 1, 1)]:
            view = room(length)
            head = reader.read(offset, length, view)
            assert view[head : head + length] == data[offset : offset + length]
        with pytest.raises(CorruptionError, match=rf"ends at {len(data)}, {len(data) + 1} bytes were needed"):
            reader.read(3, len(data) - 2, room(len(data)))

    @pytest.mark.parametrize("after", [0, 1])
    @pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, errno.ENODEV, errno.ESTALE])
    def test_device_that_fails(self, reader, data, replaced, number, after):
        calls = []

        def fail(real, descriptor, views, offset, flags):
            calls.append(offset)
            if len(calls) > after:
                raise error(number)
            return min(real(), BLOCK)

        replaced(fail)
        if after and len(data) <= BLOCK:
            assert got(reader, 0, len(data)) == data
            return
        with pytest.raises(StorageError, match=rf"reading '.*' at \d+ failed: {os.strerror(number)}"):
            got(reader, 0, len(data))

    def test_interrupted(self, reader, data, replaced):
        def interrupt(real, *_):
            raise KeyboardInterrupt

        replaced(interrupt)
        with pytest.raises(KeyboardInterrupt):
            got(reader, 0, len(data))

    @pytest.mark.parametrize("left", [0, 1, 600])
    def test_file_that_shrank(self, reader, data, path, left):
        os.truncate(path, left)
        with pytest.raises(CorruptionError, match=rf"ends at {left}, {len(data)} bytes were needed"):
            got(reader, 0, len(data))
        assert got(reader, 0, left) == data[:left]

    def test_file_that_shrinks_between_two_reads(self, reader, path, data, replaced):
        if len(data) <= 3 * BLOCK:
            pytest.skip("read at once")

        def shrink(real, *_):
            count = min(real(), BLOCK)
            os.truncate(path, BLOCK + 600)
            return count

        replaced(shrink)
        with pytest.raises(CorruptionError, match=rf"ends at {BLOCK + 600}, {len(data)} bytes were needed"):
            got(reader, 0, len(data))

    def test_removed_file_is_still_read(self, reader, path, data):
        path.unlink()
        assert got(reader, 0, len(data)) == data

    def test_closing_leaves_the_source_open(self, reader, source, data):
        reader.close()
        assert read_bytes(source, 0, len(data)) == data


class TestCachedFile(FileContract):
    @pytest.fixture
    def reader(self, source):
        with contextlib.closing(Cached(source, "page cache", "a test")) as reader:
            yield reader

    def test_file_that_would_block(self, reader, replaced):
        def again(*_):
            raise error(errno.EAGAIN)

        replaced(again)
        with pytest.raises(StorageError, match="temporarily unavailable"):
            got(reader, 0, 10)


class TestCachedMemory(Contract):
    @pytest.fixture
    def source(self, data):
        with contextlib.closing(MemorySource(data)) as source:
            yield source

    @pytest.fixture
    def reader(self, source):
        return Cached(source, "memory", "a test")


class DirectContract(FileContract):
    peek = False

    @pytest.fixture
    def reader(self, source, direct_io):
        with Direct(source, "a test", peek=self.peek) as reader:
            yield reader

    def test_its_own_descriptor_is_closed(self, source, direct_io):
        before = set(os.listdir("/proc/self/fd"))
        reader = Direct(source, "a test", peek=self.peek)
        assert set(os.listdir("/proc/self/fd")) - before
        reader.close()
        assert set(os.listdir("/proc/self/fd")) == before
        assert read_bytes(source, 0, 1)

    def test_blocks_larger_than_ours(self, reader, data, replaced):
        """Read plainly then, and reported so."""

        def refuse(real, descriptor, views, offset, flags):
            if descriptor == reader._file:
                raise error(errno.EINVAL)
            return real()

        replaced(refuse)
        assert got(reader, 5, len(data) - 5) == data[5:]
        assert reader.summary() == {"cached": len(data) - 5, "direct": 0}

    def test_cold_file(self, reader, source, data):
        """As far as the kernel lets go of it."""
        os.fsync(source.descriptor)
        os.posix_fadvise(source.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert got(reader, 7, len(data) - 7) == data[7:]


class TestDirect(DirectContract):
    @pytest.fixture
    def path(self, data, tmp_path):
        (tmp_path / "source.bin").write_bytes(data)
        return tmp_path / "source.bin"

    @pytest.fixture
    def direct_io(self, source):
        try:
            Direct(source, "a test", peek=False).close()
        except OSError as refused:
            pytest.skip(f"no direct I/O here: {refused.strerror}")

    def test_all_of_it_is_direct(self, reader, data):
        got(reader, 3, len(data) - 3)
        assert reader.summary() == {"cached": 0, "direct": len(data) - 3}


class TestDirectOnAnyMedium(DirectContract):
    """The same arithmetic, without O_DIRECT."""

    @pytest.fixture
    def direct_io(self, monkeypatch):
        monkeypatch.setattr(medium, "_DIRECT", 0)


class PeekContract(DirectContract):
    """With ``O_DIRECT`` or without, by what the page cache is said to hold."""

    peek = True
    whole = None

    @pytest.fixture
    def direct_io(self, monkeypatch):
        monkeypatch.setattr(medium, "_DIRECT", 0)
        if self.whole is not None:
            monkeypatch.setattr(readers.Residency, "whole", lambda *_: self.whole)


class TestPeeking(PeekContract):
    def test_its_mapping_is_closed(self, source, direct_io):
        reader = Direct(source, "a test", peek=True)
        assert not reader._residency._map.closed
        reader.close()
        assert reader._residency._map.closed


class TestPeekingCold(PeekContract):
    whole = False

    def test_all_of_it_is_direct(self, reader, data):
        got(reader, 3, len(data) - 3)
        assert reader.summary() == {"cached": 0, "direct": len(data) - 3}


class TestPeekingCached(PeekContract):
    whole = True

    def test_nothing_is_direct(self, reader, data, replaced):
        used = set()

        def note(real, descriptor, *_):
            used.add(descriptor)
            return real()

        replaced(note)
        assert got(reader, 3, len(data) - 3) == data[3:]
        assert used == {reader._source.descriptor}
        assert reader.summary() == {"cached": len(data) - 3, "direct": 0}


def test_mapping_that_is_refused_leaves_nothing_open(tmp_path, monkeypatch):
    def refuse(*_):
        raise error(errno.ENODEV)

    monkeypatch.setattr(medium, "_DIRECT", 0)
    monkeypatch.setattr(readers, "Residency", refuse)
    (tmp_path / "f").write_bytes(b"123")
    with FileSource(tmp_path / "f") as source:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="No such device"):
            Direct(source, "a test", peek=True)
        assert set(os.listdir("/proc/self/fd")) == before


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file on what passes for ext4, with direct I/O, whatever it is on."""
    (tmp_path / "f").write_bytes(DATA[SIZES[0]])
    monkeypatch.setattr(readers, "file_system", lambda _: "ext4")
    monkeypatch.setattr(medium, "_DIRECT", 0)
    with FileSource(tmp_path / "f") as source:
        yield source


def refusing(monkeypatch, number):
    """Let direct I/O be refused when a file is opened for it."""
    real = os.open
    monkeypatch.setattr(medium, "_DIRECT", 1 << 30)

    def refuse(path, flags, *more, **options):
        if flags & 1 << 30:
            raise error(number)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)


def chosen(source, *arguments, **options):
    with contextlib.closing(choose(source, *arguments, **options)) as reader:
        view = room(source.size)
        head = reader.read(0, source.size, view)
        assert bytes(view[head : head + source.size]) == read_bytes(source, 0, source.size)
        return type(reader), reader.route, reader.why


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("route", readers.ROUTES)
def test_memory_is_copied(route, staged):
    with contextlib.closing(MemorySource(b"123")) as source:
        assert chosen(source, route, staged=staged) == (Cached, "memory", "the bytes are in memory already")


@pytest.mark.parametrize("route", readers.ROUTES)
def test_tmpfs_is_copied(route, memory_path):
    (memory_path / "f").write_bytes(b"123")
    with FileSource(memory_path / "f") as source:
        if not in_memory(source.descriptor):
            pytest.skip("no tmpfs")
        assert chosen(source, route) == (Cached, "tmpfs", "the file is on tmpfs: its bytes are memory already")


def test_what_is_asked_for(file):
    assert chosen(file, "cached") == (Cached, "page cache", "the page cache was asked for")
    assert chosen(file, "direct") == (Direct, "direct", "direct reads were asked for, and ext4 has them")
    assert chosen(file, "direct", staged=False)[0] is Direct


def test_the_librarys_choice(file, monkeypatch):
    assert chosen(file) == (Cached, "page cache", f"it is in the page cache: all of {readers.SAMPLES} samples are")
    monkeypatch.setattr(readers, "_cached", lambda _: False)
    assert chosen(file) == (Direct, "page cache, else direct", "ext4 has direct reads for what is not cached")
    assert chosen(file, staged=False)[:2] == (Cached, "page cache")
    assert "saves a copy" in chosen(file, staged=False)[2]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES])
@pytest.mark.parametrize("route", ["auto", "direct"])
def test_no_direct_io(file, monkeypatch, route, number):
    monkeypatch.setattr(readers, "_cached", lambda _: False)
    refusing(monkeypatch, number)
    expected = (Cached, "page cache", f"ext4 refuses direct reads: {os.strerror(number)}")
    assert chosen(file, route) == expected


def test_samples_are_all_over_the_file(file, monkeypatch):
    """The first and the last page among them, and one that is missing is enough."""
    asked = []

    class Known:
        def __init__(self, descriptor, size):
            assert size == file.size

        def whole(self, offset, length):
            asked.append(offset)
            return len(asked) <= held

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(readers, "Residency", Known)
    held = readers.SAMPLES
    assert readers._cached(file)
    assert asked[0] == 0 and asked[-2:] == [file.size - 1, "closed"] and len(asked) == readers.SAMPLES + 1
    for missing in (0, 1, readers.SAMPLES - 1):
        asked.clear()
        held = missing
        assert not readers._cached(file)
        assert asked[-1] == "closed"


def test_file_that_cannot_be_mapped(file, monkeypatch):
    def refuse(*_):
        raise error(errno.ENODEV)

    monkeypatch.setattr(readers, "Residency", refuse)
    assert chosen(file) == (Cached, "page cache", "ext4 refuses direct reads: No such device")
    assert chosen(file, "direct")[0] is Direct


def test_file_system_that_is_not_known(file, monkeypatch):
    monkeypatch.setattr(readers, "file_system", lambda _: "")
    assert "this file system has them" in chosen(file, "direct")[2]


def test_empty_file(tmp_path):
    (tmp_path / "f").touch()
    with FileSource(tmp_path / "f") as source:
        for route in readers.ROUTES:
            chosen(source, route)


@pytest.mark.parametrize("route", ["", "AUTO", "mapped", None])
def test_route_that_is_not_known(route, file):
    with pytest.raises(UsageError, match=r"route must be one of auto, cached, direct, not"):
        choose(file, route)


def test_real_media(tmp_path, memory_path):
    """Whatever these are, every route reads."""
    for directory in (tmp_path, memory_path):
        (directory / "f").write_bytes(DATA[SIZES[0]])
        with FileSource(directory / "f") as source:
            for route in readers.ROUTES:
                for staged in (True, False):
                    chosen(source, route, staged=staged)
