"""Where zygotes are found: nobody else's directory, no link, and files that only the user may open."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from tests.zygote.running import Zygote

from thaw_vllm.errors import StorageError, ThawError, UsageError
from thaw_vllm.zygote import client
from thaw_vllm.zygote.place import place


@pytest.fixture
def directory(own: Zygote, monkeypatch):
    """``directory(path)``: where zygotes are from now on; what commands say to that."""

    def choose(path):
        monkeypatch.setenv("THAW_ZYGOTE_DIR", str(path))
        for command in (["run", "-c", ""], ["zygote", "status"], ["zygote", "start"], ["zygote", "stop"]):
            ran = subprocess.run([sys.executable, "-m", "thaw_vllm", *command], capture_output=True, text=True)
            assert ran.stdout == "" and ran.stderr.count("\n") == 1, ran.stderr
            yield ran.returncode, ran.stderr

    return choose


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_open_to_others(directory, tmp_path, mode: int):
    (tmp_path / "z").mkdir()
    (tmp_path / "z").chmod(mode)
    for code, said in directory(tmp_path / "z"):
        assert code == 6 and "open to other users" in said and "chmod 700" in said


def test_a_link(directory, tmp_path):
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "z").symlink_to("real")
    for code, said in directory(tmp_path / "z"):
        assert code == 6 and "is not a directory" in said and "THAW_ZYGOTE_DIR" in said


def test_a_file(directory, tmp_path):
    (tmp_path / "z").write_text("")
    for code, said in directory(tmp_path / "z"):
        assert code == 6 and "is not a directory" in said
    for code, said in directory(tmp_path / "z" / "below"):
        assert code == 6 and "Not a directory" in said


def test_another_users(directory, tmp_path):
    if os.getuid():
        pytest.skip("only root can give a directory away")
    (tmp_path / "z").mkdir(0o700)
    os.chown(tmp_path / "z", 12345, 12345)
    for code, said in directory(tmp_path / "z"):
        assert code == 6 and "belongs to another user" in said


def test_too_long(directory, tmp_path):
    for code, said in directory("/tmp/" + 100 * "x"):
        assert code == 2 and "too long for a socket" in said and "THAW_ZYGOTE_DIR" in said
    assert not os.path.exists("/tmp/" + 100 * "x")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "ä", "a" * 41, "a\n"])
def test_names(name: str):
    with pytest.raises(UsageError, match="cannot name a zygote"):
        place(name)


def test_modes(own: Zygote, tmp_path, monkeypatch):
    own.start()
    assert own.place.directory.stat().st_mode & 0o777 == 0o700
    for path in (own.place.socket, own.place.lock, own.place.log):
        assert path.stat().st_mode & 0o777 == 0o600


def test_it_is_made(own: Zygote, monkeypatch, tmp_path):
    monkeypatch.setenv("THAW_ZYGOTE_DIR", os.environ["THAW_ZYGOTE_DIR"] + "/a/b")
    own.place = place()
    old = os.umask(0)
    try:
        own.start()
    finally:
        os.umask(old)
    assert own.place.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("which", ["lock", "log", "socket"])
def test_links_within(own: Zygote, tmp_path, which: str):
    """None is followed, and what it points to stays as it is."""
    (tmp_path / "victim").write_text("precious")
    getattr(own.place, which).symlink_to(tmp_path / "victim")
    if which == "socket":
        own.start()
    else:
        with pytest.raises(StorageError, match=which):
            own.start()
    assert (tmp_path / "victim").read_text() == "precious"


def test_default_directories(monkeypatch):
    monkeypatch.delenv("THAW_ZYGOTE_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(place("a").socket) == "/run/user/7/thaw/a.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert str(place("a").socket) == f"/tmp/thaw-{os.getuid()}/a.sock"


def test_a_socket_that_nobody_listens_on(own: Zygote):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(own.place.socket))
    with pytest.raises(client.NoZygoteError):
        client.ask(own.place, "status")
    own.start()
    own.idle()


def test_a_listener_that_ends_without_an_answer(own: Zygote):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(own.place.socket))
        other.listen()
        threading.Thread(target=lambda: (time.sleep(0.1), other.accept()[0].close()), daemon=True).start()
        with pytest.raises(ThawError, match="ended"):
            client.ask(own.place, "status")
