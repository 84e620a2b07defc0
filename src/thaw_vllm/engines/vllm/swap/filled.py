"""What a worker's loader filled its model with, noted then, so that another snapshot can be held against it later."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ....format.header import Header
from ....format.identity import Identity
from .. import versions
from ..audit import digest, numbers
from .front import Files, engine_files
from .reach import uncovered

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ....weights.cache import Lock

_ATTRIBUTE = "_thaw_filled"
_LOCK = "_thaw_cache_lock"


@dataclass(frozen=True)
class Filled:
    """Of one worker's model.

    Attributes:
        path: the snapshot.
        content: its content id; None where it has none.
        identity: the engine's, as it was when the model was loaded.
        names: parameters and buffers that were filled. Any other buffer is as its model was initialised.
        attributes: plain values that loading set, as in a snapshot's header.
        numbers: all floats that are attributes, once the model was ready.
        others: tensors that no snapshot fills, then: where each hangs → it and its digest.
        hooks: functions that modules call before or after they are run, then.
        files: what the front end reads beside the weights.
        broken: why the weights are neither those of one snapshot nor of another.
    """

    path: str
    content: str | None
    identity: Identity
    names: frozenset[str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, tuple[torch.Tensor, bytes]] = field(default_factory=dict)
    hooks: int = 0
    files: Files | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Loading:
    """What ``load_weights`` knows, kept until post-processing has ended."""

    path: str
    header: Header
    names: frozenset[str]
    identity: Identity


def remember(model: torch.nn.Module, path: str, header: Header, names: frozenset[str], identity: Identity) -> None:
    """First half of the note: what was filled, in which engine."""
    setattr(model, _ATTRIBUTE, Loading(path, header, names, identity))


def hold(model: torch.nn.Module, lock: Lock | None) -> None:
    """Keep the lock of the snapshot in the cache that it was filled from for as long as the model is there: an engine
    that is parked wants its snapshot again. One that was held before is let go of."""
    before = getattr(model, _LOCK, None)
    setattr(model, _LOCK, lock)
    if before is not None and before is not lock:
        before.release()


def forget(model: torch.nn.Module) -> None:
    """Neither half counts: the weights are to come from elsewhere."""
    setattr(model, _ATTRIBUTE, None)


def note(model: torch.nn.Module, config: VllmConfig, asked: float | None = None) -> None:
    """Second half, once the model is ready. What cannot be noted leaves an engine that cannot be swapped, and starts.

    Nothing is noted where post-processing changes weights: such an engine cannot be swapped anyway.

    Args:
        asked: as of ``engine_files``.
    """
    known = getattr(model, _ATTRIBUTE, None)
    if not isinstance(known, Loading):
        return
    setattr(model, _ATTRIBUTE, None)
    try:
        if versions.identity_processing(model) is None:
            setattr(model, _ATTRIBUTE, _filled(model, config, known, asked))
    except Exception as error:
        logging.getLogger(__name__).warning("this engine's weights will not be swappable: %s", error)


def _filled(model: torch.nn.Module, config: VllmConfig, known: Loading, asked: float | None) -> Filled:
    return Filled(
        path=known.path,
        content=known.header.content,
        identity=known.identity,
        names=known.names,
        attributes=dict(known.header.attributes),
        numbers=numbers(model),
        others=unfilled(model, known.names),
        hooks=hooks(model),
        files=engine_files(config.model_config, asked) if known.identity.parallel.rank == 0 else None,
    )


def unfilled(model: torch.nn.Module, names: frozenset[str]) -> dict[str, tuple[torch.Tensor, bytes]]:
    """Buffers that are not among ``names``, and tensors that are neither parameter nor buffer: each with its digest.

    Each tensor once, under its first name.
    """
    found: dict[str, tuple[torch.Tensor, bytes]] = {}
    seen: set[int] = set()
    for name, buffer in model.named_buffers():
        if name not in names:
            seen.add(id(buffer))
            found[name] = (buffer, digest(buffer))
    for path, tensor in uncovered(model, covered(model), versions.graph_entries()):
        if id(tensor) not in seen:
            found[path] = (tensor, digest(tensor))
    return found


def hooks(model: torch.nn.Module) -> int:
    """How many functions modules call before or after they are run."""
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def covered(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def noted(model: torch.nn.Module) -> Filled | None:
    """What ``note`` kept; None where the model was loaded in another way."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Filled) else None


def unknown(model: torch.nn.Module) -> str | None:
    """Why its weights are not known to be those of a snapshot; None where they are."""
    found = noted(model)
    if found is None:
        return (
            "nobody noted what loading filled; start the engine with --load-format thaw, from a snapshot that as many "
            "ranks have written"
        )
    return None if found.broken is None else f"an earlier swap left it broken ({found.broken})"


def renote(model: torch.nn.Module, **changes: Any) -> None:
    """After a fill: where the weights are from now, or that they are broken."""
    found = noted(model)
    assert found is not None
    setattr(model, _ATTRIBUTE, replace(found, **changes))
