"""Weights that an engine takes from one that has them: equal, from the right one, and storage where there is none."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engines.vllm.forks import PARALLEL
from tests.engines.vllm.swap_models import Running, directory, engine, fine_tune, freeze
from tests.engines.vllm.test_kv import run_script
from tests.engines.vllm.test_swap import ARGS, environment, fine_tuned, ranks
from tests.engines.vllm.test_swap_fill import base, same, swap
from tests.weights.modules import state
from tests.weights.test_restore import base as small
from tests.weights.test_restore import module, other
from tests.zygote.running import until

from thaw_vllm import freeze_model
from thaw_vllm.engines.vllm import automatic, loader, offering, versions
from thaw_vllm.engines.vllm.loader import LoaderConfig
from thaw_vllm.engines.vllm.swap import filled
from thaw_vllm.errors import BusyError, CorruptionError, MismatchError, StorageError, UnsupportedError, UsageError
from thaw_vllm.transport import offers
from thaw_vllm.transport.offers import asked, offered
from thaw_vllm.transport.peer_token import lender_token
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_lender import Lender
from thaw_vllm.weights import peers
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_rank
from thaw_vllm.weights.reading import RestoreOptions, reading

__all__ = ["base", "directory", "engine", "fine_tune", "freeze"]  # fixtures

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of offers, for this test alone."""
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
    return offers.directory(os.environ)


@pytest.fixture
def lending(directory: Path, base: Path, engine: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """An engine that offers its weights; others of this process may take them."""
    monkeypatch.setattr(peers, "own", lambda path: False)
    running = engine(directory, base)
    running.ask("thaw_offer")
    yield running
    running.ask("thaw_withdraw")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """One without an engine, for what is the same with any; noted as filled from ``w.thaw``."""
    model, path = module(**small()), tmp_path / "w.thaw"
    report = freeze_model(model, path)
    noted = SimpleNamespace(path=str(path), content=report.content, broken=None)
    monkeypatch.setattr(offering, "may_change", lambda *_: None)
    monkeypatch.setattr(offering, "unknown", lambda _: None)
    monkeypatch.setattr(offering, "noted", lambda _: noted)
    yield model
    offering.withdraw(model)


def test_a_withdrawal_that_is_refused_leaves_the_offer(model: torch.nn.Module, place: Path):
    before = offering.lend(model, None, 0)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch, asked(Path(before["socket"]), before["content"]):
        patch.setattr(offers.Offer.withdraw, "__defaults__", (0.05,))
        with pytest.raises(BusyError, match="still copying this one's weights"):
            offering.withdraw(model)
    assert offering.lend(model, None, 0) == before  # type: ignore[arg-type]
    assert [str(path) for path in offered(place, before["content"])] == [before["socket"]]


@pytest.mark.usefixtures("model")
def test_a_model_that_goes_while_somebody_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offering, "_AT_THE_END", 0.05)
    goes = module(**small())
    told = offering.lend(goes, None, 0)  # type: ignore[arg-type]
    thread = goes._thaw_offer._thread
    with asked(Path(told["socket"]), told["content"]):
        del goes
        gc.collect()
        assert not Path(told["socket"]).exists() and thread.is_alive()
    until(lambda: not thread.is_alive(), "the offer's thread to end with the last borrower")


@pytest.mark.parametrize("error", [UnicodeEncodeError("utf-8", "x", 0, 1, "y"), MemoryError(), KeyError("gpu")])
def test_the_file_where_a_peer_comes_to_whatever(error: Exception, model: torch.nn.Module, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(offering, "take", fail)
    into = module(**other())
    with open_rank(str(tmp_path / "w.thaw"), 0) as opened:
        targets, options = fillable(into), RestoreOptions()
        with reading(opened.source, targets[0].values(), options) as way:
            report = offering.restored(opened, *targets, options, way, "auto")
            with pytest.raises(type(error)):
                offering.restored(opened, *targets, options, way, "/a.sock")
    assert "; not from a peer: " in report.why and state(into) == state(model)


def told() -> dict[str, Any]:
    """What the last restore in this process came to."""
    return dataclasses.asdict(loader.last_report)  # type: ignore[arg-type]


def taking(directory: Path, snapshot: Path, load: Callable, thaw_args: Callable, **options: Any) -> Running:
    loaded = load(directory, **thaw_args(snapshot, **options))
    return Running(loaded.model, loaded.config)


def test_another_engine_has_equal_weights(
    lending: Running, directory: Path, base: Path, load: Callable, thaw_args: Callable
):
    running = taking(directory, base, load, thaw_args, peer="auto", verify=False)
    assert same(running, lending.bytes_of())
    report = told()
    assert report["route"] == f"peer: host memory of process {os.getpid()} → host memory"
    assert report["verified"] == "xxh3", "whatever was asked for"
    assert next(iter(report["seconds"])) == "open" and report["seconds"]["total"] > 0
    assert running.ask("thaw_swap_check", str(base))["tensors"] == report["tensors"], "it may be swapped as any other"
    again = lending.ask("thaw_offer")
    assert again == lending.ask("thaw_offer"), "it goes on offering"
    named = taking(directory, base, load, thaw_args, peer=again["socket"])
    assert same(named, lending.bytes_of())


@pytest.fixture
def address(place: Path) -> Iterator[str]:
    """Of a lender over TCP, beside the engines."""
    lender = Lender(Address("127.0.0.1", 0), lender_token(None, os.environ)[0], place)
    thread = threading.Thread(target=lender.serve)
    thread.start()
    yield f"tcp://{lender.address}"
    lender.close()
    thread.join()


def test_another_engine_has_equal_weights_over_tcp(
    lending: Running, directory: Path, base: Path, load: Callable, thaw_args: Callable, address: str
):
    running = taking(directory, base, load, thaw_args, peer=address, verify=False)
    assert same(running, lending.bytes_of())
    report = told()
    assert report["route"] == f"peer: {address.removeprefix('tcp://')} over TCP → host memory"
    assert report["verified"] == "xxh3", "whatever was asked for"
    assert offering.expected(address, str(base))
    next(lending.model.parameters()).data.view(-1)[5] += 1
    with pytest.raises(CorruptionError, match=r"the weights at 127\.0\.0\.1"):
        taking(directory, base, load, thaw_args, peer=address)
    lending.ask("thaw_withdraw")
    with pytest.raises(StorageError, match="nobody offers these weights"):
        taking(directory, base, load, thaw_args, peer=address)


def test_whether_to_make_ready_for_reading(lending: Running, base: Path, fine_tune: Callable):
    assert offering.expected("auto", str(base)) and offering.expected("/any.sock", str(base))
    assert not offering.expected("", str(base)) and not offering.expected("auto", str(fine_tune()))
    lending.ask("thaw_withdraw")
    assert not offering.expected("auto", str(base)) and not offering.expected("auto", "nowhere.thaw")


def test_one_that_took_them_offers_them_too(
    lending: Running, directory: Path, base: Path, place: Path, load: Callable, thaw_args: Callable
):
    running = taking(directory, base, load, thaw_args, peer="auto", offer=True)
    assert len(list(place.glob("*.sock"))) == 2
    lending.ask("thaw_withdraw")
    assert same(taking(directory, base, load, thaw_args, peer="auto"), running.bytes_of())
    del running
    until(lambda: not list(place.glob("*.sock")), "the offer to end with the model")


def test_one_that_was_frozen_offers_them(directory: Path, engine: Callable, load: Callable, thaw_args: Callable,
    place: Path, tmp_path: Path):  # fmt: skip
    path = tmp_path / "new.thaw"
    loaded = load(directory, **thaw_args(path, mode="freeze", offer=True))
    assert len(list(place.glob("*.sock"))) == 1
    offering.withdraw(loaded.model)


def test_with_the_cache_of_snapshots(
    directory: Path, engine: Callable, load: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first start freezes and offers, the second takes."""
    monkeypatch.setattr(peers, "own", lambda path: False)
    extra = {"mode": "auto", "cache": str(tmp_path / "kept"), "peer": "auto", "offer": True}
    first, second = (load(directory, load_format="thaw", model_loader_extra_config=extra) for _ in range(2))
    assert loader.last_outcome is not None and loader.last_outcome.how == automatic.THAWED
    assert told()["route"].startswith("peer: ") and len(list(place.glob("*.sock"))) == 2
    assert first.processed() == second.processed()
    for loaded in (first, second):
        offering.withdraw(loaded.model)


@pytest.mark.parametrize("peer", ["/nowhere/a.sock", "tcp://127.0.0.1:1"])
def test_a_cached_snapshot_outlives_a_peer_that_is_not_there(
    peer: str, directory: Path, load: Callable, tmp_path: Path
):
    kept = tmp_path / "kept"
    for more in ({}, {"peer": peer}):
        extra = {"mode": "auto", "cache": str(kept)} | more
        load(directory, load_format="thaw", model_loader_extra_config=extra)
    assert loader.last_outcome is not None and loader.last_outcome.how == automatic.LOADED
    assert len(list(kept.glob("*.thaw"))) == 1


def test_storage_where_nobody_has_them(
    directory: Path, base: Path, engine: Callable, load: Callable, thaw_args: Callable
):
    taking(directory, base, load, thaw_args, peer="auto")
    assert "not from a peer: nobody on this host offers the weights of" in told()["why"]
    with pytest.raises(StorageError, match="nobody offers weights at"):
        taking(directory, base, load, thaw_args, peer="/nowhere/a.sock")


def test_storage_where_a_peer_has_wrong_bytes(
    lending: Running, directory: Path, base: Path, load: Callable, thaw_args: Callable
):
    right = lending.bytes_of()
    name, parameter = next(iter(lending.model.named_parameters()))
    parameter.data.view(-1)[5] += 1
    running = taking(directory, base, load, thaw_args, peer="auto")
    assert same(running, right)
    assert f"checksum of {name!r}" in told()["why"]
    with pytest.raises(CorruptionError):
        taking(directory, base, load, thaw_args, peer=lending.ask("thaw_offer")["socket"])


def test_another_snapshot_is_not_taken(
    lending: Running, directory: Path, fine_tune: Callable, load: Callable, thaw_args: Callable
):
    path = fine_tune()
    running = taking(path.parent / "tuned", path, load, thaw_args, peer="auto")
    assert "nobody on this host" in told()["why"]
    assert not same(running, lending.bytes_of())
    with pytest.raises(MismatchError, match="other weights are offered here"):
        taking(path.parent / "tuned", path, load, thaw_args, peer=lending.ask("thaw_offer")["socket"])


def test_what_is_swapped_is_offered_no_more(
    lending: Running, base: Path, place: Path, fine_tune: Callable, monkeypatch: pytest.MonkeyPatch
):
    path, before = fine_tune(), lending.ask("thaw_offer")
    monkeypatch.setattr(offers.Offer.withdraw, "__defaults__", (0.05,))
    with asked(Path(before["socket"]), before["content"]):
        with pytest.raises(UnsupportedError, match="still copying this one's weights"):
            swap(lending, path)
        assert offering.noted(lending.model).content == before["content"], "nothing was changed"
    until(lambda: "broken" not in swap(lending, path), "the swap")
    assert not list(place.glob("*.sock"))
    after = lending.ask("thaw_offer")
    assert after["content"] == lending.check(path)["content"] != before["content"]
    assert [str(one) for one in offered(place, after["content"])] == [after["socket"]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: filled.renote(model, content="00" * 32), "others have been swapped in"),
        (lambda model: filled.renote(model, broken="x"), "others have been swapped in"),
        (lambda model: filled.forget(model), "loaded again"),
        (lambda model: setattr(next(model.parameters()), "data", next(model.parameters()).clone()), "somewhere else"),
    ],
)
def test_a_look_before_anybody_is_told(change: Callable, why: str, lending: Running):
    told = lending.ask("thaw_offer")
    change(lending.model)
    with pytest.raises(UnsupportedError, match=f"are not lent: .*{why}"), asked(Path(told["socket"]), told["content"]):
        pass


def test_what_may_not_be_offered(directory: Path, base: Path, engine: Callable, monkeypatch: pytest.MonkeyPatch):
    running = engine(directory, base)
    with monkeypatch.context() as patch:
        patch.setattr(running.vllm_config.model_config, "enable_sleep_mode", True)
        with pytest.raises(UnsupportedError, match="put to sleep, which gives its memory away"):
            running.ask("thaw_offer")
    with pytest.raises(UnsupportedError, match="nobody noted what loading filled"):
        engine(directory, None).ask("thaw_offer")
    with monkeypatch.context() as patch:
        patch.setattr(versions, "identity_processing", lambda model: "it is packed")
        with pytest.raises(UnsupportedError, match="cannot be offered to others: it is packed"):
            running.ask("thaw_offer")
    base.unlink()
    with pytest.raises(StorageError, match="does not exist"):
        running.ask("thaw_offer")


def test_an_engine_that_cannot_offer_starts_all_the_same(
    directory: Path, base: Path, place: Path, load: Callable, thaw_args: Callable
):
    """vLLM's CPU build packs weights."""
    load(directory, **thaw_args(base, offer=True))
    assert not place.exists() and loader.last_report is not None


@pytest.mark.parametrize(
    "given",
    [
        {"snapshot": "w", "peer": 1}, {"snapshot": "w", "offer": "yes"}, {"peer": "auto"}, {"offer": True},
        {"snapshot": "w", "mode": "freeze", "peer": "auto"}, {"snapshot": "w", "shared": "s", "peer": "auto"},
        {"snapshot": "w", "shared": "s", "offer": True}, {"snapshot": "w", "peer": "tcp://host"},
        {"snapshot": "w", "peer": "tcp://host:0"},
    ],
)  # fmt: skip
def test_options_that_cannot_be_right(given: dict[str, Any]):
    with pytest.raises(UsageError):
        LoaderConfig.parse(given)
    assert LoaderConfig.parse({"snapshot": "w"}) == LoaderConfig("w", "thaw", peer="", offer=False)


def judge(found: dict[str, Any], where: str, into: str) -> None:
    """What the script of several engines came to; ``where`` and ``into`` the memory of each rank."""
    first, second, third = found["reports"]
    ranks = range(len(first))
    assert not any(report["route"].startswith("peer") for report in first)
    for rank in ranks:
        route = f"peer: {where.format(rank)} of process {found['pids'][0][rank]} → {into.format(rank)}"
        assert second[rank]["route"] == route
        if found["peer"] == "auto":
            assert "nobody on this host" in third[rank]["why"], "it was swapped, and its weights are others"
        else:
            assert (
                third[rank]["route"] == f"peer: {found['peer'].removeprefix('tcp://')} over TCP → {into.format(rank)}"
            )
    assert found["answers"][0] == found["answers"][1] == found["answers"][2] != found["swapped"]
    assert found["digests"][0] == found["digests"][1] == found["digests"][2]


def test_real_engines(checkpoints: Callable, load: Callable, thaw_args: Callable, place: Path, tmp_path: Path):
    """Each of several processes; the last over TCP."""
    made = fine_tuned(checkpoints("untied"), tmp_path)
    for which in made.values():
        load(which, **thaw_args(which.with_suffix(".thaw"), mode="freeze"))
    first, second = (str(made[name].with_suffix(".thaw")) for name in ("first", "second"))
    asked = {"model": str(made["first"]), "snapshot": first, "second": second, "engine_args": ARGS, "lend": True}
    more = environment() | {"THAW_STATE_DIR": str(place.parent)}
    judge(run_script("peer_engines.py", tmp_path, asked, more), "host memory", "host memory")


@pytest.mark.slow
def test_real_engines_of_two_ranks(checkpoints: Callable, place: Path, tmp_path: Path):
    """Each rank takes its own share from the rank that has it."""
    made = ranks(checkpoints, tmp_path)
    asked = {"model": made["model"], "snapshot": made["first"], "second": made["second"], "lend": True}
    asked["engine_args"] = ARGS | {"tensor_parallel_size": 2}
    more = environment() | PARALLEL | {"THAW_STATE_DIR": str(place.parent)}
    judge(run_script("peer_engines.py", tmp_path, asked, more), "host memory", "host memory")
