"""``mode="auto"``: a model thawed from the snapshot that an earlier start has kept, or frozen while vLLM loads it.

Whatever speaks against either is said, and vLLM loads as it does: a start fails only where it would without thaw. The
ranks tell each other at every step how theirs went, so that all thaw, all freeze, or none does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from ...errors import FormatError, MismatchError, StorageError, ThawError, UnsupportedError
from ...weights import cache
from ...weights.cache import Lock
from ...weights.capture import fillable
from ...weights.freeze import FreezeReport
from ...weights.peers import AUTO
from ...weights.ranks import Exchange
from ...weights.restore import RestoreReport
from .cache_key import Facts, find, key_of
from .exchange import require_one_set_of_all, told, world_exchange
from .freezing import Freezing
from .identity import require_ranks
from .streaming import OWN_LOADERS
from .swap.filled import forget, hold
from .versions import loads_in_part

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from .loader import ThawModelLoader

logger = init_logger(f"vllm.{__name__}")

THAWED, FROZEN, LOADED = "thawed", "frozen", "loaded"
_SMALL = 256 << 10
"""Bytes of a parameter that is put back as it was where a thaw fails half-way, as all buffers are: scales and the like,
which have a value from the start and which not every checkpoint has. vLLM's loader writes all others."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a worker's model got its weights.

    Attributes:
        how: THAWED, FROZEN (loaded by vLLM and frozen then) or LOADED.
        path: of the snapshot; None where there is none.
        why: why not otherwise; empty where nobody asked for more.
    """

    how: str
    path: str | None = None
    why: str = ""


def left_to_vllm(vllm_config: VllmConfig, model_config: ModelConfig) -> str | None:
    """Why a model is not for snapshots, told by the configuration alone, and so to all ranks alike; None if it may be.

    Such a model is left to vLLM's own loader from its beginning.
    """
    if is_draft(vllm_config, model_config):
        return "draft models are not in a snapshot in this version"
    if model_config.quantization in OWN_LOADERS:
        return f"vLLM loads {model_config.quantization} models in a way of its own"
    if loads_in_part(model_config):
        return "only part of the model is loaded"
    try:
        require_ranks(vllm_config)
    except UnsupportedError as error:
        return str(error)
    return None


def is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether it is the model of speculative decoding that drafts. Methods without one, such as ngram, name the target
    there; and while a draft is loaded it may be its own configuration's ``model_config``."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return draft is model_config and draft is not getattr(speculative, "target_model_config", None)


def load(
    loader: ThawModelLoader, model: torch.nn.Module, vllm_config: VllmConfig, model_config: ModelConfig
) -> tuple[FreezeReport | RestoreReport | None, str | None, Outcome]:
    """Fill the model; its report, the model id where that is known, and the outcome."""
    return _Start(loader, model, vllm_config, model_config).run()


class _ElsewhereError(Exception):
    """Another rank cannot go on.

    Attributes:
        file: its file is at fault.
    """

    def __init__(self, why: str, file: bool) -> None:
        super().__init__(why)
        self.file = file


class _Start:
    """One rank's part of one start."""

    def __init__(
        self, loader: ThawModelLoader, model: torch.nn.Module, vllm_config: VllmConfig, model_config: ModelConfig
    ) -> None:
        self._loader, self._model = loader, model
        self._vllm_config, self._model_config = vllm_config, model_config
        self._ranks = _Ranks(world_exchange())
        self._rank = require_ranks(vllm_config).rank
        self._place = Path(loader.config.cache)
        self._lock: Lock | None = None  # rank 0's, for the engine
        self._kept = False

    def run(self) -> tuple[FreezeReport | RestoreReport | None, str | None, Outcome]:
        """See ``load``."""
        try:
            return self._run()
        finally:
            if self._lock is not None and not self._kept:
                self._lock.release()

    def _run(self) -> tuple[FreezeReport | RestoreReport | None, str | None, Outcome]:
        facts, failure = None, None
        try:
            facts = find(self._loader, self._model, self._vllm_config, self._model_config)
        except Exception as error:  # vLLM's own loader will say it again where it concerns that, too
            failure = error
        answers = self._ranks.tell(failure, digest=facts and facts.digest, bytes=facts and facts.bytes)
        why = _first(answers)
        if facts is None or why is not None:
            return self._load(f"this model is not for snapshots: {why}")
        key = key_of(a["digest"] for a in answers)
        path = self._place / f"{key}.thaw"
        need = sum(a["bytes"] for a in answers)
        verdict = self._judged(lambda: self._judge(facts, key, need))
        if verdict["do"] == "thaw":
            thawed = self._thaw(path, facts)
            if not isinstance(thawed, _Unusable):
                return thawed
            if thawed.begun:
                self._judged(lambda: self._drop(key, thawed))
                return self._load(f"the snapshot {str(path)!r} could not be used: {thawed.why}")
            verdict = self._judged(lambda: self._instead(key, need, thawed))
        if verdict["do"] == "freeze":
            return self._freeze(path, facts)
        return self._load(verdict["why"])

    # What rank 0 decides.

    def _judged(self, work: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Rank 0's decision, known to all; what it cannot do means that vLLM loads."""
        verdict: dict[str, str] = {}
        if self._rank == 0:
            try:
                verdict = work()
            except Exception as error:
                verdict = {"do": "load", "why": f"the cache of snapshots cannot be used: {_text(error)}"}
        found: dict[str, str] = self._ranks.tell(None, **verdict)[0]
        return found

    def _judge(self, facts: Facts, key: str, need: int) -> dict[str, str]:
        cache.private(self._place)
        self._lock = Lock(self._place, key)
        path = self._place / f"{key}.thaw"
        if not self._lock.share():
            return {"do": "load", "why": "another start is freezing it just now"}
        if path.exists():
            logger.info("thawing from the cache: %s", path)
            return {"do": "thaw"}
        why = "there is no snapshot of this model, configured so, yet"
        for entry, header in cache.headers(cache.entries(self._place)):
            if isinstance(header, ThawError) or (old := facts.differs(cache.origin_of(header))) is None:
                continue
            why = f"the snapshot of this model is stale: {old}"
            if cache.stale(header) is not None:
                cache.discard_unused(entry)
        return self._may_freeze(key, need, why)

    def _instead(self, key: str, need: int, thawed: _Unusable) -> dict[str, str]:
        """After a snapshot that was refused before a byte of it was copied."""
        if not thawed.file:
            return {"do": "load", "why": thawed.why}
        return self._may_freeze(key, need, f"the snapshot of this model cannot be used: {thawed.why}")

    def _may_freeze(self, key: str, need: int, why: str) -> dict[str, str]:
        assert self._lock is not None
        if not self._lock.alone(soon=True):
            return {"do": "load", "why": f"{why}; not frozen: another start is at it, or an engine was filled from it"}
        for entry in cache.entries(self._place):
            if entry.key == key:
                cache.discard(entry, lock=False)
        full = cache.make_room(self._place, key, need, self._loader.config.cache_bytes, _is_stale)
        if full is not None:
            return {"do": "load", "why": f"{why}; not frozen, {need / 1e9:.2f} GB are too much: {full}"}
        logger.info("%s; freezing %.2f GB while vLLM loads it, for the starts that come", why, need / 1e9)
        return {"do": "freeze"}

    def _drop(self, key: str, thawed: _Unusable) -> dict[str, str]:
        """After a snapshot that turned out to be no good while it was read."""
        assert self._lock is not None
        if thawed.file and self._lock.alone():
            for entry in cache.entries(self._place):
                if entry.key == key:
                    cache.discard(entry)
        return {}

    # What every rank does.

    def _thaw(self, path: Path, facts: Facts) -> tuple[RestoreReport, str | None, Outcome] | _Unusable:
        begun = False
        kept: dict[str, torch.Tensor] = {}
        targets, _ = fillable(self._model)

        def begin(opened: str | None) -> None:
            """Every rank has found its file to be the right one; from here on tensors are written."""
            nonlocal begun
            answers = self._ranks.tell(None, opened=opened)
            if (why := _first(answers)) is not None:
                raise _ElsewhereError(why, _any_file(answers))
            require_one_set_of_all((answer["opened"] for answer in answers), str(path))
            begun = True
            buffers = {name for name, _ in self._model.named_buffers(remove_duplicate=False)}
            # In host memory: on a GPU they might lie in the pool of the weights, which would keep the room.
            kept.update(
                (name, tensor.detach().to("cpu", copy=True))
                for name, tensor in targets.items()
                if tensor.nbytes <= _SMALL or name in buffers
            )

        failure: Exception | None = None
        try:
            report, found = self._loader.thaw(self._model, self._model_config, facts.identity, str(path), begin)
        except _ElsewhereError as error:
            return _Unusable(str(error), False, error.file)
        except Exception as error:
            failure = error
        answers = self._ranks.tell(failure)
        if (why := _first(answers)) is not None:
            with torch.no_grad():
                for name, tensor in kept.items():
                    targets[name].copy_(tensor)
            forget(self._model)
            named = begun and self._loader.config.peer not in ("", AUTO)  # then it is the peer that is at fault
            return _Unusable(why, begun, _any_file(answers) and not named)
        if self._lock is not None:
            self._lock.used()
            self._keep()
        return report, found, Outcome(THAWED, str(path))

    def _freeze(self, path: Path, facts: Facts) -> tuple[FreezeReport | None, str | None, Outcome]:
        freezing = failure = None
        try:
            freezing = Freezing(self._model, self._model_config, facts.identity, facts.directory, facts.checkpoint)
        except Exception as error:
            failure = error
        why = _first(self._ranks.tell(failure))
        self._loader.source().load_weights(self._model, self._model_config)
        if why is None and freezing is not None:
            try:
                freezing.prepare(**facts.origin())
            except Exception as error:
                failure = error
            why = _first(self._ranks.tell(failure))
        if why is None and freezing is not None:
            try:
                report = freezing.write(str(path), force=True, workers=self._loader.config.workers)
            except Exception as error:  # the weights are there; every rank has come this far, and fails alike
                why = _text(error)
            else:
                if self._lock is not None and self._lock.share():
                    self._lock.used()
                    self._keep()
                return report, report.model, Outcome(FROZEN, str(path))
        return self._loaded(f"loaded, but not frozen: {why}")

    def _load(self, why: str) -> tuple[None, None, Outcome]:
        """By vLLM."""
        outcome = self._loaded(why)
        self._loader.source().load_weights(self._model, self._model_config)
        return outcome

    def _loaded(self, why: str) -> tuple[None, None, Outcome]:
        if self._rank == 0:
            logger.warning("vLLM loads the checkpoint itself: %s", why)
        return None, None, Outcome(LOADED, None, why)

    def _keep(self) -> None:
        self._kept = True
        hold(self._model, self._lock)


@dataclasses.dataclass(frozen=True)
class _Unusable:
    """A snapshot that could not be thawed.

    Attributes:
        begun: some tensors were written.
        file: the file is at fault, not this machine.
    """

    why: str
    begun: bool
    file: bool


class _Ranks:
    """What the ranks of an engine tell each other."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def tell(self, failure: Exception | None, **said: Any) -> list[dict[str, Any]]:
        """Everybody's answers, by rank."""
        if failure is not None:
            said = {"error": _text(failure), "file": _about_the_file(failure)}
        if len(said.get("why", "")) > 800:
            said["why"] = said["why"][:800] + "…"
        return told(self._exchange, said)


def _first(answers: list[dict[str, Any]]) -> str | None:
    """The first failure."""
    return next((str(answer["error"]) for answer in answers if "error" in answer), None)


def _any_file(answers: list[dict[str, Any]]) -> bool:
    return any(answer.get("file", False) for answer in answers)


def _text(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if isinstance(error, ThawError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 600 else text[:599] + "…"


def _about_the_file(error: Exception) -> bool:
    return isinstance(error, (FormatError, MismatchError, StorageError))


def _is_stale(entry: cache.Entry) -> bool:
    return any(not isinstance(header, ThawError) and cache.stale(header) for _, header in cache.headers([entry]))
