"""The token of weights over TCP: made once, the same for both sides, and not believed where others might know it."""

import os
from pathlib import Path
from threading import Timer

import pytest

from thaw_vllm.errors import StorageError
from thaw_vllm.transport.peer_token import VARIABLE, lender_token, taker_token

GIVEN = "0123456789abcdef" * 2


@pytest.fixture
def state(tmp_path):
    return {"THAW_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "token"
    path.write_text(GIVEN + "\n")
    path.chmod(0o600)
    return path


def test_it_is_made_once(state, tmp_path):
    with pytest.raises(StorageError, match=r"no peer token is kept here; copy the lender's .* THAW_PEER_TOKEN_FILE"):
        taker_token(state)
    assert not (tmp_path / "state").exists(), "who takes makes none"
    token, path = lender_token(None, state)
    assert path == tmp_path / "state" / "peer-token" and len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert lender_token(None, state) == (token, path) and taker_token(state) == token
    other = {"THAW_STATE_DIR": str(tmp_path / "other")}
    assert lender_token(None, other)[0] != token


def test_one_that_is_given(state, file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    for found in (
        lender_token(file, state),
        lender_token(link, state),
        lender_token(None, state | {VARIABLE: str(file)}),
    ):
        assert found[0] == GIVEN.encode()
    assert taker_token(state | {VARIABLE: str(link)}) == GIVEN.encode()
    assert not (tmp_path / "state").exists()
    other = tmp_path / "other"
    other.write_text("f" * 32)
    other.chmod(0o600)
    assert lender_token(other, state | {VARIABLE: str(file)})[0] == b"f" * 32, "the option comes first"
    lender_token(None, state | {VARIABLE: ""})
    assert (tmp_path / "state" / "peer-token").exists(), "an empty one counts as unset"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_others_might_know_it(mode, state, file):
    file.chmod(mode)
    _, path = lender_token(None, state)
    path.chmod(mode)
    for find in (lambda: lender_token(file, state), lambda: taker_token(state | {VARIABLE: str(file)})):
        with pytest.raises(StorageError, match=r"others may know the peer token in .*yours alone \(chmod 600\)"):
            find()
    for find in (lambda: lender_token(None, state), lambda: taker_token(state)):
        with pytest.raises(StorageError, match=r"others may know the peer token in .*remove that file"):
            find()


def test_of_somebody_else(state, file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StorageError, match="others may know"):
        lender_token(file, state)


@pytest.mark.parametrize("text", ["short", "x" * 31, "ä" * 40, "two lines of text, which are\nlong enough", "a\0" * 20])
def test_one_that_will_not_do(text, state, file):
    file.write_text(text)
    for find in (lambda: lender_token(file, state), lambda: taker_token(state | {VARIABLE: str(file)})):
        with pytest.raises(
            StorageError, match=r"must be 32 or more printable ASCII characters; 'openssl rand -hex 32'"
        ):
            find()


def test_no_file(state, tmp_path, file):
    file.write_text("")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (file, tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(StorageError, match="peer token"):
            lender_token(path, state)


def test_one_that_a_program_writes(state):
    """As a shell's ``<(…)``, which may take its time; and descriptors are given back."""
    reading, writing = os.pipe()
    Timer(0.3, lambda: (os.write(writing, GIVEN.encode()), os.close(writing))).start()
    assert lender_token(Path(f"/dev/fd/{reading}"), state)[0] == GIVEN.encode()
    os.close(reading)


def test_a_link_is_not_followed_where_it_is_kept(state, file, tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "peer-token").symlink_to(file)
    for find in (lambda: lender_token(None, state), lambda: taker_token(state)):
        with pytest.raises(StorageError, match="cannot be read"):
            find()


def test_a_directory_that_others_may_write_to(state, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(StorageError, match=r"others may write to .*THAW_STATE_DIR"):
        lender_token(None, state)
