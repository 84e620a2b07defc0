"""``thaw lend`` as a process: where it listens, whom it lends to, and how it ends."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch

from thaw_vllm import freeze_model
from thaw_vllm.errors import MismatchError
from thaw_vllm.transport import offers
from thaw_vllm.transport.peer_token import VARIABLE
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.peers import offer, take
from thaw_vllm.weights.reading import RestoreOptions


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "state"


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef" * 2)
    path.chmod(0o600)
    return path


def began(process):
    """The port of the one line that it prints."""
    found = re.fullmatch(r"lends at tcp://127\.0\.0\.1:(\d+); the token is in '(.*)'\n", process.stdout.readline())
    return int(found[1]), Path(found[2])


def interrupted(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_weights_from_it(start, tmp_path, state):
    model, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    freeze_model(model, tmp_path / "w.thaw")
    with open_snapshot(tmp_path / "w.thaw", with_chunks=False) as opened:
        made = offer(opened, *fillable(model), lambda: None)
    try:
        process = start("lend", "--listen", "127.0.0.1:0")
        port, file = began(process)
        assert file == state / "peer-token" and file.stat().st_mode & 0o777 == 0o600
        with open_snapshot(tmp_path / "w.thaw") as opened:
            report = take(opened, *fillable(other), RestoreOptions(), f"tcp://127.0.0.1:{port}")
        assert report.route == f"peer: 127.0.0.1:{port} over TCP → host memory"
        assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
        code, out, err = interrupted(process)
    finally:
        made.withdraw(10)
    assert (code, out) == (130, "")
    assert re.fullmatch(
        r"thaw: lends [0-9a-f]{16}… to 127\.0\.0\.1:\d+\ninterrupted; nothing is left half-written\n", err
    )


def test_an_interruption_ends_who_takes(start, tmp_path):
    model = torch.nn.Linear(5, 3)
    freeze_model(model, tmp_path / "w.thaw")
    with open_snapshot(tmp_path / "w.thaw", with_chunks=False) as opened:
        content = opened.snapshot.header.content
        made = offer(opened, *fillable(model), lambda: None)
    from thaw_vllm.transport.peer_token import taker_token
    from thaw_vllm.transport.tcp_address import Address
    from thaw_vllm.transport.tcp_source import TcpSource

    process = start("lend", "--listen", "127.0.0.1:0")
    port, _ = began(process)
    source = TcpSource(Address("127.0.0.1", port), taker_token(os.environ), content, 0, 72)
    assert made.borrowers == 1
    assert interrupted(process)[0] == 130
    made.withdraw(10)
    source.close()


def test_it_listens_on_this_host_alone(start):
    """Where nobody says otherwise; the port may be taken by whoever runs tests beside this one."""
    process = start("lend")
    line = process.stdout.readline()
    if not line:
        assert "nothing can listen at 127.0.0.1:28429" in process.communicate()[1]
        return
    assert line.startswith("lends at tcp://127.0.0.1:28429; ")
    listening = [
        row.split()[1:4] for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    assert [row[0] for row in listening if row[0].endswith(":6F0D") and row[2] == "0A"] == ["0100007F:6F0D"]
    assert interrupted(process)[0] == 130


def test_one_that_listens_for_others_says_what_they_can_read(start):
    process = start("lend", "--listen", "0.0.0.0:0")
    assert re.match(r"lends at tcp://0\.0\.0\.0:\d+; ", process.stdout.readline())
    assert interrupted(process)[2].startswith(
        "thaw: nothing is encrypted: whoever is on the way can read the weights\n"
    )


def test_a_port_that_is_taken(spawn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = spawn("lend", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert ran.code == 6 and ran.out == ""
    assert re.fullmatch(
        r"error: nothing can listen at .*: Address already in use; choose another by --listen .*\n", ran.err
    )


@pytest.mark.parametrize("listen", ["", "28429", ":28429", "::1:28429", "127.0.0.1", "tcp://127.0.0.1:1"])
def test_no_address(listen, thaw, state):
    ran = thaw("lend", "--listen", listen)
    assert ran.code == 2 and "is no address to listen at" in ran.err and not state.exists()


def test_a_token_that_others_may_read(thaw, token):
    token.chmod(0o644)
    ran = thaw("lend", "--token-file", token)
    assert ran.code == 6 and "others may know the peer token" in ran.err and "yours alone (chmod 600)" in ran.err


def test_a_token_of_ones_own(start, token, tmp_path, state):
    model = torch.nn.Linear(5, 3)
    freeze_model(model, tmp_path / "w.thaw")
    process = start("lend", "--listen", "127.0.0.1:0", "--token-file", token)
    port, file = began(process)
    assert file == token and not (state / "peer-token").exists()
    (tmp_path / "other").write_text("f" * 32)
    (tmp_path / "other").chmod(0o600)
    os.environ[VARIABLE] = str(tmp_path / "other")
    try:
        with open_snapshot(tmp_path / "w.thaw") as opened, pytest.raises(MismatchError, match="another token"):
            take(opened, *fillable(model), RestoreOptions(), f"tcp://127.0.0.1:{port}")
    finally:
        del os.environ[VARIABLE]
    assert interrupted(process)[0] == 130
    assert not offers.directory(os.environ).exists()


def test_the_help_says_what_is_not_encrypted(thaw):
    said = " ".join(thaw("lend", "--help").out.split())
    assert "Nothing is encrypted" in said and "WireGuard" in said and "127.0.0.1:28429" in said
