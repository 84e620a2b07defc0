"""The admin token: made once, for its user alone, and not believed where others might know it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from tests.serve.disks import fill, small_disk

from thaw_vllm.errors import StorageError, UsageError
from thaw_vllm.serve import admin_token as subject
from thaw_vllm.serve import state


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


def test_it_is_made_once_and_kept(directory: Path):
    assert subject.kept_token() is None
    token, path = subject.admin_token({})
    assert path == directory / "admin-token" and len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600 and directory.stat().st_mode & 0o777 == 0o700
    assert subject.admin_token({}) == (token, path)
    assert subject.kept_token() == token
    assert os.listdir(directory) == ["admin-token"]


def test_a_full_disk(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with small_disk(tmp_path / "full") as folder:
        monkeypatch.setenv(state.VARIABLE, str(folder))
        made, _ = subject.admin_token({})
        fill(folder)
        assert subject.admin_token({})[0] == made, "the kept one is read"
        (folder / "admin-token").rename(folder / "moved")
        with pytest.raises(StorageError, match=r"cannot be kept.*No space left.*set THAW_ADMIN_TOKEN"):
            subject.admin_token({})
        assert sorted(path.name for path in folder.iterdir()) == ["fill", "moved"], "nothing is left behind"


def test_a_given_one_is_not_kept(directory: Path):
    assert subject.admin_token({subject.VARIABLE: "a token of 24 characters"}) == ("a token of 24 characters", None)
    for bad in ("short", "ä" * 20, " " * 20, "a token with\na line break"):
        with pytest.raises(UsageError, match="16 or more printable ASCII"):
            subject.admin_token({subject.VARIABLE: bad})
    assert subject.kept_token() is None and not (directory / "admin-token").exists()


def _tokens(barrier, found):  # a process of its own
    barrier.wait()
    found.put(subject.admin_token({})[0])


def test_servers_that_start_at_once_have_one():
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(8), context.Queue()
    started = [context.Process(target=_tokens, args=(barrier, found)) for _ in range(8)]
    for one in started:
        one.start()
    tokens = {found.get(timeout=60) for _ in started}
    for one in started:
        one.join()
    assert len(tokens) == 1 and tokens == {subject.kept_token()}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_one_that_others_may_know_is_refused(mode: int):
    _, path = subject.admin_token({})
    assert path is not None
    path.chmod(mode)
    with pytest.raises(StorageError, match="others may know"):
        subject.admin_token({})
    assert subject.kept_token() is None


@pytest.mark.parametrize("what", ["empty", "link", "directory", "binary"])
def test_what_is_no_token_is_refused(what: str, directory: Path):
    _, path = subject.admin_token({})
    assert path is not None
    path.unlink()
    if what == "link":
        (directory / "other").write_text("secret")
        path.symlink_to(directory / "other")
    elif what == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"" if what == "empty" else b"\xff\xfe")
        path.chmod(0o600)
    with pytest.raises(StorageError, match="admin"):
        subject.admin_token({})
    assert subject.kept_token() is None


def test_a_directory_that_others_write_to_is_refused(directory: Path):
    directory.mkdir(mode=0o700)
    directory.chmod(0o777)
    with pytest.raises(StorageError, match="chmod 700"):
        subject.admin_token({})


def test_only_the_newest_reports_of_starts_are_kept(directory: Path):
    below = directory / "starts"
    below.mkdir(parents=True)
    directory.chmod(0o700)
    gone, lives = 4_000_000_000, os.getppid()
    for number in range(30):
        (below / f"20200101-0000{number:02}-{gone}").mkdir()
    (below / f"20100101-000000-{lives}").mkdir()
    made = state.new_start()
    kept = sorted(below.iterdir())
    assert kept[0].name.endswith(f"-{lives}"), "what is used is not removed, however old"
    assert len(kept) == state.KEPT + 1 and kept[-1] == made and kept[1].name.startswith("20200101-000011")
