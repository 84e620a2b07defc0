"""Offers: who is told what, and how long that holds."""

import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thaw_vllm.errors import BusyError, DeviceError, MismatchError, StorageError, ThawError, UnsupportedError
from thaw_vllm.transport import offers
from thaw_vllm.transport.offers import Offer, asked, directory, offered
from thaw_vllm.zygote import messages

pytestmark = pytest.mark.usefixtures("no_leaks")

CONTENT = "ab" * 32
CHILD = """
import os, sys, time
from pathlib import Path
from thaw_vllm.transport.offers import Offer, asked
place, content, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if what == "offer":
    offer = Offer(place, content, lambda: ({"n": 1}, []))
    print(offer.path, flush=True)
else:
    with asked(Path(what), content):
        print("borrowed", flush=True)
        time.sleep(600)
time.sleep(600)
"""


@pytest.fixture
def place(tmp_path):
    return tmp_path / "state" / ("long" * 40) / "offers"


@contextlib.contextmanager
def offering(place, lend=lambda: ({"n": 1}, []), content=CONTENT):
    offer = Offer(place, content, lend)
    try:
        yield offer
    finally:
        offer.withdraw()


@contextlib.contextmanager
def child(*arguments):
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def until(true, seconds=10.0):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_found_and_told(place):
    with offering(place) as offer:
        assert offered(place, CONTENT) == [offer.path]
        assert offered(place, "cd" * 32) == [] == offered(place / "nowhere", CONTENT)
        assert CONTENT not in offer.path.name and str(os.getpid()) in offer.path.name
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        with asked(offer.path, CONTENT) as answer:
            assert (answer.process, answer.told, answer.files) == (os.getpid(), {"n": 1}, [])
            assert offer.borrowers == 1
        until(lambda: not offer.borrowers)
    assert list(place.iterdir()) == []
    offer.withdraw()
    with pytest.raises(StorageError, match="nobody offers weights at"), asked(offer.path, CONTENT):
        pass


def test_several_borrow_at_once_and_get_descriptors(place, tmp_path):
    (tmp_path / "f").write_text("bytes")

    def lend():
        return {}, [os.open(tmp_path / "f", os.O_RDONLY)]

    with offering(place, lend) as offer, asked(offer.path, CONTENT) as one, asked(offer.path, CONTENT) as other:
        assert offer.borrowers == 2
        assert [os.pread(answer.files[0], 9, 0) for answer in (one, other)] == [b"bytes"] * 2


def test_other_content_is_not_told(place):
    with offering(place) as offer:
        for content in ("cd" * 32, "", "ä"):
            with pytest.raises(MismatchError, match="other weights are offered here"), asked(offer.path, content):
                pass
        assert not offer.borrowers


def test_another_user_is_told_nothing(place, monkeypatch):
    with offering(place) as offer:
        with monkeypatch.context() as patch:
            patch.setattr(messages, "peer", lambda connection: (1, os.geteuid() + 1))
            with pytest.raises(MismatchError, match="another user listens"), asked(offer.path, CONTENT):
                pass
            with socket.socket(socket.AF_UNIX) as connection:
                with offers._address(offer.path) as address:
                    connection.connect(address)
                messages.send(connection, {"content": CONTENT})
                answer, _ = messages.receive(connection)
                assert answer["error"] == "MismatchError" and "lent" not in answer
        assert not offer.borrowers
        with monkeypatch.context() as patch:
            patch.setattr(offers.os, "geteuid", lambda: os.getuid() + 1)
            with pytest.raises(MismatchError, match="not a socket of this user's"), asked(offer.path, CONTENT):
                pass


def test_a_directory_that_others_may_write_to(place):
    place.mkdir(parents=True)
    place.chmod(0o777)
    with pytest.raises(StorageError, match=r"others may write to .*THAW_STATE_DIR"):
        Offer(place, CONTENT, lambda: ({}, []))
    assert offered(place, CONTENT) == []
    place.chmod(0o700)
    (place / "no.sock").write_text("")
    with pytest.raises(MismatchError, match="not a socket"), asked(place / "no.sock", CONTENT):
        pass


@pytest.mark.parametrize("error", [UnsupportedError("asleep"), DeviceError("gone")])
def test_a_lender_that_refuses(error, place):
    def lend():
        raise error

    with offering(place, lend) as offer:
        with pytest.raises(type(error), match=str(error)), asked(offer.path, CONTENT):
            pass
        until(lambda: not offer.borrowers)


def test_a_lender_that_fails_goes_on(place):
    failing = [ValueError("unexpected")]

    def lend():
        if failing:
            raise failing.pop()
        return {"n": 2}, []

    with offering(place, lend) as offer:
        with pytest.raises(StorageError, match="has ended"), asked(offer.path, CONTENT):
            pass
        with asked(offer.path, CONTENT) as answer:
            assert answer.told == {"n": 2}


@pytest.mark.parametrize("sent", [b"", b"\x02\0\0\0", b"\x02\0\0\0[]", b"\xff\xff\xff\xff", b"\x05\0\0\0nojsn"])
def test_nonsense(sent, place, monkeypatch):
    monkeypatch.setattr(offers, "QUICK", 0.1)
    with offering(place) as offer:
        with socket.socket(socket.AF_UNIX) as connection:
            with offers._address(offer.path) as address:
                connection.connect(address)
            connection.sendall(sent)
            with asked(offer.path, CONTENT) as answer:
                assert answer.told == {"n": 1}
        with asked(offer.path, CONTENT):
            pass


def connected(offer):
    connection = socket.socket(socket.AF_UNIX)
    with offers._address(offer.path) as address:
        connection.connect(address)
    return connection


def test_what_is_withdrawn_is_waited_for(place):
    offer = Offer(place, CONTENT, lambda: ({}, []))
    with asked(offer.path, CONTENT):
        waiting = threading.Thread(target=offer.withdraw, name="thaw-waiting")
        waiting.start()
        until(lambda: offered(place, CONTENT) == [])
        assert waiting.is_alive()
    waiting.join()
    assert list(place.iterdir()) == []


def test_what_could_not_be_withdrawn_is_offered_on(place):
    with offering(place) as offer:
        with asked(offer.path, CONTENT):
            with pytest.raises(BusyError, match="1 other processes are still copying"):
                offer.withdraw(0.05)
            assert offered(place, CONTENT) == [offer.path]
            with asked(offer.path, CONTENT) as answer:
                assert answer.told == {"n": 1}
        until(lambda: not offer.borrowers)


def test_who_says_one_byte_after_the_other(place, monkeypatch):
    """Holds up others for a moment, and a withdrawal no longer than that."""
    monkeypatch.setattr(offers, "QUICK", 0.3)
    ended = threading.Event()

    def dribble(connection):
        with contextlib.suppress(OSError):
            while not ended.wait(0.05):
                connection.send(b" ")

    with offering(place) as offer, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(offer)) for _ in range(8)]
        time.sleep(0.1)  # all are taken in, and would be listened to in turn
        threads = [threading.Thread(target=dribble, args=(connection,)) for connection in connections]
        for connection, thread in zip(connections, threads, strict=True):
            connection.sendall((1000).to_bytes(4, "little"))
            thread.start()
        began = time.monotonic()
        offer.withdraw(5)
        took = time.monotonic() - began
        ended.set()
        for thread in threads:
            thread.join()
    assert took < 1 and not offer._thread.is_alive()


def test_a_question_that_is_too_long(place):
    with offering(place) as offer, connected(offer) as connection:
        connection.settimeout(1)
        connection.sendall((1 << 20).to_bytes(4, "little"))
        answer, _ = messages.receive(connection)
        assert answer == {"error": "ThawError", "message": answer["message"]} and "1048576 bytes" in answer["message"]


def test_who_says_nothing_is_hung_up_on(place, monkeypatch):
    monkeypatch.setattr(offers, "QUICK", 0.1)
    with offering(place) as offer, connected(offer) as connection, asked(offer.path, CONTENT):
        connection.settimeout(1)
        assert connection.recv(1) == b""
        assert offer.borrowers == 1, "who borrows may say nothing"


def test_so_many_at_a_time(place, monkeypatch):
    monkeypatch.setattr(offers, "_MOST", 2)
    with offering(place) as offer, asked(offer.path, CONTENT), connected(offer), connected(offer) as third:
        third.settimeout(1)
        assert third.recv(1) == b""


def test_without_a_descriptor_for_those_who_come(place, monkeypatch):
    """It neither ends nor spins."""
    tried, real = [], socket.socket.accept

    def accept(listening):
        if len(tried) < 3:
            tried.append(time.monotonic())
            raise OSError(errno.EMFILE, "too many files")
        return real(listening)

    monkeypatch.setattr(socket.socket, "accept", accept)
    with offering(place) as offer, asked(offer.path, CONTENT) as answer:
        assert answer.told == {"n": 1}
    assert len(tried) == 3 and tried[2] - tried[0] > 0.1


def test_an_offer_that_ends_for_good(place):
    """Nobody waits in its own thread, and the last borrower's going ends that."""
    offer = Offer(place, CONTENT, lambda: (offer.end(60), ({}, []))[1])
    with asked(offer.path, CONTENT):
        assert list(place.iterdir()) == [] and offer._thread.is_alive()
        offer.end(0.01)
    offer._thread.join(5)
    assert not offer._thread.is_alive()


def test_a_fork_ends_nothing(place):
    with offering(place) as offer:
        child = os.fork()
        if not child:
            try:
                offer.withdraw(1)
                offer.end(1)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.05)
        assert offered(place, CONTENT) == [offer.path] and offer._thread.is_alive()


def test_a_lender_that_stands_still(place):
    with socket.socket(socket.AF_UNIX) as listening:
        place.mkdir(parents=True)
        with offers._address(place / "stopped.sock") as address:
            listening.bind(address)
        listening.listen()
        began = time.monotonic()
        with pytest.raises(StorageError, match="timed out"), asked(place / "stopped.sock", CONTENT, 0.1):
            pass
        assert time.monotonic() - began < 1


def test_a_lender_that_says_one_byte_after_the_other(place):
    place.mkdir(parents=True)
    path = place / "slow.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        with offers._address(path) as address:
            listening.bind(address)
        listening.listen()

        def dribble():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall((40).to_bytes(4, "little"))
                for _ in range(39):
                    connection.send(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=dribble)
        thread.start()
        began = time.monotonic()
        with pytest.raises(StorageError, match="timed out"), asked(path, CONTENT, 0.2):
            pass
        assert time.monotonic() - began < 1
        thread.join()


def test_a_borrower_that_dies_gives_back(place):
    with offering(place) as offer, child(place, CONTENT, offer.path) as (process, said):
        assert (said, offer.borrowers) == ("borrowed", 1)
        with pytest.raises(BusyError):
            offer.withdraw(0.01)
        process.kill()
        offer.withdraw(10)
        assert not offer.borrowers


def test_what_a_killed_lender_leaves_behind_is_removed(place):
    with child(place, CONTENT, "offer") as (process, path):
        assert [str(found) for found in offered(place, CONTENT)] == [path]
        with asked(place / path, CONTENT) as answer:
            assert answer.process == process.pid
            process.kill()
            process.wait()
    assert [str(found) for found in place.iterdir()] == [path]
    with offering(place, content="cd" * 32) as other:
        assert offered(place, "ef" * 32) == [] and list(place.iterdir()) == [other.path], "whoever asks, for whatever"


def test_an_answer_of_another_version(place):
    with (
        offering(place, lambda: ("text", [])) as offer,
        pytest.raises(MismatchError, match="another version"),
        asked(offer.path, CONTENT),
    ):
        pass
    for answer in ({"error": "Nothing", "message": "m"}, {"error": 5}):
        with socket.socket(socket.AF_UNIX) as listening:
            path = place / "made-up.sock"
            with offers._address(path) as address:
                listening.bind(address)
            listening.listen()

            def serve(listening=listening, answer=answer):
                connection, _ = listening.accept()
                with connection:
                    messages.receive(connection)
                    messages.send(connection, answer)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(ThawError), asked(path, CONTENT):
                pass
            thread.join()
            path.unlink()


def test_where(tmp_path):
    """Each boot of a machine has its own: none removes another's sockets, at which nobody here listens."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(boot) == 36 and directory({"THAW_STATE_DIR": str(tmp_path)}) == tmp_path / "offers" / boot
