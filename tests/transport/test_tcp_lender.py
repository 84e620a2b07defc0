"""Offers lent over TCP: the right bytes, only those, only to who may have them, and given back however it ends."""

import contextlib
import ctypes
import errno
import random
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
from tests.transport.tcp_proxy import Proxy, flip

from thaw_vllm.errors import BusyError, CorruptionError, MismatchError, StorageError, UnsupportedError
from thaw_vllm.transport import lending, offers, tcp_channel, tcp_lender, tcp_source
from thaw_vllm.transport.cuda import Context
from thaw_vllm.transport.lending import Lent
from thaw_vllm.transport.offers import Offer
from thaw_vllm.transport.source import read_bytes
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_channel import DATA, PART, READ, REFUSED, TOLD, Asked, Channel, Head, introduce
from thaw_vllm.transport.tcp_lender import Lender
from thaw_vllm.transport.tcp_source import TcpSource

pytestmark = pytest.mark.usefixtures("no_leaks")

CONTENT, OTHER = "ab" * 32, "cd" * 32
TOKEN = b"a token of both, long enough: 0123456789"
DATA_LENT = random.Random(7).randbytes(5 * PART + 12_345)
RUNS = [3 * PART + 17, 1, len(DATA_LENT) - 3 * PART - 18]
BEGIN = 8192
TAKER = """
import sys, time
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_source import TcpSource
port, token, content, count = int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3], int(sys.argv[4])
source = TcpSource(Address("127.0.0.1", port), token, content, 0, count)
print("taking", flush=True)
time.sleep(600)
"""
LENDER = """
import sys
from pathlib import Path
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_lender import Lender
lender = Lender(Address("127.0.0.1", 0), sys.argv[2].encode(), Path(sys.argv[1]))
print(lender.address.port, flush=True)
lender.serve()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tcp_channel, "WRONG", 0.05)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "state" / "offers"


def until(true, seconds=10.0):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


@contextlib.contextmanager
def offering(place, content=CONTENT, refuse=lambda: None):
    buffer = ctypes.create_string_buffer(DATA_LENT, len(DATA_LENT))
    begins = [ctypes.addressof(buffer) + sum(RUNS[:number]) for number in range(len(RUNS))]
    lent = Lent(list(zip(begins, RUNS, strict=True)), torch.device("cpu"))

    def lend():
        refuse()
        return lent.told()

    offer = Offer(place, content, lend)
    try:
        yield offer
    finally:
        offer.withdraw()


@contextlib.contextmanager
def listening(place, address=Address("127.0.0.1", 0), **options):  # noqa: B008
    lender = Lender(address, TOKEN, place, **options)
    thread = threading.Thread(target=lender.serve, name="thaw-test-lender")
    thread.start()
    try:
        yield lender
    finally:
        lender.close()
        lender.close()
        thread.join()


@contextlib.contextmanager
def taking(lender, token=TOKEN, content=CONTENT, count=None):
    address = lender if isinstance(lender, Address) else lender.address
    count = len(DATA_LENT) if count is None else count
    with contextlib.closing(TcpSource(address, token, content, BEGIN, count)) as source:
        yield source
        source.close()


def all_of(source):
    return read_bytes(source, BEGIN, len(DATA_LENT))


def all_taken(lender):
    with taking(lender) as source:
        return all_of(source)


@contextlib.contextmanager
def asking(lender, taker=bytes(16), content=CONTENT):
    """A channel, to say what TcpSource does not say."""
    with socket.create_connection((lender.address.host, lender.address.port)) as connection:
        yield introduce(connection, TOKEN, Asked(taker, content), 5, "lender")


# --- what is lent -----------------------------------------------------------------------------------------------------


def test_all_and_parts_of_it(place):
    said = []
    with offering(place) as offer, listening(place, say=said.append) as lender:
        with taking(lender) as source:
            assert (source.name, source.size) == (f"the weights at {lender.address}", BEGIN + len(DATA_LENT))
            assert all_of(source) == DATA_LENT
            for at, size in [(0, 1), (RUNS[0] - 3, 7), (PART - 1, PART + 2), (len(DATA_LENT) - 1, 1), (5, 0)]:
                assert read_bytes(source, BEGIN + at, size) == DATA_LENT[at : at + size]
            assert offer.borrowers == lender.takers == 1
            source.check_unchanged()
        until(lambda: not offer.borrowers)
        assert lender.takers == 0 and len(said) == 1 and said[0].startswith("lends abababababababab… to 127.0.0.1:")


def test_more_than_is_asked_for_ahead(place, monkeypatch):
    monkeypatch.setattr(tcp_source, "PART", 1 << 16)
    monkeypatch.setattr(tcp_source, "_AHEAD", 3)
    with offering(place), listening(place) as lender, taking(lender) as source:
        assert all_of(source) == DATA_LENT


def test_from_several_threads(place):
    """They share one borrowing, and no more connections than are allowed."""
    found = {}
    with offering(place) as offer, listening(place) as lender, taking(lender) as source:

        def read(number):
            steps = range(number, len(DATA_LENT) - 1000, 12 * 5003)
            found[number] = all(read_bytes(source, BEGIN + at, 1000) == DATA_LENT[at : at + 1000] for at in steps)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(12), True)
        assert offer.borrowers == lender.takers == 1 and len(source._connections) <= tcp_source._MOST


def test_several_takers(place):
    with offering(place) as offer, listening(place) as lender, taking(lender) as one, taking(lender) as other:
        assert offer.borrowers == lender.takers == 2
        assert all_of(one) == all_of(other) == DATA_LENT
        one.close()
        until(lambda: offer.borrowers == 1)
        assert all_of(other) == DATA_LENT


def test_ipv6(place):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with offering(place), listening(place, Address("::1", 0)) as lender, taking(lender) as source:
        assert str(lender.address) == f"[::1]:{lender.address.port}" and all_of(source) == DATA_LENT


def test_several_offers(place):
    with offering(place), offering(place, OTHER), listening(place) as lender, taking(lender, content=OTHER) as source:
        assert all_of(source) == DATA_LENT


def test_another_offer_where_one_refuses(place):
    asked = []

    def refuse():
        asked.append(1)
        if len(asked) == 1:
            raise UnsupportedError("not this one")

    with offering(place, refuse=refuse), offering(place, refuse=refuse), listening(place) as lender, taking(lender):
        assert len(asked) == 2


# --- who may not have it ----------------------------------------------------------------------------------------------


def test_without_the_token(place):
    with offering(place) as offer, listening(place) as lender:
        with (
            pytest.raises(MismatchError, match=rf"the peer {lender.address} has another token"),
            taking(lender, b"x" * 40),
        ):
            pass
        assert not offer.borrowers and not lender.takers
        with taking(lender):
            pass


def test_a_stranger_learns_nothing_of_what_is_offered(place):
    """The same bytes, whether the weights that he names are here or not."""
    found = []
    with offering(place), listening(place) as lender:
        for content in (CONTENT, OTHER):
            with socket.create_connection((lender.address.host, lender.address.port)) as connection:
                connection.sendall(tcp_channel._HELLO.pack(b"thaw-tcp", 1, bytes(32), bytes(16), content.encode()))
                answer = connection.recv(42, socket.MSG_WAITALL)
                connection.sendall(bytes(32))
                found.append((answer[:10], connection.recv(100, socket.MSG_WAITALL)))
    assert found[0] == found[1] == (struct.pack("<8sH", b"thaw-tcp", 1), bytes(33))


def test_weights_that_nobody_offers(place):
    with listening(place) as lender, pytest.raises(StorageError, match=r"nobody offers these weights.*--offer-weights"):
        taking(lender).__enter__()


def test_a_content_id_that_is_none(place):
    with offering(place), listening(place) as lender, asking(lender, content="../../../../" * 5) as channel:
        head = channel.head()
        assert head.kind == REFUSED and channel.told(head)["error"] == "StorageError"


def test_who_offers_may_refuse(place):
    def refuse():
        raise UnsupportedError("they were swapped")

    with offering(place, refuse=refuse), listening(place) as lender:
        with pytest.raises(UnsupportedError, match=rf"{lender.address}: they were swapped"):
            taking(lender).__enter__()
        assert not lender.takers


def test_other_sizes(place):
    with offering(place) as offer, listening(place) as lender:
        with pytest.raises(MismatchError, match="not as large as the snapshot says"):
            taking(lender, count=len(DATA_LENT) - 1).__enter__()
        until(lambda: not offer.borrowers)


def test_so_many_takers_at_a_time(place):
    with offering(place), listening(place, takers=1) as lender, taking(lender) as source:
        with pytest.raises(BusyError, match="1 others are taking weights here; try again"):
            taking(lender).__enter__()
        assert all_of(source) == DATA_LENT
        source.close()
        until(lambda: not lender.takers)
        with taking(lender) as other:
            assert all_of(other) == DATA_LENT


def test_so_many_connections_of_a_taker(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "_EACH", 1)
    with offering(place), listening(place) as lender, asking(lender) as first:
        assert first.head().kind == TOLD
        with asking(lender) as second:
            head = second.head()
            assert head.kind == REFUSED and second.told(head)["error"] == "BusyError"
        with asking(lender, bytes([1] * 16)) as other:
            assert other.head().kind == TOLD


def test_so_many_strangers_at_a_time(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "_STRANGERS", 1)
    with offering(place), listening(place) as lender, taking(lender) as source:
        there = lender.address.host, lender.address.port
        with socket.create_connection(there):
            until(lambda: lender._strangers == 1)
            with socket.create_connection(there) as second:
                second.settimeout(2)
                assert second.recv(1) == b"", "at once"
            assert all_of(source) == DATA_LENT, "who has proved is not counted"
        until(lambda: lender._strangers == 0)
        with taking(lender):
            pass


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [(READ, len(DATA_LENT), 1), (READ, len(DATA_LENT) - 1, 2), (READ, (1 << 64) - 1, 1), (READ, 0, 0),
     (READ, 0, PART + 1), (READ, 0, (1 << 64) - 1), (DATA, 0, 1), (TOLD, 0, 1), (9, 0, 1)],
)  # fmt: skip
def test_what_is_not_lent(asked, place):
    with offering(place) as offer, listening(place) as lender, asking(lender) as channel:
        assert channel.told(channel.head()) == {"bytes": len(DATA_LENT)}
        channel.send(*asked)
        head = channel.head()
        assert head.kind == REFUSED and channel.told(head)["error"] == "MismatchError"
        assert channel.connection.recv(1) == b""
        until(lambda: not offer.borrowers)


def test_a_request_without_a_right_mac_is_not_answered(place):
    with offering(place) as offer, listening(place) as lender, asking(lender) as channel:
        channel.told(channel.head())
        channel.connection.sendall(struct.pack("<BQQ", READ, 0, 100) + bytes(32))
        assert channel.connection.recv(1) == b""
        until(lambda: not offer.borrowers)


def test_outside_of_what_is_lent(place):
    with offering(place), listening(place) as lender, taking(lender) as source:
        for at, size in [(0, 1), (BEGIN - 1, 2), (BEGIN + len(DATA_LENT), 1), (BEGIN, len(DATA_LENT) + 1)]:
            with pytest.raises(CorruptionError, match="have no"):
                read_bytes(source, at, size)
        assert all_of(source) == DATA_LENT


def test_a_taker_that_says_nothing_is_dropped(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "SILENCE", 0.2)
    with offering(place) as offer, listening(place) as lender, asking(lender) as channel:
        channel.told(channel.head())
        assert channel.connection.recv(1) == b""
        until(lambda: not offer.borrowers)


def test_a_taker_is_not_dropped_while_another_of_its_connections_asks(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "SILENCE", 0.5)
    with offering(place), listening(place) as lender, asking(lender) as one, asking(lender) as other:
        one.told(one.head())
        other.told(other.head())
        into = memoryview(bytearray(5))
        ends = time.monotonic() + 1.2
        while time.monotonic() < ends:
            one.send(READ, 3, 5)
            one.head()
            one.rest(into)
            time.sleep(0.05)
        other.send(READ, 3, 5)
        assert other.head() == Head(DATA, 3, 5)


def test_a_taker_that_dribbles_is_dropped(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "SILENCE", 0.3)
    with offering(place) as offer, listening(place) as lender, asking(lender) as channel:
        channel.told(channel.head())
        with contextlib.suppress(OSError):
            for _ in range(48):
                channel.connection.send(b"\1")
                time.sleep(0.05)
            pytest.fail("it was listened to")
        until(lambda: not offer.borrowers)


def test_a_taker_that_does_not_take_what_it_has_asked_for(place, monkeypatch):
    monkeypatch.setattr(tcp_lender, "SILENCE", 0.3)
    with offering(place) as offer, listening(place) as lender, asking(lender) as channel:
        channel.told(channel.head())
        for _ in range(64):
            channel.send(READ, 0, PART)
        until(lambda: not offer.borrowers)


# --- on the way -------------------------------------------------------------------------------------------------------


TOLD_ENDS = 42 + 33 + 17 + len(f'{{"bytes": {len(DATA_LENT)}}}') + 32
"""Bytes from the lender before the first of what is lent."""


@pytest.mark.parametrize(
    "at", [0, 8, 100, TOLD_ENDS + 9, TOLD_ENDS + 17, TOLD_ENDS + 40_000, TOLD_ENDS + 17 + PART + 5]
)
def test_a_bit_that_was_flipped_on_the_way_to_the_taker(at, place):
    with offering(place) as offer, listening(place) as lender:
        there = lender.address.host, lender.address.port
        with Proxy(there, down=flip(at)) as proxy, pytest.raises((CorruptionError, MismatchError, StorageError)):
            all_taken(Address(*proxy.address))
        until(lambda: not offer.borrowers)


@pytest.mark.parametrize("at", [3, 9, 60, 122, 154, 154 + 5, 154 + 17])
def test_a_bit_that_was_flipped_on_the_way_to_the_lender(at, place):
    with offering(place) as offer, listening(place) as lender:
        there = lender.address.host, lender.address.port
        with Proxy(there, up=flip(at)) as proxy, pytest.raises((MismatchError, StorageError)):
            all_taken(Address(*proxy.address))
        until(lambda: not offer.borrowers)


def test_nothing_is_altered_by_who_alters_nothing(place):
    with offering(place), listening(place) as lender:
        there = lender.address.host, lender.address.port
        with Proxy(there) as proxy:
            assert all_taken(Address(*proxy.address)) == DATA_LENT


def test_a_connection_that_is_cut(place):
    """One thread's error ends the others, and is what all of them say."""
    with offering(place) as offer, listening(place) as lender:
        with Proxy((lender.address.host, lender.address.port)) as proxy, taking(Address(*proxy.address)) as source:
            read_bytes(source, BEGIN, 10)
            proxy.cut()
            for _ in range(2):
                with pytest.raises(
                    StorageError, match=rf"the peer {source._address} has gone.*see that 'thaw lend' runs"
                ):
                    all_of(source)
        until(lambda: not offer.borrowers)


def test_a_lender_that_stands_still(place, monkeypatch):
    monkeypatch.setattr(tcp_source, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(StorageError, match="stands still"):
        all_taken(Address(*server.getsockname()))


def test_a_connection_that_is_made_while_another_fails(place, monkeypatch):
    """It is hung up on, too."""
    real, arrived, ended = socket.create_connection, threading.Event(), []

    with offering(place), listening(place) as lender, taking(lender) as source:

        def late(*arguments, **options):
            connection = real(*arguments, **options)
            arrived.set()
            assert source_failed.wait(10)
            return connection

        source_failed = threading.Event()
        monkeypatch.setattr(tcp_source.socket, "create_connection", late)
        source._idle.clear()

        def take():
            with pytest.raises(StorageError, match="was interrupted") as raised:
                read_bytes(source, BEGIN, 10)
            ended.append(raised.value)

        thread = threading.Thread(target=take)
        thread.start()
        assert arrived.wait(10)
        source.abandon()
        source_failed.set()
        thread.join()
        assert len(ended) == 1


def test_a_taker_that_lags_and_hangs_up_gives_back_at_once(place, monkeypatch):
    """Its kernel tells the lender of no room that comes free after that."""
    real = Channel.rest

    def late(channel, view):
        if len(view) == PART:
            time.sleep(0.3)  # until what the lender sends finds no room
            source.abandon()
        real(channel, view)

    monkeypatch.setattr(Channel, "rest", late)
    with offering(place) as offer, listening(place) as lender:
        with taking(lender) as source, pytest.raises(StorageError, match="was interrupted"):
            all_of(source)
        until(lambda: not offer.borrowers, 5.0)


def test_what_is_said_to_nobody(place):
    """A terminal that is gone ends no loan."""

    def say(line):
        raise OSError(errno.EIO, "Input/output error")

    with offering(place), listening(place, say=say) as lender:
        for _ in range(2):
            assert all_taken(lender) == DATA_LENT


def test_a_memory_file_that_cannot_be_mapped(place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(tcp_lender, "borrow_whole", full)
    with offering(place) as offer, listening(place) as lender:
        with pytest.raises(StorageError, match=r"cannot be borrowed: .*Cannot allocate memory"):
            all_taken(lender)
        until(lambda: not offer.borrowers)


def test_closing_before_a_thread_has_started(place, monkeypatch):
    """Whoever interrupts may come between the two."""
    lender = Lender(Address("127.0.0.1", 0), TOKEN, place)

    def interrupted(thread):
        raise KeyboardInterrupt

    with socket.create_connection((lender.address.host, lender.address.port)) as connection:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lender.serve()
        monkeypatch.undo()
        assert connection.recv(1) == b""
        lender._threads.add(threading.Thread())
        lender.close()


@pytest.mark.parametrize("kind", [READ, TOLD, 7])
def test_a_lender_that_sends_something_else(kind, place, monkeypatch):
    """With the token, and a right MAC."""
    monkeypatch.setattr(tcp_lender, "DATA", kind)
    wrong = pytest.raises(CorruptionError, match="something else than it was asked for")
    with offering(place), listening(place) as lender, taking(lender) as source, wrong:
        all_of(source)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_withdrawal_waits_for_who_copies(place):
    with offering(place) as offer, listening(place) as lender, taking(lender) as source:
        with pytest.raises(BusyError, match="1 other processes are still copying"):
            offer.withdraw(0.05)
        assert all_of(source) == DATA_LENT
        source.close()
        offer.withdraw(10)
        with pytest.raises(StorageError, match="nobody offers"):
            taking(lender).__enter__()


def test_while_it_is_withdrawn_only_who_copies_goes_on(place):
    with offering(place) as offer, listening(place) as lender, taking(lender) as source:
        thread = threading.Thread(target=offer.withdraw, args=(10,))
        thread.start()
        until(lambda: not offers.offered(place, CONTENT))
        with pytest.raises(StorageError, match="nobody offers"):
            taking(lender).__enter__()
        assert all_of(source) == DATA_LENT and offer.borrowers == 1
        source.close()
        thread.join()


def test_a_taker_that_is_killed_gives_back(place):
    with offering(place) as offer, listening(place) as lender:
        command = [sys.executable, "-c", TAKER, str(lender.address.port), TOKEN.decode(), CONTENT, str(len(DATA_LENT))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "taking\n" and offer.borrowers == 1
            process.kill()
        offer.withdraw(10)
        assert not lender.takers


def test_a_lender_that_is_killed(place):
    with offering(place) as offer:
        command = [sys.executable, "-c", LENDER, str(place), TOKEN.decode()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            address = Address("127.0.0.1", int(process.stdout.readline()))
            with taking(address) as source:
                read_bytes(source, BEGIN, 10)
                process.kill()
                process.wait()
                with pytest.raises(StorageError, match="has gone"):
                    all_of(source)
            with pytest.raises(StorageError, match=r"nobody lends weights at .* refused; start 'thaw lend'"):
                taking(address).__enter__()
        offer.withdraw(10)


def test_closing_ends_takers(place):
    with offering(place) as offer:
        with listening(place) as lender, taking(lender) as source:
            lender.close()
            with pytest.raises(StorageError, match="has gone"):
                all_of(source)
        until(lambda: not offer.borrowers)


def test_an_address_that_is_taken(place):
    with (
        listening(place) as lender,
        pytest.raises(StorageError, match=r"nothing can listen at .*already in use.*--listen"),
    ):
        Lender(lender.address, TOKEN, place)
    with pytest.raises(StorageError, match="nothing can listen at"):
        Lender(Address("nowhere.invalid", 0), TOKEN, place)
    with pytest.raises(StorageError, match=r"nobody lends weights at nowhere\.invalid:1"):
        TcpSource(Address("nowhere.invalid", 1), TOKEN, CONTENT, 0, 1)


def test_without_a_descriptor_for_those_who_come(place, monkeypatch):
    tried, real = [], socket.socket.accept

    def accept(listening):
        if listening.family == socket.AF_INET and len(tried) < 2:
            tried.append(time.monotonic())
            raise OSError(24, "too many files")
        return real(listening)

    with offering(place), listening(place) as lender:
        monkeypatch.setattr(socket.socket, "accept", accept)
        with taking(lender) as source:
            assert all_of(source) == DATA_LENT
    assert len(tried) == 2 and tried[1] - tried[0] > 0.05


WITHOUT_TORCH = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_lender import Lender
lender = Lender(Address("127.0.0.1", 0), bytes.fromhex(sys.argv[1]), Path(sys.argv[2]))
print(lender.address.port, flush=True)
lender.serve()
"""


def test_a_lender_needs_no_torch(place):
    """The first who takes would wait for its import."""
    command = [sys.executable, "-c", WITHOUT_TORCH, TOKEN.hex(), str(place)]
    with offering(place), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as lender:
        try:
            with contextlib.closing(
                TcpSource(Address("127.0.0.1", int(lender.stdout.readline())), TOKEN, CONTENT, BEGIN, len(DATA_LENT))
            ) as source:
                assert all_of(source) == DATA_LENT
        finally:
            lender.kill()


# --- a GPU's, made up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False])
def test_gpu(locked, driver, place, monkeypatch):
    """Runs of several allocations, in another order there than here; into memory that is page-locked, or may not be."""
    if not locked:
        driver.refuse["cuMemHostRegister_v2"] = 0
    monkeypatch.setattr(lending, "by_driver", lambda device: device.type == "cuda")
    monkeypatch.setattr(lending, "device_at", lambda bus: {"0000:3b:00.0": 0}[bus])
    with Context(0) as context:
        blocks = [context.driver.made("cuMemAlloc_v2", size) for size in (4096 + RUNS[2], 64 + RUNS[0])]
        addresses = [blocks[1] + 64, blocks[0] + 1, blocks[0] + 4096]
        for number, address in enumerate(addresses):
            begin = sum(RUNS[:number])
            ctypes.memmove(address, DATA_LENT[begin : begin + RUNS[number]], RUNS[number])
        lent = Lent(list(zip(addresses, RUNS, strict=True)), torch.device("cuda", 0))
        offer = Offer(place, CONTENT, lent.told)
        with listening(place) as lender, taking(lender) as source:
            assert all_of(source) == DATA_LENT
            assert read_bytes(source, BEGIN + RUNS[0] - 3, 7) == DATA_LENT[RUNS[0] - 3 : RUNS[0] + 4]
        offer.withdraw(10)
        assert not +driver.opened, "everything is unmapped"
        assert driver.calls.count("cuMemHostRegister_v2") >= 1 and not driver.locked
        context.enter()
        for block in blocks:
            context.driver.call("cuMemFree_v2", block)
    driver.current.context = 0x107


def test_told_by_an_offer_in_other_words(place):
    for told in ({"bytes": -1}, {"bytes": "5"}, {}, {"gpu": 5}):
        offer = Offer(place, CONTENT, lambda told=told: (told, []))
        with listening(place) as lender, pytest.raises(MismatchError, match="in other words"):
            taking(lender).__enter__()
        offer.withdraw(10)
