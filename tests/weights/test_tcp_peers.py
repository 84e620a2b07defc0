"""Weights taken over TCP: bit for bit, from the right ones, or not at all."""

import _thread
import contextlib
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.transport.tcp_proxy import Proxy, flip
from tests.weights.modules import plans, state
from tests.weights.test_peers import lender, offering
from tests.weights.test_restore import base, module, other

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, MismatchError, StorageError, UnsupportedError, UsageError
from thaw_vllm.transport import tcp_channel
from thaw_vllm.transport.peer_token import VARIABLE, lender_token
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_lender import Lender
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.peers import lay_out, take
from thaw_vllm.weights.reading import RestoreOptions

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tcp_channel, "WRONG", 0.05)


@pytest.fixture
def path(tmp_path):
    freeze_model(module(**base()), tmp_path / "w.thaw")
    return tmp_path / "w.thaw"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "lender" / "offers"


@contextlib.contextmanager
def listening(place):
    """The address as engines name it."""
    found = Lender(Address("127.0.0.1", 0), lender_token(None, os.environ)[0], place)
    thread = threading.Thread(target=found.serve, name="thaw-test-lender")
    thread.start()
    try:
        yield f"tcp://{found.address}"
    finally:
        found.close()
        thread.join()


def port_of(peer):
    return "127.0.0.1", int(peer.rpartition(":")[2])


def taken(path, peer, model=None, **options):
    model = module(**other()) if model is None else model
    with open_snapshot(path) as opened:
        report = take(opened, *fillable(model), RestoreOptions(**options), peer)
    return model, report


@pytest.mark.soak
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_any_module(tmp_path, place, plan):
    path, frozen = tmp_path / "w.thaw", plan.build(1)
    freeze_model(frozen, path, force=True)
    try:
        with offering(path, place, frozen), listening(place) as peer:
            model, report = taken(path, peer, plan.build(2))
    except UnsupportedError as error:
        assert "lies in another order" in str(error)
        return
    assert state(model) == state(frozen)
    assert report.verified == "xxh3"


@pytest.mark.parametrize("compress", [False, True])
def test_from_another_process(compress, path, place):
    freeze_model(module(**base()), path, force=True, compress=compress)
    told = []
    with lender(path, place), listening(place) as peer:
        model, report = taken(path, peer, verify=False, progress=lambda *done: told.append(done))
    assert state(model) == state(module(**base()))
    assert report.route == f"peer: {peer.removeprefix('tcp://')} over TCP → host memory"
    assert report.why == "an engine there has these weights already, and offers them"
    assert (report.path, report.tensors, report.bytes) == (str(path), 5, report.stored)
    assert report.verified == "xxh3", "whatever was asked for"
    assert told[-1] == (report.bytes, report.bytes)


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_many_chunks_by_several_threads(workers, place, tmp_path):
    weights = {f"w{number}": torch.randn(700, 1000) for number in range(9)}
    path, frozen = tmp_path / "large.thaw", module(**weights)
    freeze_model(frozen, path)
    with offering(path, place, frozen), listening(place) as peer:
        model, _ = taken(path, peer, module(**{name: torch.zeros(700, 1000) for name in weights}), workers=workers)
    assert state(model) == state(frozen)


def test_a_target_of_another_order(path, place):
    """Element by element, from verified bytes."""
    weight = torch.zeros(4, 3).t()
    with offering(path, place, module(**base())), listening(place) as peer:
        model, _ = taken(path, peer, module(**(other() | {"weight": weight, "tied": weight})))
    assert not weight.is_contiguous() and state(model) == state(module(**base()))


def test_wrong_bytes_with_a_right_mac(path, place):
    """The lender's memory has changed."""
    with (
        lender(path, place, "changed"),
        listening(place) as peer,
        pytest.raises(CorruptionError, match=rf"'the weights at {peer[6:]}'.*checksum of 'weight'"),
    ):
        taken(path, peer, verify=False)


def test_bytes_that_are_altered_on_the_way(path, place):
    """Found by the MAC, not by the sums."""
    with open_snapshot(path) as opened:
        count = sum(size for _, size in lay_out(opened.snapshot)[1])
    at = 42 + 33 + 17 + len(f'{{"bytes": {count}}}') + 32 + 17 + 3
    with (
        offering(path, place, module(**base())),
        listening(place) as peer,
        Proxy(port_of(peer), down=flip(at)) as proxy,
        pytest.raises(CorruptionError, match="altered on the way"),
    ):
        taken(path, f"tcp://127.0.0.1:{proxy.address[1]}")


def test_other_weights_are_not_taken(path, place, tmp_path):
    freeze_model(module(**other()), tmp_path / "other.thaw")
    with (
        lender(path, place),
        listening(place) as peer,
        pytest.raises(StorageError, match="nobody offers these weights"),
    ):
        taken(tmp_path / "other.thaw", peer)


def test_who_offers_may_refuse(path, place):
    with (
        offering(path, place, module(**base()), lambda: "they were swapped"),
        listening(place) as peer,
        pytest.raises(UnsupportedError, match=r"of process \d+ are not lent: they were swapped"),
    ):
        taken(path, peer)


def test_a_model_of_another_kind(path, place):
    with (
        offering(path, place, module(**base())),
        listening(place) as peer,
        pytest.raises(MismatchError, match="thaw it into the model it was frozen from"),
    ):
        taken(path, peer, module(**(other() | {"last": torch.zeros(6)})))


def test_another_token(path, place, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("f" * 32)
    (tmp_path / "token").chmod(0o600)
    with offering(path, place, module(**base())), listening(place) as peer:
        monkeypatch.setenv(VARIABLE, str(tmp_path / "token"))
        with pytest.raises(MismatchError, match="has another token than this side"):
            taken(path, peer)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "state" / "peer-token"))
        taken(path, peer)


def test_without_a_token(path):
    with pytest.raises(StorageError, match="no peer token is kept here"):
        taken(path, "tcp://127.0.0.1:1")


def test_nobody_there(path):
    lender_token(None, os.environ)
    with pytest.raises(StorageError, match=r"nobody lends weights at 127\.0\.0\.1:1: .* start 'thaw lend' there"):
        taken(path, "tcp://127.0.0.1:1")
    with pytest.raises(UsageError, match="is no address of a peer"):
        taken(path, "tcp://127.0.0.1")


def test_ctrl_c_while_a_lender_stands_still(place, tmp_path, interruptible):
    """It is not waited for."""
    path, frozen = tmp_path / "large.thaw", module(w=torch.randn(8 << 20))
    freeze_model(frozen, path)
    still = threading.Event()

    def stand_still(at, data):
        if at > 4 << 20:
            if not still.is_set():
                _thread.interrupt_main()
            still.set()
            ended.wait(50)
        return data

    ended = threading.Event()
    with offering(path, place, frozen), listening(place) as peer, Proxy(port_of(peer), down=stand_still) as proxy:
        try:
            with pytest.raises(KeyboardInterrupt):
                taken(
                    path,
                    f"tcp://127.0.0.1:{proxy.address[1]}",
                    module(w=torch.zeros(8 << 20)),
                    workers=2,
                )
            assert still.is_set() and not ended.is_set()
        finally:
            ended.set()


def test_a_lender_that_ends_in_the_midst(place, tmp_path):
    """What came so far is not taken for all."""
    path, frozen = tmp_path / "large.thaw", module(w=torch.randn(8 << 20))
    freeze_model(frozen, path)
    proxies = []

    def cut(at, data):
        if at > 4 << 20:
            proxies[0].cut()
        return data

    with offering(path, place, frozen), listening(place) as peer, Proxy(port_of(peer), down=cut) as proxy:
        proxies.append(proxy)
        with pytest.raises(StorageError, match="has gone"):
            taken(path, f"tcp://127.0.0.1:{proxy.address[1]}", module(w=torch.zeros(8 << 20)))
