"""Every hostile file is refused with the right error, before anything large is allocated, in words that name it."""

import json
import tracemalloc

import pytest
from tests.attacks import documents, parts, sections  # noqa: F401
from tests.attacks.parts import MIB, Parts
from tests.attacks.registry import HOSTILE

from thaw_vllm import errors
from thaw_vllm.weights.open import open_memory, open_snapshot

pytestmark = pytest.mark.usefixtures("no_leaks")


def refused(path, error, *words):
    """Open ``path``, which must raise exactly ``error``; returns the most bytes that were allocated meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(errors.ThawError) as raised, open_snapshot(path):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert type(raised.value) is error, raised.value
        said = str(raised.value)
        assert repr(str(path)) in said
        assert len(said) < 600 + len(str(path))
        assert said.isprintable()
        for word in words:
            assert word in said


def test_sound_file_is_accepted(tmp_path):
    """All others differ from it in one thing, so it must be that thing they are refused for."""
    path = tmp_path / "sound.thaw"
    path.write_bytes(parts.sound())
    with open_snapshot(path) as opened:
        assert [t.name for t in opened.snapshot.index.tensors] == ["weight", "tied", "nothing", "long"]
    header = parts.manifest([parts.member()])
    with open_memory(Parts(header=header).bytes()) as opened:
        assert opened.snapshot.header.ranks.members[0].name == parts.member()["name"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name, tmp_path):
    maker, error, words = HOSTILE[name]
    data = maker()
    path = tmp_path / "hostile.thaw"
    path.write_bytes(data)
    # What it says of itself may be read and parsed; nothing that it merely claims may be allocated.
    assert refused(path, error, *words) < 2 * MIB + 40 * len(data)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_memory_is_refused(name):
    maker, error, _ = HOSTILE[name]
    with pytest.raises(error, match="snapshot in memory"), open_memory(maker()):
        pass


def test_a_claimed_payload_is_not_allocated(tmp_path):
    """A sparse file of one TiB is as large as it says, and is opened in the memory of its sections."""
    length = 2**40
    step = 64 * MIB
    table = [parts.chunk(at, at, step, 0) for at in range(0, length, step)]
    index = {"tensors": [parts.tensor("w", dtype="uint8", shape=(length,))], "storages": [length], "files": []}
    data = Parts(index=index, chunks=table, payload=b"").bytes()
    data = Parts(index=index, chunks=table, payload=b"", sizes={"payload": length, "file": len(data) + length}).bytes()
    path = tmp_path / "sparse.thaw"
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(len(data) + length)
    tracemalloc.start()
    try:
        with open_snapshot(path) as opened:
            assert opened.snapshot.bytes == length
        assert tracemalloc.get_traced_memory()[1] < 40 * len(data)
    finally:
        tracemalloc.stop()


def test_sections_at_their_limits_are_refused_by_content_not_by_memory(tmp_path):
    """The largest header: 16 MiB of spaces around nothing."""
    path = tmp_path / "spaces.thaw"
    path.write_bytes(Parts(header=b" " * (16 * MIB), chunks=[], payload=b"").bytes())
    assert refused(path, errors.FormatError, "bad header") < 80 * MIB


def test_hostile_strings_do_not_reach_the_terminal(tmp_path):
    """A message quotes what it complains about with its escapes escaped."""
    path = tmp_path / "escape.thaw"
    document = json.dumps({"\x1b[2J" * 20: 1, "a": 1, "b": "\x9b"}).replace('"a"', '"\\u001b[31m"')
    path.write_bytes(Parts(header=document.encode(), chunks=[], payload=b"").bytes())
    refused(path, errors.FormatError)
