"""Filling a model's own memory from another snapshot: what is there afterwards, and what a failure leaves."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engines.vllm.swap_models import Running, directory, engine, fine_tune, freeze

from thaw_vllm.engines.vllm.swap import fill as fill_module
from thaw_vllm.engines.vllm.swap import filled, pins
from thaw_vllm.errors import MismatchError, ReplacedError, StorageError, UnsupportedError
from thaw_vllm.weights.open import open_snapshot

__all__ = ["directory", "engine", "fine_tune", "freeze"]  # fixtures

pytestmark = pytest.mark.vllm


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What this worker holds page-locked; given back in the end."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(pins, "_held", kept)
    yield kept
    for one in kept.values():
        one.close()


@pytest.fixture
def base(directory: Path, freeze: Callable[..., Path]) -> Path:
    return freeze(directory)


def swap(running: Running, path: Path, *, verify: bool = True) -> dict[str, Any]:
    """As an engine core does it."""
    content = running.check(path)["content"]
    return running.ask("thaw_fill", {"path": str(path), "contents": [content], "verify": verify})


def same(running: Running, expected: dict[str, torch.Tensor]) -> bool:
    found = running.bytes_of()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def flip(path: Path, number: int = 1) -> None:
    """One bit of a chunk of a tensor, in the file itself."""
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
        storages = {tensor.storage for tensor in snapshot.index.tensors}
        chunks = [chunk for chunk in snapshot.chunks if chunk.storage in storages]
        at = snapshot.preamble.payload_at + chunks[number].stored_at
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


def test_a_lock_that_cannot_be_had_does_not_undo_what_is_done(
    base: Path, directory: Path, fine_tune: Callable, engine: Callable, tmp_path: Path
):
    """The snapshot lies where a cache would keep it, and its lock is nobody's to take."""
    kept = fine_tune().rename(tmp_path / f"{'0' * 24}.thaw")
    kept.with_suffix(".lock").symlink_to("loop")
    (tmp_path / "loop").touch()
    running = engine(directory, base)
    answer = swap(running, kept)
    assert "broken" not in answer
    known = filled.noted(running.model)
    assert known is not None and (known.path, known.broken) == (str(kept), None)


@pytest.mark.parametrize("verify", [True, False])
def test_all_of_it_at_the_same_addresses(
    verify: bool, directory: Path, base: Path, fine_tune: Callable, engine: Callable
):
    """As the fine-tune's own checkpoint has it; and back, exactly."""
    path = fine_tune()
    running = engine(directory, base)
    before, places = running.bytes_of(), {name: p.data_ptr() for name, p in running.model.named_parameters()}
    report = swap(running, path, verify=verify)
    tuned = engine(path.parent / "tuned", None)
    after = running.bytes_of()
    for name, tensor in tuned.model.named_parameters():
        assert torch.equal(after[name], tensor), name
        assert not torch.equal(after[name], before[name]), name
    assert {name: p.data_ptr() for name, p in running.model.named_parameters()} == places
    assert set(report) == {"bytes", "seconds", "route"} and report["bytes"] == running.check(path)["bytes"]
    swap(running, base, verify=verify)
    assert same(running, before)


def test_what_it_holds_is_known_afterwards(directory: Path, base: Path, fine_tune: Callable, engine: Callable):
    running = engine(directory, base)
    first, before = running.check(base), filled.noted(running.model)
    assert before is not None and running.model._thaw_model_id == first["model"]
    assert running.ask("thaw_source") == {"path": str(base), "content": first["content"], "set": None}
    path = fine_tune()
    found = running.check(path)
    swap(running, path)
    now = filled.noted(running.model)
    assert now is not None and (now.path, now.content, now.broken) == (str(path), found["content"], None)
    assert running.model._thaw_model_id == found["model"] != first["model"]
    assert running.ask("thaw_source") == {"path": str(path), "content": found["content"], "set": None}
    assert (now.identity, now.names, now.files, now.numbers) == (
        before.identity,
        before.names,
        before.files,
        before.numbers,
    )


def test_content_that_has_become_another_meanwhile(directory: Path, base: Path, fine_tune: Callable, engine: Callable):
    running, path = engine(directory, base), fine_tune()
    before, noted = running.bytes_of(), filled.noted(running.model)
    content = running.check(path)["content"]
    shutil.copy(base, path)
    with pytest.raises(MismatchError, match=r"tuned.thaw' has become another snapshot meanwhile; try again"):
        running.ask("thaw_fill", {"path": str(path), "contents": [content], "verify": True})
    assert same(running, before) and filled.noted(running.model) == noted
    path.unlink()
    with pytest.raises(StorageError):
        running.ask("thaw_fill", {"path": str(path), "contents": [content], "verify": True})
    assert same(running, before) and filled.noted(running.model) == noted
    assert swap(running, base)["bytes"]


def test_a_damaged_chunk_leaves_it_broken(directory: Path, base: Path, fine_tune: Callable, engine: Callable):
    """In the file, so that the header says nothing of it; every later check refuses, of sound snapshots, too."""
    running, path = engine(directory, base), fine_tune()
    noted = filled.noted(running.model)
    flip(path)
    answer = swap(running, path)
    assert (
        set(answer) == {"broken"}
        and answer["broken"].startswith("CorruptionError: ")
        and "checksum" in answer["broken"]
    )
    for one in (path, base):
        with pytest.raises(UnsupportedError, match=r"an earlier swap left it broken \(CorruptionError: "):
            running.check(one)
    with pytest.raises(UnsupportedError, match="an earlier swap left it broken"):
        running.ask("thaw_source")
    now = filled.noted(running.model)
    assert noted is not None and now is not None and now.path == noted.path, "nobody takes it for the new one"


def test_damage_that_nobody_looks_for(directory: Path, base: Path, fine_tune: Callable, engine: Callable):
    """``verify=False`` is what it says: the bytes of the file, whatever they are."""
    running, path = engine(directory, base), fine_tune()
    sound = engine(path.parent / "tuned", path).bytes_of()
    flip(path)
    assert swap(running, path, verify=False)["bytes"]
    found = running.bytes_of()
    assert len([name for name in found if not torch.equal(found[name], sound[name])]) == 1


@pytest.mark.parametrize("error", [OSError("I/O error"), MismatchError("shapes"), MemoryError()], ids=repr)
def test_whatever_fails_while_it_fills(
    error: Exception, directory: Path, base: Path, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Also where a failure may have been before the first byte: that cannot be told."""
    running = engine(directory, base)

    def fails(*_: Any, **__: Any) -> Any:
        assert filled.noted(running.model).broken == "it was interrupted", "a process that dies here leaves it broken"
        raise error

    monkeypatch.setattr(fill_module, "restore", fails)
    assert swap(running, base) == {"broken": f"{type(error).__name__}: {error}"}
    with pytest.raises(UnsupportedError, match="left it broken"):
        running.check(base)


def test_an_interrupt_while_it_fills(directory: Path, base: Path, engine: Callable, monkeypatch: pytest.MonkeyPatch):
    """Ends what the process does, as ever; but not without a note."""
    running = engine(directory, base)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fill_module, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap(running, base)
    with pytest.raises(UnsupportedError, match=r"left it broken \(KeyboardInterrupt: \)"):
        running.check(base)


def test_a_failure_once_all_is_filled(
    directory: Path, base: Path, fine_tune: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    """As where closing the file fails, or helpers do not end: an error means that the weights are as they were."""
    running, path = engine(directory, base), fine_tune()
    before, content = running.bytes_of(), running.check(path)["content"]
    real = fill_module.opened_for

    @contextlib.contextmanager
    def fails_to_close(*args: Any) -> Iterator[Any]:
        with real(*args) as opened:
            yield opened
        raise StorageError("input/output error")

    monkeypatch.setattr(fill_module, "opened_for", fails_to_close)
    try:
        running.ask("thaw_fill", {"path": str(path), "contents": [content], "verify": True})
    except StorageError:
        assert same(running, before)


# --- From memory ------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_held(directory: Path, base: Path, fine_tune: Callable, engine: Callable, held: dict):
    running, path = engine(directory, base), fine_tune()
    first = running.ask("thaw_pin", str(path))
    assert first["bytes"] == path.stat().st_size and first["why"]
    assert running.ask("thaw_pin", str(path)) == first and len(held) == 1, "once"
    assert pins.pinned(str(path)) is not None and pins.pinned(str(base)) is None
    (pinned,) = held.values()
    asked = []
    real = type(pinned).opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pinned), "opened", property(lambda self: asked.append(self) or real.fget(self)))
        swap(running, path)
    assert asked == [pinned, pinned], "the check, and the fill"
    tuned = engine(path.parent / "tuned", None)
    for name, tensor in tuned.model.named_parameters():
        assert torch.equal(running.model.get_parameter(name), tensor)
    assert running.ask("thaw_unpin", str(path)) == {"bytes": first["bytes"]} and not held
    assert running.ask("thaw_unpin", str(path)) == {"bytes": 0}
    assert swap(running, base)["bytes"], "and from its file"


def test_one_name_for_it_is_as_good_as_another(
    directory: Path, base: Path, engine: Callable, held: dict, monkeypatch: pytest.MonkeyPatch
):
    running = engine(directory, base)
    monkeypatch.chdir(base.parent)
    running.ask("thaw_pin", base.name)
    assert list(held) == [str(base)] and pins.pinned(str(base)) is not None
    assert running.ask("thaw_unpin", f"./{base.name}")["bytes"]


def test_a_held_file_that_was_replaced(directory: Path, base: Path, fine_tune: Callable, engine: Callable, held: dict):
    """Neither what is held nor what is there now: which of them is meant is not known."""
    running, path = engine(directory, base), fine_tune()
    before, content = running.bytes_of(), running.check(path)["content"]
    running.ask("thaw_pin", str(path))
    other = path.with_name("other.thaw")
    shutil.copy(path, other)
    other.replace(path)
    for ask in (
        lambda: running.check(path),
        lambda: running.ask("thaw_fill", {"path": str(path), "contents": [content], "verify": True}),
        lambda: running.ask("thaw_wakeable", {"path": str(path), "contents": [content]}),
    ):
        with pytest.raises(ReplacedError, match="another file than the one that is held page-locked; unpin it, and"):
            ask()
    assert same(running, before)
    running.ask("thaw_unpin", str(path))
    running.ask("thaw_pin", str(path))
    assert swap(running, path)["bytes"]


def test_a_file_that_cannot_be_held(directory: Path, base: Path, engine: Callable, held: dict, tmp_path: Path):
    running = engine(directory, base)
    with pytest.raises(StorageError):
        running.ask("thaw_pin", str(tmp_path / "nowhere.thaw"))
    assert held == {}


# --- Where the weights could be had again -----------------------------------------------------------------------------


def test_whether_it_is_still_there(directory: Path, base: Path, fine_tune: Callable, engine: Callable):
    running = engine(directory, base)
    source = running.ask("thaw_source")
    source = {"path": source["path"], "contents": [source["content"]]}
    assert running.ask("thaw_wakeable", source) == {}
    shutil.copy(fine_tune(), base)
    with pytest.raises(
        MismatchError, match=r"is not the snapshot any more that this engine was filled from; put it back"
    ):
        running.ask("thaw_wakeable", source)
    with pytest.raises(MismatchError, match="not the snapshot any more"):
        running.ask("thaw_source")
    base.unlink()
    for method, arguments in (("thaw_wakeable", (source,)), ("thaw_source", ())):
        with pytest.raises(StorageError):
            running.ask(method, *arguments)


def test_the_same_content_in_another_file_is_as_good(directory: Path, base: Path, engine: Callable):
    running = engine(directory, base)
    source = running.ask("thaw_source")
    source = {"path": source["path"], "contents": [source["content"]]}
    copied = base.with_name("copied.thaw")
    shutil.copy(base, copied)
    copied.replace(base)
    assert running.ask("thaw_wakeable", source) == {}
    assert running.ask("thaw_source")["content"] == source["contents"][0]
    assert swap(running, base)["bytes"]


def test_an_engine_that_may_not_be_filled_has_no_source(directory: Path, base: Path, engine: Callable):
    running = engine(directory, base)
    running.model.late = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UnsupportedError, match="'late' was not filled"):
        running.ask("thaw_source")


def test_tied_weights_stay_tied(checkpoints: Callable, freeze: Callable, engine: Callable, tmp_path: Path):
    directory = Path(shutil.copytree(checkpoints("tied"), tmp_path / "tied"))
    tuned = Path(shutil.copytree(directory, tmp_path / "tied-tuned"))
    for file in tuned.glob("*.safetensors"):
        save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file)
    running = engine(directory, freeze(directory))
    model = running.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    before = model.lm_head.weight.detach().clone()
    swap(running, freeze(tuned))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, before * 0.5)
