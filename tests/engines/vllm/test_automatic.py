"""``mode="auto"``: what a start finds, keeps and says, with vLLM's real loading in this process."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.engines.vllm.conftest import Loaded, tensors_of

from thaw_vllm.engines.vllm import automatic, loader, offering
from thaw_vllm.errors import UnsupportedError, UsageError
from thaw_vllm.transport import writer
from thaw_vllm.weights import cache
from thaw_vllm.weights.open import open_snapshot

pytestmark = pytest.mark.vllm


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def model(checkpoints: Callable, tmp_path: Path) -> Path:
    """A directory of this test's own."""
    return Path(shutil.copytree(checkpoints("untied"), tmp_path / "model"))


class Log:
    """What was said about the cache; a handler would not outlive vLLM's configuring of loggers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, *given: Any) -> None:
        self.lines.append(text % given)

    warning = info

    @property
    def said(self) -> str:
        lines, self.lines = self.lines, []
        return "\n".join(lines)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log()
    monkeypatch.setattr(automatic, "logger", found)
    return found


@pytest.fixture
def start(load: Callable, place: Path) -> Callable[..., Loaded]:
    """Loads a model as a start with ``--snapshot auto`` does."""

    def run(directory: Path, *, extra: dict[str, Any] | None = None, **engine_args: Any) -> Loaded:
        loader.last_report = loader.last_outcome = None
        given = {"mode": "auto", "cache": str(place)} | (extra or {})
        loaded: Loaded = load(directory, load_format="thaw", model_loader_extra_config=given, **engine_args)
        return loaded

    return run


def outcome() -> str:
    assert loader.last_outcome is not None
    return loader.last_outcome.how


def kept(place: Path) -> list[cache.Entry]:
    return [entry for entry in cache.entries(place) if entry.made is not None]


def change(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["untied", "tied", "tied-with-lm-head", "moe", "mixed-dtypes"])
def test_the_first_start_freezes_and_the_second_thaws(
    kind: str, checkpoints: Callable, load: Callable, start: Callable, place: Path, log: Log
):
    default = load(checkpoints(kind))
    first = start(checkpoints(kind))
    assert outcome() == "frozen" and "no snapshot of this model" in log.said
    assert first.raw == default.raw
    (entry,) = kept(place)
    assert (place.stat().st_mode & 0o777, entry.path.stat().st_mode & 0o777) == (0o700, 0o600)
    second = start(checkpoints(kind))
    assert outcome() == "thawed" and f"thawing from the cache: {entry.path}" in log.said
    assert second.raw == default.raw and second.processed() == default.processed()
    assert kept(place) == [entry] or kept(place)[0].used >= entry.used
    assert second.model._thaw_model_id == first.model._thaw_model_id is not None


def test_other_weights_are_frozen_anew(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    start(model)
    (old,) = kept(place)
    change(model)
    assert log.said and start(model).raw == load(model).raw
    assert outcome() == "frozen"
    assert "is stale: the model's weight files have changed; freezing" in log.said
    (new,) = kept(place)  # the old one is of no use to anybody
    assert new.key != old.key
    assert start(model).raw == load(model).raw and outcome() == "thawed"


def test_weights_that_only_their_bytes_tell_apart(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    file = model / "model.safetensors"
    status = file.stat()
    start(model)
    change(model)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert log.said and start(model).raw == load(model).raw
    assert outcome() == "frozen" and "cannot be used: " in log.said
    assert len(kept(place)) == 1


def test_another_configuration_is_another_snapshot(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    start(model)
    assert start(model, dtype="float32").raw == load(model, dtype="float32").raw
    assert outcome() == "frozen" and "is stale" not in log.said
    start(model, max_model_len=128)  # which is nothing to the weights
    assert outcome() == "thawed" and len(kept(place)) == 2
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0, "rope_parameters": None}))
    start(model)
    assert outcome() == "frozen" and "the model's configuration has changed" in log.said


@pytest.mark.parametrize("damage", ["cut", "emptied", "header", "removed directory"])
def test_a_damaged_file(damage: str, model: Path, load: Callable, start: Callable, place: Path, log: Log):
    start(model)
    (entry,) = kept(place)
    if damage == "removed directory":
        shutil.rmtree(place)
    else:
        with entry.path.open("r+b") as file:
            if damage == "header":
                file.seek(300)
                file.write(b"\xff" * 8)
            else:
                file.truncate(0 if damage == "emptied" else entry.bytes - 1000)
    assert log.said and start(model).raw == load(model).raw
    assert outcome() == "frozen"
    assert ("no snapshot" if damage == "removed directory" else "cannot be used: ") in log.said
    assert start(model).raw == load(model).raw and outcome() == "thawed"


def test_a_chunk_that_is_corrupt(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    first = start(model)
    (entry,) = kept(place)
    with open_snapshot(entry.path) as opened:
        at = opened.snapshot.preamble.payload_at + opened.snapshot.chunks[0].stored_at
    with entry.path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    del first
    assert log.said
    loaded = start(model)
    assert loaded.raw == load(model).raw and loaded.processed() == load(model).processed()
    assert outcome() == "loaded" and "could not be used" in log.said
    assert kept(place) == []
    start(model)
    assert outcome() == "frozen"


def test_small_tensors_are_put_back(model: Path, load: Callable, start: Callable, monkeypatch: pytest.MonkeyPatch):
    """Where vLLM's loader would leave them as a thaw that failed had left them."""
    start(model)
    real, default = offering.restore, load(model)

    def spoil(source: Any, snapshot: Any, targets: Any, *given: Any) -> Any:
        real(source, snapshot, targets, *given)
        for tensor in targets.values():
            tensor.data.fill_(7)
        raise OSError(errno.EIO, "made up")

    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    monkeypatch.setattr(offering, "restore", spoil)
    before: dict[str, Any] = {}
    monkeypatch.setattr(DefaultModelLoader, "load_weights", lambda _, model, *__: before.update(tensors_of(model)))
    start(model)
    assert outcome() == "loaded"
    small = [name for name, (_, _, _, data) in before.items() if len(data) <= 1 << 10]
    assert small and not any(before[name][3] == b"\xe0\x40" * (len(before[name][3]) // 2) for name in small)
    assert default.raw.keys() == before.keys()


def test_no_room(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    loaded = start(model, extra={"cache_bytes": 1000})
    assert outcome() == "loaded" and loaded.raw == load(model).raw
    said = log.said
    assert "not frozen, " in said and "--cache-gb" in said and kept(place) == []


def test_a_full_disk_in_the_midst(
    model: Path,
    load: Callable,
    start: Callable,
    place: Path,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    parts: Callable,
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer.StagedFile, "write_bulk", lambda self, *_: self.write(0, b"x") or full())
        loaded = start(model)
    assert outcome() == "loaded" and loaded.raw == load(model).raw
    assert "loaded, but not frozen: " in log.said
    assert kept(place) == [] and parts(place) == []
    start(model)
    assert outcome() == "frozen"


@pytest.mark.parametrize(("calls", "said"), [(1, "not for snapshots: made up"), (2, "but not frozen: made up")])
def test_a_model_that_cannot_be_frozen(
    calls: int,
    said: str,
    model: Path,
    load: Callable,
    start: Callable,
    place: Path,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
):
    left = iter([None] * (calls - 1))

    def unsound(_: Any) -> None:
        if next(left, 0) == 0:
            raise UnsupportedError("made up")

    monkeypatch.setattr("thaw_vllm.engines.vllm.audit.refuse_unsound", unsound)
    loaded = start(model)
    assert outcome() == "loaded" and loaded.raw == load(model).raw
    assert said in log.said and kept(place) == []


def test_a_mistake_of_ours_is_no_failure(
    model: Path, load: Callable, start: Callable, log: Log, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "entries", lambda _: 1 / 0)
    assert start(model).raw == load(model).raw
    assert outcome() == "loaded" and "ZeroDivisionError" in log.said


def test_which_model_is_a_draft():
    """While a draft is loaded, its configuration may be the one of its vLLM configuration."""
    target, draft = object(), object()

    def asked(drafts: object, loaded: object, whole: object) -> bool:
        speculative = SimpleNamespace(draft_model_config=drafts, target_model_config=target)
        config = SimpleNamespace(speculative_config=speculative, model_config=whole)
        return automatic.is_draft(config, loaded)  # type: ignore[arg-type]

    assert asked(draft, draft, target) and asked(draft, draft, draft)
    assert not asked(draft, target, target)
    assert not asked(target, target, target), "ngram"
    assert not automatic.is_draft(SimpleNamespace(speculative_config=None), target)  # type: ignore[arg-type]


def test_a_model_that_is_left_to_vllm(model: Path, load: Callable, start: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(automatic, "loads_in_part", lambda _: True)
    loaded = start(model)
    assert outcome() == "loaded" and loaded.processed() == load(model).processed()


def test_a_directory_that_others_may_write_to(model: Path, start: Callable, place: Path, log: Log):
    place.mkdir()
    place.chmod(0o777)
    start(model)
    assert outcome() == "loaded" and "others may write" in log.said


def test_two_starts_at_once(model: Path, load: Callable, start: Callable, place: Path, log: Log):
    first = start(model)
    (entry,) = kept(place)
    entry.path.unlink()
    assert log.said and start(model).raw == load(model).raw  # the first one's engine is there, and may want its file
    assert outcome() == "loaded" and "not frozen: another start is at it" in log.said
    del first
    other = cache.Lock(place, entry.key)
    assert other.alone()
    start(model)
    assert outcome() == "loaded" and "another start is freezing it just now" in log.said
    other.release()
    start(model)
    assert outcome() == "frozen"


def test_an_engine_keeps_its_snapshot_from_eviction(model: Path, start: Callable, place: Path):
    start(model)
    for how in ("frozen", "thawed"):
        (entry,) = kept(place)
        if how == "thawed":
            held = start(model)
            assert outcome() == how
            assert not cache.discard_unused(entry)
            del held
    assert cache.discard_unused(entry) and kept(place) == []


def test_weights_that_are_reloaded(model: Path, start: Callable):
    start(model)
    loaded = start(model)
    made = loader.ThawModelLoader(loaded.config.load_config)
    assert {name for name, _ in made.get_all_weights(loaded.config.model_config, loaded.model)} == set(
        load_file(model / "model.safetensors")
    )


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "auto"},
        {"mode": "auto", "cache": ""},
        {"mode": "auto", "cache": "c", "snapshot": "w.thaw"},
        {"mode": "auto", "cache": 3},
        {"mode": "auto", "cache": "c", "cache_bytes": 1.5},
        {"snapshot": "w.thaw", "cache": "c"},
    ],
)
def test_what_the_loader_refuses(given: dict[str, Any]):
    with pytest.raises(UsageError):
        loader.LoaderConfig.parse(given)
