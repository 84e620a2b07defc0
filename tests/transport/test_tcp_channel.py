"""The proofs and the frames of weights over TCP: whoever lacks the token, or alters what others send, gets nowhere."""

import contextlib
import re
import socket
import struct
import threading
import time

import pytest

from thaw_vllm.errors import CorruptionError, MismatchError, UsageError
from thaw_vllm.transport import tcp_channel
from thaw_vllm.transport.tcp_address import Address, listening_address, peer_address, remote
from thaw_vllm.transport.tcp_channel import DATA, READ, TOLD, Asked, Head, admit, introduce

pytestmark = pytest.mark.usefixtures("no_leaks")

TOKEN = b"a token of both, long enough: 0123456789"
ASKED = Asked(bytes(range(16)), "ab" * 32)
HELLO, ANSWER, PROOF, VERDICT = 122, 42, 32, 33


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tcp_channel, "WRONG", 0.05)


@contextlib.contextmanager
def lending(token=TOKEN, seconds=5.0):
    """A connection at whose other end somebody admits, and what that has come to."""
    ours, theirs = socket.socketpair()
    found = []

    def serve():
        try:
            found.append(admit(theirs, token, seconds, seconds, "taker"))
        except OSError as error:
            found.append(error)
        if not isinstance(found[0], tuple):
            theirs.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours, theirs:
        yield ours, lambda: (thread.join(), found[0])[1]
        thread.join()


@contextlib.contextmanager
def channels():
    """The taker's end and the lender's."""
    with lending() as (connection, result):
        channel = introduce(connection, TOKEN, ASKED, 5, "lender")
        yield channel, result()[0]


def exactly(connection, count):
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        assert more
        found += more
    return found


def pass_on(source, target, alter=lambda data: data):
    """All that comes, through ``alter``; its end, too."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(alter(data))
        target.shutdown(socket.SHUT_WR)


# --- the proofs -------------------------------------------------------------------------------------------------------


def test_both_prove():
    with lending() as (connection, result):
        taker = introduce(connection, TOKEN, ASKED, 5, "lender")
        lender, asked = result()
        assert asked == ASKED
        taker.send(READ, 7, 9)
        assert lender.head() == Head(READ, 7, 9)
        lender.rest(memoryview(b""))
        lender.send(DATA, 7, 9, b"nine here")
        into = bytearray(9)
        assert taker.head() == Head(DATA, 7, 9)
        taker.rest(memoryview(into))
        assert into == b"nine here"
        lender.tell(TOLD, {"bytes": 5})
        assert taker.told(taker.head()) == {"bytes": 5}


def test_a_taker_with_another_token():
    with lending() as (connection, result):
        with pytest.raises(MismatchError, match=r"lender has another token than this side.*THAW_PEER_TOKEN_FILE"):
            introduce(connection, TOKEN[:-1], ASKED, 5, "lender")
        assert result() is None


def test_a_wrong_proof_waits():
    paused = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=admit, args=(theirs, TOKEN, 5, 5, "taker", paused.append))
        thread.start()
        ours.sendall(tcp_channel._HELLO.pack(b"thaw-tcp", 1, bytes(32), bytes(16), b"ab" * 32))
        exactly(ours, ANSWER)
        ours.sendall(bytes(PROOF))
        assert exactly(ours, VERDICT) == bytes(VERDICT)
        thread.join()
    assert paused == [tcp_channel.WRONG]


def disbelieved(serve):
    """A lender that does so is not believed to have the token."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=serve, args=(theirs,))
        thread.start()
        with pytest.raises(MismatchError, match="another token"):
            introduce(ours, TOKEN, ASKED, 5, "lender")
        thread.join()


def test_a_lender_with_another_token_is_not_believed():
    """It says that the proof was right, whatever that is, and proves by what it has."""

    def serve(theirs):
        hello = exactly(theirs, HELLO)
        answer = tcp_channel._ANSWER.pack(b"thaw-tcp", 1, bytes(32))
        theirs.sendall(answer)
        exactly(theirs, PROOF)
        theirs.sendall(b"\x01" + tcp_channel._proof(b"another token", b"lender", hello + answer))

    disbelieved(serve)


def test_a_challenge_that_is_sent_back_proves_nothing():
    """A lender without the token has the taker's nonce for its own, and the taker's proof for its own."""

    def serve(theirs):
        hello = exactly(theirs, HELLO)
        theirs.sendall(hello[:ANSWER])
        theirs.sendall(b"\x01" + exactly(theirs, PROOF))

    disbelieved(serve)


def recorded():
    """What the taker has said in proofs that were right."""
    with lending() as (connection, result):
        ours, between = socket.socketpair()
        said = []

        def record(data):
            said.append(data)
            return data

        with ours, between:
            threads = [
                threading.Thread(target=pass_on, args=(between, connection, record)),
                threading.Thread(target=pass_on, args=(connection, between)),
            ]
            for thread in threads:
                thread.start()
            introduce(ours, TOKEN, ASKED, 5, "lender")
            assert result() is not None
            ours.shutdown(socket.SHUT_RDWR)
            connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
    return b"".join(said)


def test_what_was_said_before_proves_nothing_now():
    said = recorded()
    assert len(said) == HELLO + PROOF
    with lending() as (connection, result):
        connection.sendall(said)
        exactly(connection, ANSWER)
        assert exactly(connection, VERDICT) == bytes(VERDICT) and result() is None


@pytest.mark.parametrize("at", [42, 50, 58, 121])
def test_a_first_message_that_was_altered(at):
    """The taker's id, the content id: all of it is in the proofs."""
    with lending() as (connection, result):
        ours, between = socket.socketpair()

        def alter(data):
            return data if len(data) != HELLO else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

        with ours, between:
            threads = [
                threading.Thread(target=pass_on, args=(between, connection, alter)),
                threading.Thread(target=pass_on, args=(connection, between)),
            ]
            for thread in threads:
                thread.start()
            with pytest.raises(MismatchError, match="another token"):
                introduce(ours, TOKEN, ASKED, 5, "lender")
            assert result() is None
            ours.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def test_a_lender_of_another_version():
    with lending() as (connection, result):
        connection.sendall(tcp_channel._HELLO.pack(b"thaw-tcp", 2, bytes(32), bytes(16), b"ab" * 32))
        assert struct.unpack("<8sH", exactly(connection, ANSWER)[:10]) == (b"thaw-tcp", 1)
        assert connection.recv(1) == b"" and result() is None


def test_a_taker_sees_another_version(monkeypatch):
    with lending() as (connection, _):
        pack = tcp_channel._ANSWER.pack
        monkeypatch.setattr(
            tcp_channel,
            "_ANSWER",
            type(
                "Later",
                (),
                {"pack": lambda m, v, n: pack(m, 2, n), "size": ANSWER, "unpack": struct.Struct("<8sH32s").unpack},
            ),
        )
        with pytest.raises(MismatchError, match="another version of thaw's protocol"):
            introduce(connection, TOKEN, ASKED, 1, "lender")
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 9, bytes(200), b"\xff" * 200])
def test_garbage_is_told_nothing(data):
    with lending() as (connection, result):
        connection.sendall(data)
        assert connection.recv(1) == b"" and result() is None


def test_a_server_of_something_else():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        with pytest.raises(MismatchError, match="is no 'thaw lend'"):
            introduce(ours, TOKEN, ASKED, 5, "lender")


@pytest.mark.parametrize("count", [0, 7, 8, 60, HELLO - 1, HELLO, HELLO + 31])
def test_who_hangs_up_in_the_midst(count):
    said = recorded()
    with lending() as (connection, result):
        connection.sendall(said[:count])
        connection.shutdown(socket.SHUT_WR)
        assert isinstance(result(), ConnectionResetError)


def test_who_says_one_byte_after_the_other():
    with lending(seconds=0.3) as (connection, result):
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in recorded():
                connection.send(bytes([byte]))
                time.sleep(0.02)
        assert isinstance(result(), TimeoutError) and time.monotonic() - began < 5


def test_who_says_nothing():
    with lending(seconds=0.1) as (_, result):
        assert isinstance(result(), TimeoutError)


def test_the_token_is_not_sent():
    said = recorded()
    assert not any(TOKEN[at : at + 6] in said for at in range(len(TOKEN) - 5))


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 9, 17, 500, 1016, 1017, 1048])
def test_a_bit_that_was_flipped(at):
    """In what a frame begins with, its payload, its MAC."""
    with channels() as (taker, lender):
        ours, between = socket.socketpair()
        with ours, between:
            lender.connection, real = between, lender.connection
            lender.send(DATA, 0, 1000, bytes(1000))
            frame = bytearray(exactly(ours, 17 + 1000 + 32))
            frame[at] ^= 4
            real.sendall(frame)
        taker.head()
        with pytest.raises(CorruptionError, match="altered on the way"):
            taker.rest(memoryview(bytearray(1000)))


def held_back(lender, *frames):
    """Frames as they would be sent."""
    ours, between = socket.socketpair()
    real, found = lender.connection, []
    with ours, between:
        lender.connection = between
        for payload in frames:
            lender.send(DATA, 0, len(payload), payload)
            found.append(exactly(ours, 17 + len(payload) + 32))
    lender.connection = real
    return found


@pytest.mark.parametrize("order", [(0, 0), (1,), (0, 2)])
def test_frames_repeated_reordered_or_left_out(order):
    with channels() as (taker, lender):
        frames = held_back(lender, b"one", b"two", b"six")
        lender.connection.sendall(b"".join(frames[number] for number in order))
        with pytest.raises(CorruptionError):
            for _ in order:
                taker.head()
                taker.rest(memoryview(bytearray(3)))


def test_what_a_side_has_said_is_not_taken_back():
    with channels() as (taker, lender):
        (frame,) = held_back(lender, b"")
        taker.connection.sendall(frame)
        assert lender.head() == Head(DATA, 0, 0)
        with pytest.raises(CorruptionError):
            lender.rest(memoryview(b""))


def test_frames_of_another_connection():
    with channels() as (_, lender), channels() as (taker, other):
        (frame,) = held_back(lender, b"one")
        other.connection.sendall(frame)
        taker.head()
        with pytest.raises(CorruptionError):
            taker.rest(memoryview(bytearray(3)))


def test_texts_that_are_none():
    for text in (b"[1]", b"{", b"\xff", b"[" * 4000):
        with channels() as (taker, lender):
            lender.send(TOLD, 0, len(text), text)
            with pytest.raises(MismatchError, match="another version"):
                taker.told(taker.head())


def test_a_text_that_is_too_long_is_not_read():
    with channels() as (taker, lender):
        lender.connection.sendall(struct.pack("<BQQ", TOLD, 0, 1 << 62))
        with pytest.raises(MismatchError, match="another version"):
            taker.told(taker.head())


# --- addresses --------------------------------------------------------------------------------------------------------


def test_addresses():
    assert peer_address("tcp://10.0.0.5:28429") == Address("10.0.0.5", 28429)
    assert peer_address("tcp://[::1]:1") == Address("::1", 1) and str(Address("::1", 1)) == "[::1]:1"
    assert peer_address("tcp://[fe80::1%eth0]:1").host == "fe80::1%eth0"
    assert listening_address("host-1.example:0") == Address("host-1.example", 0)
    assert [remote(peer) for peer in ("tcp://", "tcp:/a", "auto", "/a.sock", "")] == [True, False, False, False, False]


@pytest.mark.parametrize(
    "text",
    ["", "a", "a:", ":1", "a:b", "a:65536", "a:-1", "::1:5", "[::1]", "[::1]:", "[a]:1", "a:1/", "a b:1", "u@a:1",
     "a:1\n", "tcp://a:1", "ä:1", "a:\u0661"],
)  # fmt: skip
def test_what_is_no_address(text):
    for parse, shown in ((listening_address, text), (peer_address, f"tcp://{text}")):
        with pytest.raises(UsageError, match=re.escape(repr(shown)) + " is no address"):
            parse(shown)
    with pytest.raises(UsageError):
        peer_address("tcp://a:0")
