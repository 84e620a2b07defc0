import os

import pytest

from thaw_vllm.bench import residency

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB + 1000))
    if residency.drop([path]) > residency.COLD:
        pytest.skip("this file system keeps its files in memory")
    return path


def test_dropped_and_read(file):
    assert residency.resident(file) <= residency.COLD
    assert residency.fill([file]) == 1.0 == residency.resident(file)
    assert residency.drop([file]) <= residency.COLD


def test_a_part_is_a_part(file):
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(opened.fileno(), 2 * MIB, 0)
    assert 0.2 < residency.resident(file) < 0.3


def test_both_ways_of_asking_agree(file):
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), MIB, MIB)
        told = residency.by_cachestat(opened.fileno())
        if told is None:
            pytest.skip("the kernel has no cachestat")
        assert told == residency.by_mincore(opened.fileno()) == MIB // residency.PAGE


def test_windows_add_up(file, monkeypatch):
    monkeypatch.setattr(residency, "_WINDOW", 3 * MIB)
    residency.fill([file])
    with file.open("rb") as opened:
        assert residency.by_mincore(opened.fileno()) == -(-file.stat().st_size // residency.PAGE)


def test_without_cachestat(file, monkeypatch):
    monkeypatch.setattr(residency, "by_cachestat", lambda descriptor: None)
    assert residency.resident(file) <= residency.COLD
    assert residency.fill([file]) == 1.0


def test_memory_cannot_be_dropped(memory_path):
    path = memory_path / "file"
    path.write_bytes(bytes(MIB))
    if residency.drop([path]) < 1:
        pytest.skip("not on tmpfs")
    assert residency.resident(path) == 1.0


def test_several_files_count_by_size(file, tmp_path):
    small = tmp_path / "small"
    small.write_bytes(bytes(residency.PAGE))
    residency.fill([small])
    assert residency.of_all([file, small]) < 0.01 < residency.resident(small)


def test_empty(tmp_path):
    (tmp_path / "empty").touch()
    assert residency.resident(tmp_path / "empty") == 0.0
