"""Every tensor that a model holds, wherever it hangs: what a swap would have to fill."""

from __future__ import annotations

import bisect
import functools
import math
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ....errors import UnsupportedError
from ....weights.layout import dense, extent

MOST = 2_000_000
"""Objects that are looked at. A model of a thousand layers has a tenth of it."""
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device})
"""Hold nothing."""
_PLAIN = frozenset({dict, OrderedDict, list, tuple, set, frozenset})
"""Hold nothing where they are empty, as most of a module's are."""
_SEQUENCES = frozenset({list, tuple, set, frozenset})
"""These alone, not what is derived from them, have no attributes."""
_ITEMS = (list, tuple, set, frozenset, deque)
_LEFT = (
    *(type, types.ModuleType, str, bytes, bytearray, int, float, complex),
    *(FakeTensorMode, ShapeEnv, torch.fx.Node, Source),
)
"""Belong to no model, or hold nothing; or keep books of a trace, with the tensors it has seen, and are never run. Of a
graph's nodes the graph tells what is: what they call, and constants that they call it with."""


@dataclass(slots=True)
class _Way:
    """How an object was come to; written out for the few that are told of."""

    before: _Way | None
    form: str
    name: Any

    def __str__(self) -> str:
        steps, way = [], self
        while way.before is not None:
            name = way.name
            if way.form == "[{}]":
                name = repr(name)[:60] if isinstance(name, (str, int)) else type(name).__name__
            steps.append(way.form.format(name))
            way = way.before
        return "".join(reversed(steps)).removeprefix(".")


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
    for way, tensor in _tensors(model, leave):
        yield str(way), tensor


def _tensors(model: torch.nn.Module, leave: tuple[type, ...]) -> Iterator[tuple[_Way, torch.Tensor]]:
    seen: dict[int, Any] = {}  # held, so that no other object gets one's id meanwhile
    slots: dict[int, tuple[str, ...]] = {}  # by id of a class, which an object in ``seen`` keeps
    pending: list[tuple[_Way, Any]] = [(_Way(None, "", ""), model)]
    left = (*_LEFT, *leave)
    while pending:
        way, value = pending.pop()
        # By its own type first: isinstance would ask what a proxy stands for.
        if id(value) in seen or type(value) in weakref.ProxyTypes or isinstance(value, left):
            continue
        seen[id(value)] = value
        if len(seen) > MOST:
            raise UnsupportedError(f"the model holds more than {MOST} objects, so what hangs on it cannot be listed")
        if isinstance(value, torch.Tensor):
            yield way, value
        if not isinstance(value, FakeTensor):
            pending.extend(
                (_Way(way, form, name), item)
                for form, name, item in _held(value, slots)
                if type(item) not in _ATOMS and id(item) not in seen and (type(item) not in _PLAIN or item)
            )


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

    return [(str(way), tensor) for way, tensor in _tensors(model, leave) if not filled(tensor)]


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


def _held(value: Any, slots: dict[int, tuple[str, ...]]) -> Iterator[tuple[str, Any, Any]]:
    """What one object holds, without atoms: how the way to it is written, the name in that, and it."""
    kind = type(value)
    # Most objects are containers of nothing but atoms, which C code tells soonest.
    if kind in _SEQUENCES:
        if not _ATOMS.issuperset(map(type, value)):
            for number, item in enumerate(list(value)):
                if type(item) not in _ATOMS:
                    yield "[{}]", number, item
        return
    if kind is dict:
        if not _ATOMS.issuperset(map(type, value.values())) or not _ATOMS.issuperset(map(type, value)):
            yield from _entries(value)
        return
    if isinstance(value, torch.fx.Graph):
        for node in value.nodes:
            yield ".{}", node.name, node.target
            yield from (("({})", node.name, item) for item in (*node.args, *node.kwargs.values()))
        return
    if isinstance(value, Mapping):
        yield from _entries(value)
    elif isinstance(value, _ITEMS):
        yield from (("[{}]", number, item) for number, item in enumerate(list(value)))
    elif isinstance(value, functools.partial):
        yield "", "", value.func
        yield from (("({})", number, item) for number, item in enumerate(value.args))
        yield from (("({})", name, item) for name, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield "", "", value.__self__
        yield "", "", value.__func__
    elif isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
        yield "", "", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield "<{}>", name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield from (("({})", "default", item) for item in value.__defaults__ or ())
        yield from (("({})", name, item) for name, item in (value.__kwdefaults__ or {}).items())
    elif isinstance(value, weakref.ReferenceType):
        yield "", "", value()
    yield from _attributes(value, slots)


def _entries(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key, item in list(value.items()):
        if type(item) not in _ATOMS:
            yield "[{}]", key, item
        if type(key) not in _ATOMS:
            yield "[{}]", key, key


def _attributes(value: Any, slots: dict[int, tuple[str, ...]]) -> Iterator[tuple[str, Any, Any]]:
    own = getattr(value, "__dict__", None)
    if own and not _ATOMS.issuperset(map(type, own.values())):
        for name, item in list(own.items()):
            if isinstance(value, torch.nn.Module) and name in ("_parameters", "_buffers", "_modules"):
                yield from ((".{}", inner, held) for inner, held in item.items())
            elif type(item) not in _ATOMS:
                yield ".{}", name, item
    kind = type(value)
    if id(kind) not in slots:
        slots[id(kind)] = _slots(kind)
    for slot in slots[id(kind)]:
        if hasattr(value, slot):
            yield ".{}", slot, getattr(value, slot)


def _slots(kind: type) -> tuple[str, ...]:
    """Attributes of objects of a class that are not in their ``__dict__``."""
    found: list[str] = []
    for one in kind.__mro__:
        slots = vars(one).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            own = f"_{one.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if own not in ("__dict__", "__weakref__"):
                found.append(own)
    return tuple(found)
