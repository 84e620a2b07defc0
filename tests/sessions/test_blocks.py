"""Files of blocks: the first writer's stays, what was read is what was written, and any damage is told."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.errors import CorruptionError, FormatError, StorageError
from thaw_vllm.sessions import blocks
from thaw_vllm.sessions.blocks import PAYLOAD_AT, Name
from thaw_vllm.transport.checksum import wordsum

NAME = Name(bytes(range(32)), 0)
DATA = bytes(range(256)) * 3


LENGTH = len(DATA)


def back(directory, name=NAME, size=LENGTH):
    found = memoryview(bytearray(size))
    blocks.read(directory, name, found)
    return bytes(found)


def test_it_comes_back(tmp_path):
    assert blocks.write(tmp_path, NAME, memoryview(DATA))
    assert back(tmp_path) == DATA
    blocks.check(tmp_path, NAME, len(DATA))
    path = NAME.path(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == PAYLOAD_AT + len(DATA) and blocks.name_of(path) == NAME


def test_a_word_sum_of_other_bytes(tmp_path):
    """As of bytes that a fault changed on their way from a GPU, which computed it: nobody takes the block."""
    words = wordsum(memoryview(DATA))
    assert blocks.write(tmp_path / "sound", NAME, memoryview(DATA), words=words) and back(tmp_path / "sound") == DATA
    assert blocks.write(tmp_path, NAME, memoryview(DATA), words=words + 1)
    with pytest.raises(CorruptionError, match="is damaged: the checksum of its bytes does not agree; thaw fsck"):
        back(tmp_path)
    assert not blocks.write(tmp_path, NAME, memoryview(DATA))
    assert blocks.write(tmp_path, NAME, memoryview(DATA), heal=True) and back(tmp_path) == DATA


def test_the_first_writer_wins(tmp_path):
    assert blocks.write(tmp_path, NAME, memoryview(DATA))
    assert not blocks.write(tmp_path, NAME, memoryview(DATA[::-1]))
    assert back(tmp_path) == DATA
    assert blocks.write(tmp_path, Name(NAME.address, 1), memoryview(b"x"))


def test_of_writers_at_once_one_wins(tmp_path):
    barrier, won = threading.Barrier(8), []

    def work(number):
        barrier.wait()
        if blocks.write(tmp_path, NAME, memoryview(bytes([number]) * 1000)):
            won.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and back(tmp_path, size=1000) == bytes(won) * 1000
    assert [path.name for path in blocks.everything(tmp_path)] == [NAME.path(tmp_path).name]


@given(data=st.data())
def test_every_flipped_bit_is_noticed(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("b")
    blocks.write(place, NAME, memoryview(DATA))
    path = NAME.path(place)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    with pytest.raises(FormatError, match=str(path)):
        back(place)
    if at < PAYLOAD_AT:
        with pytest.raises(FormatError, match=str(path)):
            blocks.check(place, NAME, len(DATA))


@pytest.mark.parametrize("size", [0, 8, PAYLOAD_AT - 1, PAYLOAD_AT, PAYLOAD_AT + len(DATA) - 1])
def test_a_cut_one(tmp_path, size):
    blocks.write(tmp_path, NAME, memoryview(DATA))
    path = NAME.path(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError):
        back(tmp_path)


def test_one_that_is_longer(tmp_path):
    blocks.write(tmp_path, NAME, memoryview(DATA))
    path = NAME.path(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptionError, match="were written"):
        back(tmp_path)


def test_one_that_was_moved(tmp_path):
    other = Name(bytes(32), 0)
    blocks.write(tmp_path, NAME, memoryview(DATA))
    other.path(tmp_path).parent.mkdir(exist_ok=True)
    NAME.path(tmp_path).rename(other.path(tmp_path))
    with pytest.raises(CorruptionError, match="another block"):
        back(tmp_path, other)


def test_one_of_another_size_than_is_needed(tmp_path):
    blocks.write(tmp_path, NAME, memoryview(DATA))
    for read in (lambda: back(tmp_path, size=5), lambda: blocks.check(tmp_path, NAME, 5)):
        with pytest.raises(CorruptionError, match="of its context"):
            read()


def test_one_that_is_missing(tmp_path):
    with pytest.raises(StorageError, match="is missing; thaw fsck"):
        back(tmp_path)


@pytest.mark.parametrize("name", ["x.block", "-0.block", "a" * 62 + "-0.block", "a" * 62 + "-a.block", "a" * 62 + "-0"])
def test_other_files_have_no_name(name):
    assert (blocks.name_of(Path("/s/zz") / name)) is None
    assert (blocks.name_of(Path("/s/aa") / name) is not None) == (name == "a" * 62 + "-0.block")
    assert blocks.name_of(Path("/s/aa") / ("a" * 62 + "-00.block")) is None
    assert blocks.name_of(Path("/s/aa") / ("A" * 62 + "-0.block")) is None
