"""Every tensor that a model holds, wherever it hangs: what a swap would have to fill."""

from __future__ import annotations

import bisect
import functools
import math
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ....errors import UnsupportedError
from ....weights.layout import dense, extent

MOST = 2_000_000
"""Objects that are looked at. A model of a thousand layers has a tenth of it."""
_ITEMS = (list, tuple, set, frozenset, deque)
_LEFT = (
    *(type, types.ModuleType, str, bytes, bytearray, int, float, complex),
    *(FakeTensorMode, ShapeEnv, torch.fx.Graph, torch.fx.Node),
)
"""Belong to no model, or hold nothing; or keep books of a trace, with the tensors it has seen, and are never run: of a
graph the code that was made of it is, which has what it needs as attributes of its module."""


def tensors(model: torch.nn.Module, leave: tuple[type, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Where it hangs, and the tensor: parameters, buffers, attributes, and what these hold.

    Args:
        leave: objects of these classes are not looked into.

    Followed are containers, attributes of any object, methods' owners, and what functions have enclosed; not classes,
    Python modules or the globals of functions, which are shared by all models. Each object is looked at once. What
    objects of extensions hold, such as the cache of ``functools.lru_cache``, cannot be seen, nor what is behind a
    ``weakref.proxy``.

    Raises:
        UnsupportedError: it holds more than MOST objects.
    """
    seen: dict[int, Any] = {}  # held, so that no other object gets one's id meanwhile
    pending: list[tuple[str, Any]] = [("", model)]
    while pending:
        path, value = pending.pop()
        if (
            type(value) in weakref.ProxyTypes
            or value is None
            or isinstance(value, (*_LEFT, *leave))
            or id(value) in seen
        ):
            continue
        seen[id(value)] = value
        if len(seen) > MOST:
            raise UnsupportedError(f"the model holds more than {MOST} objects, so what hangs on it cannot be listed")
        if isinstance(value, torch.Tensor):
            yield path.removeprefix("."), value
        if not isinstance(value, FakeTensor):
            pending.extend(_held(path, value))


def uncovered(
    model: torch.nn.Module, covered: Collection[torch.Tensor], leave: tuple[type, ...] = ()
) -> list[tuple[str, torch.Tensor]]:
    """Where tensors hang whose memory is not part of ``covered``'s, and they; without those that have none: on
    ``meta``, and the stand-ins that a compiler keeps.

    A view of a covered tensor is filled with it. One with gaps covers itself only.

    Args:
        leave: as of ``tensors``.
    """
    ids = {id(tensor) for tensor in covered}
    spans = _joined(span for tensor in covered if dense(tensor) and (span := _span(tensor)) is not None)

    def filled(tensor: torch.Tensor) -> bool:
        if id(tensor) in ids or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return True
        span = _span(tensor)
        if span is None:
            return False
        device, low, high = span
        before = bisect.bisect_right(spans, (device, low, math.inf)) - 1
        return low == high or (before >= 0 and spans[before][0] == device and high <= spans[before][2])

    return [(path, tensor) for path, tensor in tensors(model, leave) if not filled(tensor)]


Span = tuple[str, int, int]
"""Device, first byte, byte after the last."""


def _joined(spans: Iterable[Span]) -> list[Span]:
    """In order, those that touch or overlap made one."""
    found: list[Span] = []
    for device, low, high in sorted(spans):
        if found and found[-1][0] == device and low <= found[-1][2]:
            found[-1] = device, found[-1][1], max(high, found[-1][2])
        else:
            found.append((device, low, high))
    return found


def _span(tensor: torch.Tensor) -> Span | None:
    """None of a tensor that wraps others or is sparse."""
    try:
        return (str(tensor.device), *(extent(tensor) if tensor.numel() else (0, 0)))
    except RuntimeError:
        return None


def _held(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What one object holds, with the way to it."""
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"{path}[{_key(key)}]", item
            yield f"{path}[{_key(key)}]", key
    elif isinstance(value, _ITEMS):
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(list(value)))
    elif isinstance(value, functools.partial):
        yield path, value.func
        yield from ((f"{path}({number})", item) for number, item in enumerate(value.args))
        yield from ((f"{path}({name})", item) for name, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
        yield path, value.__func__
    elif isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
        yield path, value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{path}<{name}>", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield from ((f"{path}(default)", item) for item in value.__defaults__ or ())
        yield from ((f"{path}({name})", item) for name, item in (value.__kwdefaults__ or {}).items())
    elif isinstance(value, weakref.ReferenceType):
        yield path, value()
    yield from _attributes(path, value)


def _attributes(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    for name, item in list(getattr(value, "__dict__", {}).items()):
        if isinstance(value, torch.nn.Module) and name in ("_parameters", "_buffers", "_modules"):
            yield from ((f"{path}.{inner}", held) for inner, held in item.items())
        else:
            yield f"{path}.{name}", item
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            own = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if own not in ("__dict__", "__weakref__") and hasattr(value, own):
                yield f"{path}.{own}", getattr(value, own)


def _key(key: Any) -> str:
    return repr(key)[:60] if isinstance(key, (str, int)) else type(key).__name__
