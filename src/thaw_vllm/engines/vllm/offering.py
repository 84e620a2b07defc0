"""An engine's weights lent to engines that load the same, and taken from one that lends them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import MismatchError, ThawError, UnsupportedError, UsageError
from ...transport.offers import Offer, directory, offered
from ...transport.tcp_address import remote
from ...weights.capture import fillable
from ...weights.open import Opened, open_rank
from ...weights.peers import AUTO, offer, take
from ...weights.reading import Reading, RestoreOptions
from ...weights.restore import RestoreReport, restore
from .shared_weights import may_change
from .swap.filled import noted, unknown

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ATTRIBUTE = "_thaw_offer"
_AT_THE_END = 10.0
"""Seconds in which borrowers are to be done when the model goes."""

logger = logging.getLogger(f"vllm.{__name__}")


def lend(model: torch.nn.Module, config: VllmConfig, rank: int) -> dict[str, Any]:
    """Offer this rank's weights, until ``withdraw``; again does nothing.

    Returns:
        ``content``, by which they are found, and ``socket``, the offer's path.

    Raises:
        UnsupportedError: they are not a snapshot's, or may not stay where they are.
        MismatchError, StorageError: the snapshot is gone, or another by now.
        DeviceError: the driver lends no such memory.
    """
    why = may_change(model, config) or unknown(model)
    found = noted(model)
    if why is not None or found is None:
        raise UnsupportedError(f"this engine's weights cannot be offered to others: {why}")
    content = found.content
    held: Offer | None = getattr(model, _ATTRIBUTE, None)
    if held is None:
        with open_rank(found.path, rank, with_chunks=False) as opened:
            if opened.snapshot.header.content != content:
                raise MismatchError(f"{found.path!r} is not the snapshot any more that this engine was filled from")
            targets, required = fillable(model)
            places = {name: target.data_ptr() for name, target in targets.items()}
            held = offer(opened, targets, required, _Refusing(model, content, places))
        setattr(model, _ATTRIBUTE, held)
        weakref.finalize(model, held.end, _AT_THE_END)
        logger.info("these weights are offered to engines of this host at %s", held.path)
    return {"content": content, "socket": str(held.path)}


def withdraw(model: torch.nn.Module) -> dict[str, Any]:
    """Offer them no more: they are to change, or to move. Waits for who is copying them.

    Returns:
        ``withdrawn``: whether they were offered.

    Raises:
        BusyError: somebody has not ended; they must stay as they are, and are offered still.
    """
    held: Offer | None = getattr(model, _ATTRIBUTE, None)
    if held is None:
        return {"withdrawn": False}
    held.withdraw()
    setattr(model, _ATTRIBUTE, None)
    return {"withdrawn": True}


def expected(peer: str, snapshot: str) -> bool:
    """Whether weights may well come from a peer, so that nothing need be made ready for reading the snapshot."""
    if peer == AUTO:  # whoever offers the first rank's offers the others, too
        with contextlib.suppress(ThawError, OSError, RuntimeError), open_rank(snapshot, 0, with_chunks=False) as opened:
            return bool(offered(directory(os.environ), opened.snapshot.header.content))
        return False
    return bool(peer)


def restored(
    opened: Opened,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    way: Reading,
    peer: str,
) -> RestoreReport:
    """``restore``, from a peer where one is asked for.

    Args:
        peer: the loader's option: empty; AUTO, which comes back to the file where nobody has the weights; a socket; or
            the address of a ``thaw lend``.

    Raises:
        As ``restore``, and as ``take`` of a peer that is named.
    """
    why = ""
    if peer:
        if peer != AUTO and not remote(peer) and opened.snapshot.header.identity.parallel.world != 1:
            raise UsageError(
                f"one socket lends the weights of one rank; give 'peer': {AUTO!r}, or 'tcp://HOST:PORT', to an engine "
                "of several"
            )
        try:
            return take(opened, targets, required, options, peer)
        except Exception as error:  # whatever a peer has come to, the file is there
            if peer != AUTO:
                raise
            why = f"; not from a peer: {error}"
    report = restore(opened.source, opened.snapshot, targets, required, options, way)
    return dataclasses.replace(report, why=report.why + why)


class _Refusing:
    """Why a model's weights are not to be lent just now; keeps no model alive."""

    def __init__(self, model: torch.nn.Module, content: str | None, places: Mapping[str, int]) -> None:
        self._model, self._content, self._places = weakref.ref(model), content, places

    def __call__(self) -> str | None:
        model = self._model()
        found = None if model is None else noted(model)
        if model is None or found is None:
            return "they have been loaded again, or the engine has ended"
        if found.broken is not None or found.content != self._content:
            return "others have been swapped in"
        now = {name: target.data_ptr() for name, target in fillable(model)[0].items()}
        moved = next((name for name, place in self._places.items() if now.get(name) != place), None)
        return None if moved is None else f"{moved!r} is somewhere else by now"
