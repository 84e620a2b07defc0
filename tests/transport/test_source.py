import contextlib
import errno
import mmap
import os
import threading
import time

import pytest

from thaw_vllm.errors import CorruptionError, ReplacedError, StorageError
from thaw_vllm.transport.source import FileSource, MemorySource, read_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

DATA = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "source.bin"
    found.write_bytes(DATA)
    return found


class Contract:
    """What every source promises."""

    def test_size_and_name(self, source):
        assert source.size == len(DATA)
        assert source.name

    @pytest.mark.parametrize("offset", [0, 1, 4096, len(DATA) - 1, len(DATA)])
    @pytest.mark.parametrize("length", [0, 1, 4097, len(DATA)])
    def test_reads_ranges(self, source, offset, length):
        if offset + length > len(DATA):
            with pytest.raises(CorruptionError, match=r"ends at .* bytes were needed"):
                read_bytes(source, offset, length)
        else:
            assert read_bytes(source, offset, length) == DATA[offset : offset + length]

    def test_fills_a_part_of_a_buffer_and_no_more(self, source):
        room = bytearray(b"." * 20)
        source.read_into(100, memoryview(room)[5:15])
        assert room == b"....." + DATA[100:110] + b"....."

    def test_is_read_by_many_threads(self, source):
        wrong = []

        def reader(start):
            for offset in range(start, len(DATA) - 64, 97):
                if read_bytes(source, offset, 64) != DATA[offset : offset + 64]:
                    wrong.append(offset)

        threads = [threading.Thread(target=reader, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_is_unchanged(self, source):
        source.check_unchanged()


class TestFile(Contract):
    @pytest.fixture
    def source(self, path):
        with FileSource(path) as source:
            yield source

    def test_closed_twice(self, path):
        source = FileSource(path)
        source.close()
        source.close()

    def test_absent_file(self, tmp_path):
        with pytest.raises(StorageError, match=r"'.*absent' does not exist"):
            FileSource(tmp_path / "absent")

    def test_file_in_a_file(self, path):
        with pytest.raises(StorageError, match="Not a directory"):
            FileSource(path / "x")

    @pytest.mark.parametrize("kind", ["directory", "device", "pipe"])
    def test_what_is_no_file(self, kind, tmp_path):
        """A pipe in particular must not wait for a writer."""
        places = {"directory": tmp_path, "device": "/dev/zero", "pipe": tmp_path / "pipe"}
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StorageError, match="is not a file"):
            FileSource(places[kind])

    def test_link_is_followed(self, path, tmp_path):
        (tmp_path / "link").symlink_to(path.name)
        with FileSource(tmp_path / "link") as source:
            assert read_bytes(source, 0, 5) == DATA[:5]

    def test_reads_that_come_in_pieces(self, path, monkeypatch):
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:100]], offset))
        with FileSource(path) as source:
            assert read_bytes(source, 3, 1000) == DATA[3:1003]

    def test_device_that_fails(self, path, monkeypatch):
        def fail(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with FileSource(path) as source:
            monkeypatch.setattr(os, "preadv", fail)
            with pytest.raises(StorageError, match=r"reading '.*' at 7 failed: Input/output error"):
                read_bytes(source, 7, 1)

    def test_written_to_in_place(self, path):
        with FileSource(path) as source:
            time.sleep(0.02)  # more than the file system's clock tick
            with path.open("r+b") as file:
                file.write(b"other")
            with pytest.raises(ReplacedError, match="was written to while it was being read"):
                source.check_unchanged()

    def test_grown_or_cut(self, path):
        for size in (len(DATA) + 1, len(DATA) - 1):
            path.write_bytes(DATA)
            with FileSource(path) as source:
                os.truncate(path, size)
                with pytest.raises(ReplacedError):
                    source.check_unchanged()

    def test_cut_file_ends_early(self, path):
        with FileSource(path) as source:
            os.truncate(path, 10)
            with pytest.raises(CorruptionError, match="ends at 10, 20 bytes were needed"):
                read_bytes(source, 0, 20)

    @pytest.mark.parametrize("how", ["renamed", "removed", "made anew"])
    def test_replaced_by_name_is_still_the_earlier_one(self, path, how):
        with FileSource(path) as source:
            assert not source.replaced
            other = path.with_name("other")
            other.write_bytes(b"x" * len(DATA))
            if how == "renamed":
                os.replace(other, path)
            else:
                path.unlink()
                if how == "made anew":
                    path.write_bytes(DATA)
            assert source.replaced
            source.check_unchanged()
            assert read_bytes(source, 0, len(DATA)) == DATA


class TestMemory(Contract):
    @pytest.fixture
    def source(self):
        source = MemorySource(DATA)
        yield source
        source.close()

    @pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("I")])
    def test_any_bytes(self, make):
        source = MemorySource(make(DATA))
        assert source.size == len(DATA)
        assert read_bytes(source, 1, 4) == DATA[1:5]
        source.close()

    def test_buffer_is_the_callers_again(self):
        """A borrowed buffer can be resized or unmapped once the source is closed."""
        data = bytearray(DATA)
        source = MemorySource(data)
        with pytest.raises(BufferError):
            data.append(1)
        source.close()
        data.append(1)

    def test_mapping(self, path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with contextlib.closing(MemorySource(mapped)) as source:
                assert read_bytes(source, 0, len(DATA)) == DATA
            mapped.close()
