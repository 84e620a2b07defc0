"""Weights taken from a process that has them: bit for bit, from the right one, or not at all."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.weights.modules import plans, state
from tests.weights.test_restore import base, module, other

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, MismatchError, StorageError, UnsupportedError, UsageError
from thaw_vllm.transport import lending, offers
from thaw_vllm.weights import peers
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.peers import offer, take
from thaw_vllm.weights.reading import RestoreOptions

pytestmark = pytest.mark.usefixtures("no_leaks")

LENDER = """
import os, sys, time
from pathlib import Path
import torch
from tests.weights.test_restore import base, module
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights import peers
path, place, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
model = module(**base())
if what == "changed":
    model.weight[1, 2] += 1
def refuse():
    if what == "dies":
        os._exit(1)
with open_snapshot(path, with_chunks=False) as opened:
    made = peers.offer(opened, *fillable(model), refuse, place)
print(made.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
    freeze_model(module(**base()), tmp_path / "w.thaw")
    return tmp_path / "w.thaw"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "state" / "offers"


@contextlib.contextmanager
def offering(path, place, model, refuse=lambda: None):
    with open_snapshot(path, with_chunks=False) as opened:
        made = offer(opened, *fillable(model), refuse, place)
    try:
        yield made
    finally:
        made.withdraw()


@contextlib.contextmanager
def lender(path, place, what="lends"):
    command = [sys.executable, "-c", LENDER, str(path), str(place), what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def taken(path, place, peer="auto", model=None, **options):
    model = module(**other()) if model is None else model
    with open_snapshot(path) as opened:
        report = take(opened, *fillable(model), RestoreOptions(**options), peer, place)
    return model, report


@pytest.mark.soak
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_any_module(tmp_path, place, plan):
    path, frozen = tmp_path / "w.thaw", plan.build(1)
    freeze_model(frozen, path, force=True)
    try:
        with offering(path, place, frozen) as made:
            model, report = taken(path, place, str(made.path), plan.build(2))
    except UnsupportedError as error:
        assert "lies in another order" in str(error)
        return
    assert state(model) == state(frozen)
    assert report.verified == "xxh3"


@pytest.mark.parametrize("compress", [False, True])
def test_from_another_process(compress, path, place):
    freeze_model(module(**base()), path, force=True, compress=compress)
    told = []
    with lender(path, place) as (process, socket):
        for peer in ("auto", socket):
            model, report = taken(path, place, peer, progress=lambda *done: told.append(done))
            assert state(model) == state(module(**base()))
            assert report.route == f"peer: host memory of process {process.pid} → host memory"
            assert report.why == "it has these weights already, and offers them"
            assert (report.path, report.tensors, report.bytes) == (str(path), 5, report.stored)
            assert told[-1] == (report.bytes, report.bytes)


def test_two_at_once(path, place):
    found = []
    with lender(path, place):
        threads = [threading.Thread(target=lambda: found.append(taken(path, place)[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [state(model) for model in found] == [state(module(**base()))] * 2


def test_weights_that_have_changed_are_found_out(path, place):
    with (
        lender(path, place, "changed") as (process, _),
        pytest.raises(CorruptionError, match=rf"'the weights of process {process.pid}'.*checksum of 'weight'"),
    ):
        taken(path, place, verify=False)


def test_a_lender_that_dies(path, place):
    with lender(path, place, "dies") as (process, socket):
        with pytest.raises(StorageError, match=r"has ended|reset"):
            taken(path, place)
        process.wait()
        with pytest.raises(StorageError, match="nobody on this host offers"):
            taken(path, place)
        with pytest.raises(StorageError, match="nobody offers weights at"):
            taken(path, place, socket)


def test_a_lender_that_dies_while_its_bytes_are_copied(path, place):
    """They are the borrower's to read until it lets go of them, and checked."""
    with lender(path, place) as (process, _):

        def progress(*done):
            process.kill()
            process.wait()

        model, _ = taken(path, place, progress=progress)
    assert state(model) == state(module(**base()))


def test_another_lender_is_asked_where_one_refuses(path, place):
    with lender(path, place, "changed"), lender(path, place, "dies"), lender(path, place):
        model, _ = taken(path, place)
    assert state(model) == state(module(**base()))


def test_another_lender_is_asked_where_one_sends_what_is_no_memory(path, place, monkeypatch):
    """The first that is asked."""
    with open_snapshot(path) as opened:
        whole = sum(size for _, size in peers.lay_out(opened.snapshot)[1])
    no_memory = path.with_name("file")
    no_memory.write_bytes(bytes(whole))

    def told(_):
        return {"bytes": whole}, [os.open(no_memory, os.O_RDONLY)]

    def last(*asked):
        return sorted(offers.offered(*asked), key=lambda found: str(process.pid) in found.name)

    with lender(path, place) as (process, _), monkeypatch.context() as patch:
        patch.setattr(peers, "own", lambda path: False)
        patch.setattr(peers, "offered", last)
        patch.setattr(lending.Lent, "told", told)
        with offering(path, place, module(**base())):
            model, report = taken(path, place)
    assert state(model) == state(module(**base())) and f"process {process.pid}" in report.route


def test_a_lender_with_the_same_process_id(path, place):
    """As in two containers that share the directory."""
    with lender(path, place) as (process, socket):
        digest, _, token = Path(socket).name.split(".", 2)
        same = place / f"{digest}.{os.getpid()}.{token}"
        os.rename(socket, same)
        model, report = taken(path, place)
        assert state(model) == state(module(**base())) and f"process {process.pid}" in report.route


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_how_long_a_lender_may_take(device, path, place, monkeypatch):
    """One on the host copies first; any other has its answer."""
    monkeypatch.setattr(peers, "QUICK", 0.1)
    waited = []

    @contextlib.contextmanager
    def asked(path, content, patience):
        waited.append(patience)
        raise StorageError("nobody")
        yield

    monkeypatch.setattr(peers, "asked", asked)
    with pytest.raises(StorageError, match="nobody"):
        taken(path, place, str(place / "a.sock"), module(**other()).to(device))
    assert waited == [{"cpu": 60, "meta": 0.1}[device]]


def test_other_weights_are_not_taken(path, place, tmp_path):
    freeze_model(module(**other()), tmp_path / "other.thaw")
    with lender(path, place) as (_, socket):
        with pytest.raises(StorageError, match=r"nobody on this host offers the weights of '.*other\.thaw'"):
            taken(tmp_path / "other.thaw", place)
        with pytest.raises(MismatchError, match="other weights are offered here"):
            taken(tmp_path / "other.thaw", place, socket)


def test_a_lender_may_refuse(path, place):
    with offering(path, place, module(**base()), lambda: "they were swapped") as made:
        with pytest.raises(UnsupportedError, match=r"of process \d+ are not lent: they were swapped"):
            taken(path, place, str(made.path))
        with pytest.raises(StorageError, match="nobody on this host"):  # nobody takes from itself
            taken(path, place)


def test_a_model_of_another_kind(path, place):
    with lender(path, place), pytest.raises(MismatchError, match="thaw it into the model it was frozen from"):
        taken(path, place, model=module(**(other() | {"last": torch.zeros(6)})))
    with pytest.raises(MismatchError, match="thaw it into the model it was frozen from"):
        offering(path, place / "own", module(**(other() | {"last": torch.zeros(6)}))).__enter__()
    assert not list(place.glob("own"))


def test_what_lies_in_another_order_is_not_offered(path, place):
    weight = torch.empty(4, 3).t()
    with pytest.raises(UnsupportedError, match="'weight' lies in another order"):
        offering(path, place, module(**(other() | {"weight": weight, "tied": weight}))).__enter__()


def test_a_snapshot_without_its_chunks(path, place):
    with lender(path, place), open_snapshot(path, with_chunks=False) as opened:
        for peer in (peers.AUTO, "tcp://127.0.0.1:1"):
            with pytest.raises(UsageError, match="without its chunk table"):
                peers.take(opened, *fillable(module(**base())), RestoreOptions(), peer, place)


def test_what_is_given_back_by_a_thread(monkeypatch):
    """Each loan once, also where there is no thread for it; whoever waits waits for all of them."""
    ended, go = [], threading.Event()
    for number in range(3):
        loan = contextlib.ExitStack()
        loan.callback(lambda number=number: go.wait(10) and ended.append(number))
        peers._give_back(loan)
    assert not ended
    threading.Timer(0.1, go.set).start()
    peers.given_back()
    assert sorted(ended) == [0, 1, 2] and not peers._giving_back

    def none(_):
        raise RuntimeError("can't start new thread")

    loan = contextlib.ExitStack()
    loan.callback(lambda: ended.append(3))
    monkeypatch.setattr(threading.Thread, "start", none)
    peers._give_back(loan)
    assert ended[-1] == 3 and not peers._giving_back


def test_nothing_is_left(path, place):
    with offering(path, place, module(**base())) as made:
        taken(path, place, str(made.path))
    assert list(place.iterdir()) == [] and offers.offered(place, "00" * 32) == []
