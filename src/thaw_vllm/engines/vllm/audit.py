"""What loading a checkpoint leaves behind beside parameters: buffers it filled, attributes it set, tensors it hid."""

from __future__ import annotations

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
        hidden: ``module path|attribute`` of tensors that are neither parameter nor buffer → (address, digest).
        marks: ``parameter name|attribute`` of what hangs on parameters and is no plain value → its type.
    """

    buffers: dict[str, bytes] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    hidden: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    marks: dict[str, type] = field(default_factory=dict)


def take(model: torch.nn.Module) -> State:
    """The state of ``model`` now; reads every buffer once."""
    state = State()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state.buffers[name] = _digest(buffer)
    for name, parameter in model.named_parameters():
        for attribute, value in vars(parameter).items():
            if not isinstance(value, SCALARS):
                state.marks[f"{name}|{attribute}"] = type(value)
    for path, owner in _owners(model):
        for attribute, value in vars(owner).items():
            if attribute in ("_parameters", "_buffers"):
                continue
            key = f"{path}|{attribute}"
            for suffix, tensor in _tensors(value):
                address = tensor.data_ptr() if tensor.device.type != "meta" else 0
                state.hidden[key + suffix] = (address, _digest(tensor))
            if isinstance(value, SCALARS) and not attribute.startswith("__") and attribute != "training":
                state.attributes[key] = value
    return state


def changed_buffers(before: State, after: State) -> set[str]:
    """Buffers that loading filled or made."""
    return {name for name, digest in after.buffers.items() if before.buffers.get(name) != digest}


def changed_attributes(before: State, after: State) -> dict[str, Any]:
    """Plain attributes that loading set or changed.

    Raises:
        UnsupportedError: loading made or filled a tensor that is neither parameter nor buffer, removed an attribute,
            or set one whose path cannot be stored.
    """
    for key, found in after.hidden.items():
        if before.hidden.get(key) != found:
            raise UnsupportedError(
                f"loading left a tensor in {key.replace('|', '.')!r} that is neither a parameter nor a buffer; this "
                "model cannot be frozen exactly at the raw stage"
            )
    for key, kind in after.marks.items():
        if before.marks.get(key) is not kind:
            raise UnsupportedError(
                f"loading hung a {kind.__name__} on the parameter {key.replace('|', '.')!r}; this model cannot be "
                "frozen exactly at the raw stage, serve it from its checkpoint"
            )
    gone = sorted(set(before.attributes) - set(after.attributes))
    if gone:
        raise UnsupportedError(f"loading removed the attribute {gone[0].replace('|', '.')!r}; that cannot be stored")
    changed = {}
    for key, value in after.attributes.items():
        if key not in before.attributes or not _same(before.attributes[key], value):
            if "__" in key or (isinstance(value, float) and not math.isfinite(value)):
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
        if plain and attribute not in vars(owner):  # new names are fine, unless a parameter, child or method has it
            plain = not hasattr(owner, attribute)
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


def _digest(tensor: torch.Tensor) -> bytes:
    from blake3 import blake3

    if tensor.device.type == "meta" or not tensor.numel():
        return repr((tensor.shape, tensor.dtype)).encode()
    tensor = tensor.detach()
    packed = tensor.cpu() if dense(tensor) else tensor.contiguous().cpu()
    head = repr((tuple(tensor.shape), tensor.stride(), str(tensor.dtype))).encode()
    return blake3(head + byte_view(packed).numpy().tobytes()).digest()
