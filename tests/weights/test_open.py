import os

import pytest
import torch
from tests.attacks import parts

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, FormatError, MismatchError, StorageError
from thaw_vllm.transport.source import FileSource
from thaw_vllm.weights.open import open_memory, open_rank, open_snapshot

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "w.thaw"
    freeze_model(torch.nn.Linear(3, 4), found)
    return found


@pytest.fixture
def manifest(tmp_path):
    """A set of three, put together by hand."""
    members = []
    for rank in (1, 2):
        header = parts.header(parallel={"tp_size": 3, "tp_rank": rank}, content=str(rank) * 64)
        data = parts.Parts(header=header | {"set": {"id": "0" * 32, "members": []}}).bytes()
        name = f"w.{'0' * 12}.rank{rank}.thaw"
        (tmp_path / name).write_bytes(data)
        members.append({"name": name, "size": len(data), "content": str(rank) * 64})
    found = tmp_path / "w.thaw"
    found.write_bytes(parts.Parts(header=parts.manifest(members, 3)).bytes())
    return found


def refused(path, rank, error, words):
    with pytest.raises(error, match=words), open_rank(path, rank):
        pass


def test_opened_and_closed(path):
    with open_snapshot(path) as opened:
        assert opened.source.name == str(path)
        assert len(opened.snapshot.chunks) == 2
    with pytest.raises(StorageError):
        opened.source.read_into(0, memoryview(bytearray(1)))
    with open_snapshot(path, with_chunks=False) as opened:
        assert opened.snapshot.chunks == ()
    with open_memory(path.read_bytes()) as opened:
        assert opened.source.name == "snapshot in memory"


@pytest.mark.parametrize("name", ["e", "th", "a", "checksum"])
def test_message_names_the_file_however_it_is_called(name, tmp_path, monkeypatch):
    """Also when its name happens to be part of the message."""
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        file.write(bytes(300))
    with pytest.raises(FormatError, match=f"^'{name}': not a thaw snapshot"), open_snapshot(name):
        pass


def test_message_names_the_file_once(path, monkeypatch):
    """Also when the source has named it already: here the file ends earlier than it said when it was opened."""
    read_into = FileSource.read_into

    def shrinking(source, offset, view):
        if offset:
            os.truncate(path, 300)
        read_into(source, offset, view)

    monkeypatch.setattr(FileSource, "read_into", shrinking)
    with pytest.raises(CorruptionError, match=f"^'{path}' ends at 300, ") as raised, open_snapshot(path):
        pass
    assert str(raised.value).count(str(path)) == 1


@pytest.mark.parametrize("with_chunks", [True, False])
def test_single_file_is_rank_0(path, with_chunks):
    with open_rank(path, 0, with_chunks=with_chunks) as opened:
        assert bool(opened.snapshot.chunks) == with_chunks
    for rank in (1, -1, 7):
        refused(path, rank, MismatchError, f"this engine process is rank {rank}; give the manifest's path")


@pytest.mark.parametrize("with_chunks", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_of_a_set(manifest, rank, with_chunks):
    with open_rank(manifest, rank, with_chunks=with_chunks) as opened:
        assert opened.snapshot.header.identity.parallel.rank == rank
        assert bool(opened.snapshot.chunks) == with_chunks


@pytest.mark.parametrize("with_chunks", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_by_its_own_path_has_its_chunks(manifest, rank, with_chunks):
    """Without them, thawing it would copy nothing and call that a success."""
    place = manifest.with_name(f"w.{'0' * 12}.rank{rank}.thaw")
    with open_rank(place, rank, with_chunks=with_chunks) as opened:
        assert bool(opened.snapshot.chunks) == with_chunks
    for other in {0, 1, 2} - {rank}:
        refused(place, other, MismatchError, f"holds tensor-parallel rank {rank} of 3, this engine process is rank")


@pytest.mark.parametrize("rank", [-1, 3, 100])
def test_rank_that_the_set_lacks(manifest, rank):
    with (
        pytest.raises(MismatchError, match=rf"rank 0 of 3, this engine process is rank {rank}"),
        open_rank(manifest, rank),
    ):
        pass


def test_rank_that_is_missing(manifest):
    manifest.with_name(f"w.{'0' * 12}.rank1.thaw").unlink()
    refused(manifest, 1, CorruptionError, "rank 1 of '.*w.thaw' is missing: .* copy every file of the set")
    with open_rank(manifest, 2):
        pass


@pytest.mark.parametrize(
    "how", ["swapped", "of another set", "of another size", "of other content", "of other sizes", "a single file"]
)
def test_rank_that_is_mixed_up(manifest, how):
    first, second = (manifest.with_name(f"w.{'0' * 12}.rank{rank}.thaw") for rank in (1, 2))
    header = parts.header(parallel={"tp_size": 3, "tp_rank": 1}, content="1" * 64)
    ranks = {"id": "0" * 32, "members": []}
    if how == "swapped":
        data = second.read_bytes()
        second.write_bytes(first.read_bytes())
    elif how == "of another set":
        data = parts.Parts(header=header | {"set": ranks | {"id": "1" * 32}}).bytes()
    elif how == "of another size":
        data = parts.Parts(header=header | {"set": ranks, "writer": "x" * 200, "metadata": {"a": "x" * 5000}}).bytes()
    elif how == "of other sizes":
        header["identity"]["parallel"] |= {"ep_rank": 1, "ep_size": 3}
        data = parts.Parts(header=header | {"set": ranks}).bytes()
    elif how == "of other content":
        data = parts.Parts(header=header | {"set": ranks, "content": "f" * 64}).bytes()
    else:
        data = parts.Parts().bytes()
    first.write_bytes(data)
    words = r"'.*rank1.thaw' is not the file that '.*w.thaw' names as its rank 1; the set is mixed up, copy all of it"
    refused(manifest, 1, CorruptionError, words)


def test_rank_that_is_cut_short(manifest):
    first = manifest.with_name(f"w.{'0' * 12}.rank1.thaw")
    first.write_bytes(first.read_bytes()[:-1])
    refused(manifest, 1, CorruptionError, "'.*rank1.thaw': truncated")


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to nowhere", "link to itself"])
def test_rank_that_is_no_file(manifest, kind):
    first = manifest.with_name(f"w.{'0' * 12}.rank1.thaw")
    first.unlink()
    if kind == "directory":
        first.mkdir()
    elif kind == "pipe":
        os.mkfifo(first)
    else:
        first.symlink_to("nowhere" if kind == "link to nowhere" else first.name)
    refused(manifest, 1, CorruptionError, "rank 1 of '.*' is missing")


def test_manifest_that_names_itself(manifest):
    header = parts.manifest([parts.member("w.thaw"), parts.member("v.thaw")], 3)
    manifest.write_bytes(parts.Parts(header=header).bytes())
    refused(manifest, 1, CorruptionError, "mixed up")


def test_manifest_beside_other_files_through_a_link(manifest, tmp_path):
    """Members lie beside the path that was given, so a link to a manifest is not enough."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "w.thaw"
    link.symlink_to(manifest)
    with open_rank(link, 0):
        pass
    refused(link, 1, CorruptionError, "rank 1 of .* is missing")
