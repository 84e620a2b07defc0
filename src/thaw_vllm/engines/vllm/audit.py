"""What loading a checkpoint leaves behind beside parameters: buffers it filled, attributes it set, tensors it hid."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnsupportedError
from ...format.header import SCALARS
from ...weights.layout import byte_view, dense
from .versions import online_quantised

_HOSTS = ("quant_method", "impl")
"""Objects beside a module whose attributes loading may set."""


@dataclass(frozen=True)
class State:
    """A module tree's state beside its parameters, taken before or after loading.

    Attributes:
        buffers: name → digest of the bytes.
        attributes: ``module path|attribute`` → plain value.
        others: ``module path|attribute`` of every other value.
        containers: ``module path|attribute`` of lists, tuples, sets and dicts → what they hold, spelt out.
        hidden: ``module path|attribute`` of tensors that are neither parameter nor buffer → (address, digest).
        marks: ``parameter name|attribute`` of what hangs on parameters → its value, spelt out.
        shapes: parameter or buffer → shape and dtype.
    """

    buffers: dict[str, bytes] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    containers: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)


def take(model: torch.nn.Module) -> State:
    """The state of ``model`` now; reads every buffer once."""
    state = State()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state.buffers[name] = digest(buffer)
        state.shapes[name] = f"{tuple(buffer.shape)} {buffer.dtype}"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state.shapes[name] = f"{tuple(parameter.shape)} {parameter.dtype}"
        for attribute, value in vars(parameter).items():
            state.marks[f"{name}|{attribute}"] = _spelt(value)
    for path, owner in _owners(model):
        for attribute, value in vars(owner).items():
            if attribute in ("_parameters", "_buffers"):
                continue
            key = f"{path}|{attribute}"
            for suffix, tensor in _tensors(value):
                address = tensor.data_ptr() if tensor.device.type != "meta" else 0
                state.hidden[key + suffix] = (address, digest(tensor))
            if isinstance(value, _CONTAINERS):
                state.containers[key] = _spelt(value)
            if not isinstance(value, SCALARS):
                state.others.add(key)
            elif not attribute.startswith("__") and attribute != "training":
                state.attributes[key] = value
    return state


def numbers(model: torch.nn.Module) -> dict[str, float]:
    """``module path|attribute`` → value, of all floats that modules and the objects beside them have as attributes.

    What is made of weights for use as a plain value is a scale, which is one. Names, counters and switches come and go
    while an engine runs.
    """
    return {
        f"{path}|{attribute}": value
        for path, owner in _owners(model)
        for attribute, value in vars(owner).items()
        if isinstance(value, float)
    }


def changed_buffers(before: State, after: State) -> set[str]:
    """Buffers that loading filled."""
    return {name for name, found in after.buffers.items() if before.buffers.get(name) != found}


def changed_attributes(before: State, after: State) -> dict[str, Any]:
    """Plain attributes that loading set or changed.

    Raises:
        UnsupportedError: loading made, removed or reshaped a parameter or buffer; made or filled a tensor that is
            neither; changed a list, set or dict; or removed an attribute, or set one that cannot be stored.
    """
    for name in sorted(before.shapes.keys() | after.shapes.keys()):
        held, found_shape = (state.shapes.get(name, "nothing") for state in (before, after))
        if held != found_shape:
            raise UnsupportedError(
                f"loading turned {name!r} from {held} into {found_shape}, so a fresh model would have no place for it; "
                "this model cannot be frozen at the raw stage, serve it from its checkpoint"
            )
    for key, found in after.hidden.items():
        if before.hidden.get(key) != found:
            raise UnsupportedError(
                f"loading left a tensor in {key.replace('|', '.')!r} that is neither a parameter nor a buffer; this "
                "model cannot be frozen exactly at the raw stage"
            )
    for key, held in after.marks.items():
        if before.marks.get(key) != held:
            raise UnsupportedError(
                f"loading hung {held[:80]} on the parameter {key.replace('|', '.')!r}; this model cannot be frozen "
                "exactly at the raw stage, serve it from its checkpoint"
            )
    for key in sorted(before.containers.keys() | after.containers.keys()):
        if key not in before.others and key not in before.attributes and after.containers[key] in _EMPTY:
            continue  # where loading keeps what it has not placed yet; a fresh model goes without
        if before.containers.get(key) != after.containers.get(key):
            raise UnsupportedError(
                f"loading changed what {key.replace('|', '.')!r} holds to {after.containers.get(key, 'nothing')[:80]}; "
                "this model cannot be frozen exactly at the raw stage, serve it from its checkpoint"
            )
    gone = sorted(set(before.attributes) - set(after.attributes))
    if gone:
        raise UnsupportedError(f"loading removed the attribute {gone[0].replace('|', '.')!r}; that cannot be stored")
    changed = {}
    for key, value in after.attributes.items():
        if key not in before.attributes or not _same(before.attributes[key], value):
            if "__" in key or key in before.others or (isinstance(value, float) and not math.isfinite(value)):
                raise UnsupportedError(
                    f"loading set {key.replace('|', '.')!r} to {value!r}, which a snapshot cannot store; this model "
                    "cannot be frozen exactly at the raw stage"
                )
            changed[key] = value
    return changed


def attribute_owners(model: torch.nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """For each stored attribute, the object of ``model`` that it belongs to.

    Raises:
        UnsupportedError: the model has no such module, or something else than a plain value under that name.
    """
    owners = dict(_owners(model))
    found = {}
    for key in attributes:
        path, _, attribute = key.partition("|")
        owner = owners.get(path)
        plain = owner is not None and isinstance(vars(owner).get(attribute), SCALARS)
        if plain and attribute not in vars(owner):
            # New names and plain defaults of the class are fine; names of parameters, children and methods are not.
            default = inspect.getattr_static(type(owner), attribute, owner)
            plain = not hasattr(owner, attribute) or isinstance(default, SCALARS)
        if not plain or "__" in attribute:
            raise UnsupportedError(f"the snapshot sets {key.replace('|', '.')!r}, which this model does not have")
        found[key] = owner
    return found


def apply_attributes(owners: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Set stored attributes on the objects that ``attribute_owners`` found."""
    for key, value in attributes.items():
        setattr(owners[key], key.partition("|")[2], value)


def refuse_unsound(model: torch.nn.Module) -> None:
    """Refuse models whose raw stage is not a set of filled parameters.

    Raises:
        UnsupportedError: online quantisation, or parameters on the meta device after initialisation.
    """
    name = online_quantised(model)
    if name is not None:
        raise UnsupportedError(
            f"{name!r} is quantised while loading, so there is nothing to freeze between loading and processing; "
            "quantise the checkpoint beforehand, or serve it without --load-format thaw"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedError(f"{name!r} is materialised by its own loader; this model cannot be frozen raw")


def _owners(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield path, module
        for host in _HOSTS:
            owner = vars(module).get(host)
            if owner is not None and hasattr(owner, "__dict__") and id(owner) not in seen:
                seen.add(id(owner))
                yield f"{path}.{host}" if path else host, owner


_CONTAINERS = (list, tuple, set, frozenset, dict)
_EMPTY = {f"{kind.__name__}()" for kind in _CONTAINERS}
_DEPTH = 4


def _spelt(value: Any, depth: int = _DEPTH) -> str:
    """Plain values and what containers hold of them, equal only where they are equal; else the type's name."""
    if isinstance(value, SCALARS):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, _CONTAINERS) and depth:
        if isinstance(value, dict):
            parts = [f"{_spelt(k, depth - 1)}: {_spelt(v, depth - 1)}" for k, v in value.items()]
        else:
            parts = [_spelt(item, depth - 1) for item in value]
        if isinstance(value, (set, frozenset)):
            parts.sort()
        return f"{type(value).__name__}({', '.join(parts)})"
    return type(value).__name__


def _tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that an attribute is or directly holds."""
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value) if isinstance(item, torch.Tensor))
    elif isinstance(value, dict):
        yield from ((f"[{name!r}]", item) for name, item in value.items() if isinstance(item, torch.Tensor))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def digest(tensor: torch.Tensor) -> bytes:
    """Of its bytes, shape, strides and dtype; of one without bytes, of its shape and dtype."""
    from blake3 import blake3

    if tensor.device.type == "meta" or not tensor.numel():
        return repr((tensor.shape, tensor.dtype)).encode()
    tensor = tensor.detach()
    packed = tensor.cpu() if dense(tensor) else tensor.contiguous().cpu()
    head = repr((tuple(tensor.shape), tensor.stride(), str(tensor.dtype))).encode()
    return blake3(head + byte_view(packed).numpy().tobytes()).digest()
