"""What ranks tell each other before they thaw: made-up exchanges of threads, and two real ranks."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engines.vllm.test_ranks import run, thaw

from thaw_vllm.engines.vllm import exchange
from thaw_vllm.engines.vllm.exchange import Together
from thaw_vllm.errors import CorruptionError, ReplacedError, StorageError, ThawError
from thaw_vllm.weights.open import open_rank
from thaw_vllm.weights.ranks import MAX_MESSAGE, Exchange


def ranks(*work: Callable[[Together], None]) -> list[BaseException | None]:
    """How each rank's thaw ended; each of them exchanges once."""
    everyone, barrier = [b""] * len(work), threading.Barrier(len(work))
    ended: list[BaseException | None] = [None] * len(work)

    def at(rank: int) -> Exchange:
        def exchanged(message: bytes) -> list[bytes]:
            assert len(message) <= MAX_MESSAGE
            everyone[rank] = message
            barrier.wait(30)
            return list(everyone)

        return exchanged

    def one(rank: int) -> None:
        try:
            with Together("w.thaw", at(rank)) as begin:
                work[rank](begin)
        except BaseException as error:
            ended[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_all_are_ready():
    assert ranks(lambda begin: begin("a"), lambda begin: begin("a")) == [None, None]


def test_ranks_that_have_opened_different_sets():
    """The manifest was replaced between two of them."""
    for error in ranks(lambda begin: begin("a"), lambda begin: begin("b")):
        assert isinstance(error, ReplacedError)
        assert "'w.thaw' was replaced by another set while the ranks opened it" in str(error)


@pytest.mark.parametrize("text", ["no such file", "\x01" * 5000, "\U0001f600" * 5000, "\udcff"])
@pytest.mark.parametrize("kind", [StorageError, CorruptionError, OSError, KeyboardInterrupt])
def test_one_that_cannot(kind: type[BaseException], text: str):
    """It raises its own error, and the others one of its kind that names it."""
    own = kind(text)

    def fails(begin: Together) -> None:
        raise own

    ready, failed = ranks(lambda begin: begin("a"), fails)
    assert failed is own
    assert type(ready) is (kind if issubclass(kind, ThawError) else ThawError)
    assert str(ready).startswith("rank 1 cannot thaw 'w.thaw': ") and str(ready).endswith("; nothing was copied")
    assert "no such file" in str(ready) or len(text) != 12


def test_one_that_fails_later_says_nothing_more():
    def fails(begin: Together) -> None:
        begin("a")
        raise StorageError("a bad sector")

    ready, failed = ranks(lambda begin: begin("a"), fails)
    assert ready is None and str(failed) == "a bad sector"


def test_one_that_has_died():
    def broken(_: bytes) -> list[bytes]:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(ThawError, match=r"ranks have lost each other before 'w\.thaw' was thawed"):
        Together("w.thaw", broken)("a")
    with pytest.raises(StorageError, match="its own"), Together("w.thaw", broken):
        raise StorageError("its own")


def test_a_single_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "cpu_group", lambda: (None, 1))
    with Together("w.thaw") as begin:
        begin(None)


@pytest.mark.vllm
def test_two_ranks(checkpoints: Callable, tmp_path: Path):
    """The file of one is lost: no rank writes, each says why, and they can go on together."""
    base, path, torn = {"model": str(checkpoints("tied"))}, tmp_path / "w.thaw", tmp_path / "torn" / "w.thaw"
    ((frozen,), _) = run(tmp_path / "run", [base | thaw(path, mode="freeze")], tp=2)
    assert frozen["report"] == "FreezeReport"
    shutil.copytree(tmp_path, torn.parent, ignore=lambda *_: ["run", torn.parent.name])
    with open_rank(torn, 1) as opened:
        member = Path(opened.source.name)
    member.unlink()
    first, second = run(tmp_path / "run", [base | thaw(torn), base | thaw(path)], tp=2)
    assert first[0]["error"].startswith("CorruptionError: rank 1 cannot thaw") and member.name in first[0]["error"]
    assert second[0]["error"].startswith("CorruptionError: rank 1 of ")
    assert first[1]["report"] == second[1]["report"] == "RestoreReport"
