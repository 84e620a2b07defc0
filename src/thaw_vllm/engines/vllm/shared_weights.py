"""An engine whose weights another process holds, for several engines on one GPU: mapped rather than read.

Such an engine cannot be swapped, put to sleep or parked: the memory is not its own.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...errors import MismatchError, StorageError, UnsupportedError
from ...transport.shared import mapped
from ...weights.capture import fillable
from ...weights.layout import dense, dtype_name, unrepeated
from ...weights.restore import RestoreReport, match
from ...weights.shared import views
from ...zygote import messages
from . import versions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ...weights.open import Opened

_LEAST = 1 << 20
"""Bytes of a parameter from which on it takes no memory of its own. Smaller tensors are copied: post-processing writes
into some, as into the scales of an attention that has none."""
_PATIENCE = 60.0
"""Seconds in which the holder answers."""

logger = logging.getLogger(f"vllm.{__name__}")


class Placeholders:
    """While a model is made, its large parameters take no memory of their own: what they hold is about to be elsewhere.

    They keep class, shape, dtype, device and strides, and lie in one place, as large as the largest so far: what is
    written to one, as by an initialisation, is nonsense in the others. All of them have to get memory by ``place``.
    """

    def __init__(self) -> None:
        self._held: dict[int, weakref.ref[torch.nn.Parameter]] = {}
        self._places = [torch.empty(0, dtype=torch.uint8)]
        self._hook: Any = register_module_parameter_registration_hook(self._registered)

    def _registered(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is None or self.holds(parameter) or not dense(parameter):
            return
        size, shape, stride = parameter.numel() * parameter.element_size(), parameter.shape, parameter.stride()
        if size < _LEAST or unrepeated(parameter).numel() != parameter.numel():
            return
        parameter.data = parameter.data.new_empty(0)  # before the place for it is taken
        if self._places[-1].numel() < size or self._places[-1].device != parameter.device:
            self._places.append(torch.empty(size, dtype=torch.uint8, device=parameter.device))
        parameter.data = self._places[-1][:size].view(parameter.dtype).as_strided(shape, stride)
        self._held[id(parameter)] = weakref.ref(parameter)

    def end(self) -> None:
        """The model is made; a second call does nothing."""
        self._hook.remove()

    def left(self, targets: Mapping[str, torch.Tensor]) -> str | None:
        """What still has no memory of its own, of a model with these parameters and buffers; None: nothing."""
        places = {place.untyped_storage().data_ptr() for place in self._places[1:]}
        for name, target in targets.items():
            if target.untyped_storage().data_ptr() in places:
                return repr(name)
        if self._hidden(targets):
            gc.collect()  # of modules that the model's making has replaced
        return "a parameter that no module names" if self._hidden(targets) else None

    def _hidden(self, targets: Mapping[str, torch.Tensor]) -> bool:
        own = {id(target) for target in targets.values()}
        return any(one() is not None for key, one in self._held.items() if key not in own)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether it is a parameter without memory of its own."""
        found = self._held.get(id(parameter))  # whose id may be another's by now
        return found is not None and found() is parameter


def may_change(model: torch.nn.Module, config: VllmConfig) -> str | None:
    """Why an engine's weights may become others, or go elsewhere, once it has loaded them; None where nothing does."""
    if getattr(config, "weight_transfer_config", None) is not None:
        return "other weights may be sent to it"
    if config.model_config.enable_sleep_mode:
        return "it may be put to sleep, which gives its memory away"
    return versions.identity_processing(model) or versions.changed_by_configuration(config)


def require_shareable(model: torch.nn.Module, config: VllmConfig) -> None:
    """Refuse an engine that would write into its weights, or keep others than it is given.

    Raises:
        UnsupportedError: it would, or that is not known.
    """
    why = may_change(model, config)
    if config.parallel_config.world_size != 1:
        why = f"it has {config.parallel_config.world_size} ranks"
    if why is not None:
        raise UnsupportedError(f"this engine cannot share its weights with others: {why}; give each engine its own")


def place(model: torch.nn.Module, opened: Opened, holder: str, placeholders: Placeholders) -> RestoreReport:
    """Put a model's large parameters where the holder has them, and copy the rest; ``require_shareable`` has passed.

    From then on this process ends when the holder does.

    Args:
        opened: the snapshot, without its chunks.
        holder: the socket of whoever holds that snapshot's weights.
        placeholders: under which the model was made; they have ended.

    Raises:
        UnsupportedError: the model has more in the placeholders' memory than the snapshot holds.
        MismatchError: model, snapshot and what is held are not the same; the model must not be used.
        StorageError, DeviceError: nobody is there; the memory cannot be mapped.
    """
    start = time.perf_counter()
    targets, required = fillable(model)
    device = next(model.parameters()).device
    name, snapshot = opened.source.name, opened.snapshot
    told = _told(holder)
    if told["content"] != snapshot.header.content:
        raise MismatchError(f"{name!r} has become another snapshot since its weights were thawed to be shared")
    asked = time.perf_counter()
    found = views(mapped(told["memory"], device), snapshot.index)
    for entry in snapshot.index.tensors:
        target, there = targets.get(entry.name), found[entry.name]
        if target is None:
            continue  # which ``match`` tells
        shape, stride, dtype = tuple(target.shape), target.stride(), dtype_name(target.dtype)
        if (shape, dtype) != (entry.shape, entry.dtype) or not _alike(stride, there):
            raise MismatchError(
                f"{name!r} holds {entry.name!r} as {entry.dtype} {list(entry.shape)}, the model has it as {dtype} "
                f"{list(shape)} with strides {list(stride)}; thaw it into the model it was frozen from"
            )
        if placeholders.holds(target):
            target.data = there
        else:
            target.data.copy_(there)
    match(snapshot, targets, required, name)
    if (left := placeholders.left(targets)) is not None:
        raise UnsupportedError(
            f"this engine cannot share its weights with others: {left} is made of a parameter's memory and is not in "
            "the snapshot; give each engine its own"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what parameters had for a moment
    end = time.perf_counter()
    seconds = {"ask": asked - start, "map": end - asked, "total": end - start}
    tensors = len(snapshot.index.tensors)
    return RestoreReport(
        name, told["bytes"], tensors, told["verified"], seconds, route="mapped", why="another process holds it"
    )


def _alike(stride: tuple[int, ...], there: torch.Tensor) -> bool:
    return all(
        ours == theirs for ours, theirs, count in zip(stride, there.stride(), there.shape, strict=True) if count > 1
    )


def _told(holder: str) -> dict[str, Any]:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_PATIENCE)
        connection.connect(holder)
        answer = messages.receive(connection)
    except OSError as error:
        connection.close()
        raise StorageError(f"the process that holds the weights does not answer: {error}") from None
    if answer is None:
        connection.close()
        raise StorageError("the process that holds the weights has ended")
    connection.settimeout(None)
    threading.Thread(target=_end_with, args=(connection,), name="thaw-shared-weights", daemon=True).start()
    return answer[0]


def _end_with(connection: socket.socket) -> None:
    """Without the holder the memory is nobody's."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    logger.critical("the process that holds this engine's weights has ended; so does this one")
    os._exit(1)
