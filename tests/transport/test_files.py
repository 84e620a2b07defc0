"""Many files as one source: read by threads and by helpers; the GPU is made up (driver.py)."""

import contextlib
import os
import random

import pytest
import torch
from tests.transport.test_links import runs_of
from tests.transport.test_reading_helpers import kill, no_children, unmoved  # noqa: F401 - fixtures

from thaw_vllm.errors import CorruptionError, ReplacedError, StorageError
from thaw_vllm.transport import files as files_
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.files import Files, Joined, place
from thaw_vllm.transport.links import CudaLink, Place
from thaw_vllm.transport.pipeline import Range, deliver
from thaw_vllm.transport.plan import BLOCK, steps
from thaw_vllm.transport.readers import Cached, choose
from thaw_vllm.transport.reading_helpers import Helpers
from thaw_vllm.transport.source import FileSource, read_bytes

pytestmark = pytest.mark.usefixtures("no_leaks", "no_children")

ROOM = 4 * BLOCK
HEAD = 100


class Work:
    """Files of a head and a payload each, and where the payloads go; sums are known once they are asked for."""

    def __init__(self, folder, count, length, seed=0):
        rng = random.Random(seed)
        folder.mkdir(exist_ok=True)
        self.folder, self.length = folder, length
        self.data = [rng.randbytes(HEAD + length) for _ in range(count)]
        self.paths = [os.fspath(folder / f"{number}é.bin") for number in range(count)]
        for path, data in zip(self.paths, self.data, strict=True):
            with open(path, "wb") as file:
                file.write(data)
        self.files = Files(self.paths, HEAD + length, "blocks")
        self.ranges = [Range(n * self.files.stride + HEAD, length, 0, self.paths[n]) for n in range(count)]
        self.target = torch.zeros(count * length, dtype=torch.uint8)
        self.places = [Place(self.target, number * length, length) for number in range(count)]
        self.asked = []

    def admit(self, number):
        self.asked.append(number)
        self.ranges[number] = self.ranges[number]._replace(wordsum=wordsum(memoryview(self.data[number])[HEAD:]))
        return True

    def arrived(self):
        return bytes(self.target.numpy()) == b"".join(data[HEAD:] for data in self.data)


@pytest.fixture
def send():
    """``send(work, before, **options)``: through three helpers; ``before`` is called with them."""

    def sent(work, before=lambda helpers: None, **options):
        with (
            contextlib.closing(work.files),
            Helpers(0, 3, slot=ROOM) as helpers,
            contextlib.closing(CudaLink(0, runs_of(work))) as link,
        ):
            before(helpers)
            with helpers.reading(work.files):
                reader = choose(work.files)
                options = {"workers": 2, "helpers": helpers, "admit": work.admit} | options
                return deliver(reader, "it", work.ranges, link, **options)

    return sent


SIZES = [1, BLOCK - HEAD, ROOM, 3 * ROOM + 17]


@pytest.mark.parametrize("length", SIZES)
def test_every_byte_of_every_file(length, tmp_path):
    work = Work(tmp_path / "files", 5, length)
    assert work.files.size == 5 * work.files.stride and work.files.stride % BLOCK == 0
    for number, data in enumerate(work.data):
        at = number * work.files.stride
        assert read_bytes(work.files, at, HEAD + length) == data
        assert read_bytes(work.files, at + length, HEAD) == data[length:]
        with pytest.raises(CorruptionError, match=rf"/{number}é.bin' ends at {HEAD + length}, {HEAD + length + 1} by"):
            read_bytes(work.files, at + HEAD, length + 1)


@pytest.mark.parametrize("length", SIZES)
def test_no_read_goes_from_one_to_the_next(length, tmp_path):
    files = Files(["a", "b", "c"], HEAD + length, "blocks")
    spans = [(n * files.stride + at, size) for n in range(3) for at, size in ((0, HEAD), (HEAD, length))]
    for step in steps(spans, ROOM):
        assert step.offset // files.stride == (step.offset + step.length - 1) // files.stride


def test_what_cannot_be_opened(tmp_path):
    work = Work(tmp_path / "files", 2, 10)
    os.unlink(work.paths[1])
    with pytest.raises(StorageError, match=r"1é.bin' does not exist"):
        read_bytes(work.files, work.files.stride, 1)
    assert read_bytes(work.files, 0, 1)


def test_the_list(tmp_path):
    work = Work(tmp_path / "files", 2, 10)
    descriptor = work.files.descriptor
    assert work.files.descriptor == descriptor
    stride, *paths = os.pread(descriptor, 10_000, 0).split(b"\0")
    assert int(stride) == work.files.stride and [os.fsdecode(path) for path in paths] == work.paths
    work.files.close()
    work.files.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("count", [1, 2, 60])
@pytest.mark.parametrize("length", SIZES)
def test_helpers_read_them(count, length, tmp_path, send, monkeypatch):
    """Not this process; and a sum need not be known before its file is begun with."""
    work = Work(tmp_path / "files", count, length)
    monkeypatch.setattr(Files, "read_into", lambda *_: pytest.fail("read here"))
    assert send(work)
    assert work.arrived() and work.asked == [*range(count)]


def test_one_delivery_after_another(tmp_path):
    """Each of its own files, by the same helpers."""
    works = [Work(tmp_path / str(seed), 7, length, seed) for seed, length in enumerate((50, ROOM, 2 * ROOM))]
    with Helpers(0, 2, slot=ROOM) as helpers:
        for work in works:
            with contextlib.closing(work.files), contextlib.closing(CudaLink(0, runs_of(work))) as link:
                with helpers.reading(work.files):
                    reader = Cached(work.files, "files", "a test")
                    assert deliver(reader, "it", work.ranges, link, workers=2, helpers=helpers, admit=work.admit)
                assert work.arrived()


def test_parts_of_one_list(tmp_path):
    """Delivered one after another, the helpers killed in between."""
    for killed in (0, 1, 3):
        work = Work(tmp_path / str(killed), 30, ROOM + 7)
        with contextlib.closing(work.files), Helpers(0, 3, slot=ROOM) as helpers, helpers.reading(work.files):
            reader = choose(work.files)
            for first in range(0, 30, 12):
                runs, ranges = runs_of(work)[first : first + 12], work.ranges[first : first + 12]

                def admit(number, first=first, ranges=ranges, work=work):
                    work.admit(first + number)
                    ranges[number] = work.ranges[first + number]
                    return True

                with contextlib.closing(CudaLink(0, runs)) as link:
                    deliver(reader, "it", ranges, link, workers=2, helpers=helpers, admit=admit)
                if not first:
                    kill(helpers, killed)
        assert work.arrived() and work.asked == [*range(30)]


def test_admitting_that_fails(tmp_path, send):
    """What is under way is waited for, and nothing is left (see the fixtures)."""
    work = Work(tmp_path / "files", 40, 2 * ROOM)

    def admit(number):
        if number == 17:
            raise StorageError("no head")
        return work.admit(number)

    with pytest.raises(StorageError, match="no head"):
        send(work, admit=admit)
    assert work.asked == [*range(17)]


def test_threads_read_them(tmp_path, send):
    work = Work(tmp_path / "files", 30, ROOM + 5)
    assert not send(work, lambda helpers: kill(helpers, 3))
    assert work.arrived()


@pytest.mark.parametrize("seed", range(5))
def test_flipped_byte(seed, tmp_path, send):
    work, rng = Work(tmp_path / "files", 9, 2 * ROOM), random.Random(seed)
    number = rng.randrange(9)
    with open(work.paths[number], "r+b") as file:
        at = HEAD + rng.randrange(work.length)
        file.seek(at)
        file.write(bytes([work.data[number][at] ^ 1 << rng.randrange(8)]))
    with pytest.raises(CorruptionError, match=rf"^it, /.*/{number}é.bin$"):
        send(work, damage=lambda name, found: CorruptionError(f"{name}, {found.label}"))


@pytest.mark.parametrize(
    ("hurt", "error", "why"),
    [
        (os.unlink, StorageError, r"reading '.*/4é.bin' at \d+ failed: No such file"),
        (lambda path: os.truncate(path, 9000), CorruptionError, r"/4é.bin' ends at \d+, \d+ bytes were needed"),
    ],
    ids=["gone", "cut"],
)
def test_one_that_is_not_what_it_was(hurt, error, why, tmp_path, send):
    work = Work(tmp_path / "files", 9, 2 * ROOM)
    hurt(work.paths[4])
    with pytest.raises(error, match=why):
        send(work)


def test_what_has_to_wait_is_asked_for_again(tmp_path, send):
    """And what was admitted before lands meanwhile."""
    work, landed = Work(tmp_path / "files", 30, 2 * ROOM), []

    def admit(number):
        return len(landed) >= number - 2 and work.admit(number)

    assert send(work, admit=admit, landed=landed.append)
    assert work.arrived()


def test_they_lie_further_apart_than_a_plan_reads_along():
    assert files_._APART > BLOCK


class TestJoined:
    """Files that are held open."""

    @pytest.fixture
    def work(self, tmp_path):
        """Whose files are one source, the second one longer than the others."""
        work = Work(tmp_path / "files", 3, ROOM)
        with open(work.paths[1], "ab") as file:
            file.write(b"more")
        with contextlib.ExitStack() as stack:
            work.files = Joined([stack.enter_context(FileSource(path)) for path in work.paths])
            work.ranges = [Range(n * work.files.stride + HEAD, ROOM, 0, work.paths[n]) for n in range(3)]
            yield work
            work.files.close()

    def test_what_is_open_is_read(self, work):
        """Whatever has the names by then; and that is told in the end, since helpers go by the names."""
        os.replace(work.paths[2], work.paths[0])
        for number, data in enumerate(work.data):
            assert read_bytes(work.files, number * work.files.stride, HEAD + ROOM) == data
        assert work.files.name == work.paths[0] and choose(work.files).route == "files"
        with pytest.raises(ReplacedError, match=r"0é\.bin' was replaced while it was being read"):
            work.files.check_unchanged()

    def test_written_to(self, work):
        work.files.check_unchanged()
        with open(work.paths[1], "ab") as file:
            file.write(b"x")
        with pytest.raises(ReplacedError, match=r"1é\.bin' was written to"):
            work.files.check_unchanged()

    def test_messages_name_the_file(self, work):
        assert place(work.files, 2 * work.files.stride + 7) == (work.paths[2], 7)
        with pytest.raises(CorruptionError, match=r"2é\.bin' ends at"):
            read_bytes(work.files, 2 * work.files.stride, HEAD + ROOM + 1)

    def test_helpers_read_them(self, work, send, monkeypatch):
        monkeypatch.setattr(Joined, "read_into", lambda *_: pytest.fail("read here"))
        assert send(work)
        assert work.arrived()
