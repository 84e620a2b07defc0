"""A model shaped like Llama 3 8B, or a smaller one like it, of random bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..transport import parallel

FULL_GB = 16.06
DTYPE = torch.bfloat16
_PIECE = 8 << 20
"""Bytes that one thread makes at a time."""
_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Llama's sizes; the defaults are those of Llama 3 8B, 16.06 GB in bfloat16."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    kv: int = 1024
    vocabulary: int = 128256

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by their names in a checkpoint, in its order."""
        wide, inner, kv = self.hidden, self.inner, self.kv
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, wide)}
        for layer in range(self.layers):
            for name, shape in (
                ("self_attn.q_proj", (wide, wide)),
                ("self_attn.k_proj", (kv, wide)),
                ("self_attn.v_proj", (kv, wide)),
                ("self_attn.o_proj", (wide, wide)),
                ("mlp.gate_proj", (inner, wide)),
                ("mlp.up_proj", (inner, wide)),
                ("mlp.down_proj", (wide, inner)),
                ("input_layernorm", (wide,)),
                ("post_attention_layernorm", (wide,)),
            ):
                found[f"model.layers.{layer}.{name}.weight"] = shape
        return found | {"model.norm.weight": (wide,), "lm_head.weight": (self.vocabulary, wide)}

    @property
    def bytes(self) -> int:
        """Of all tensors, in bfloat16."""
        return sum(2 * torch.Size(shape).numel() for shape in self.tensors().values())


def shape_for(size_gb: float) -> Shape:
    """The shape of about ``size_gb``: Llama 3 8B with fewer or more layers, or, below 3 GB, a narrower one of two."""
    full, size = Shape(), size_gb * 1e9
    layer = (full.bytes - Shape(layers=0).bytes) // full.layers
    layers = round((size - Shape(layers=0).bytes) / layer)
    if layers >= 2:
        return Shape(layers)
    narrow = [Shape(2, 64 * n, 224 * n, 16 * n, 2004 * n) for n in range(1, 64)]
    return min(narrow, key=lambda shape: abs(shape.bytes - size))


class Model(torch.nn.Module):
    """Nothing but the tensors, under their names; cannot be run."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            place: torch.nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, in the order they were given."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def poisoned(shape: Shape, device: torch.device) -> Model:
    """A model whose memory is there and holds a pattern that no run may leave behind."""
    tensors = {name: torch.empty(size, dtype=DTYPE, device=device) for name, size in shape.tensors().items()}
    poison(tensors)
    return Model(tensors)


def poison(tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite, so that bytes which a run does not write are found."""
    for tensor in tensors.values():
        tensor.view(torch.int16).fill_(0x5A5A)


def random(shape: Shape, device: torch.device, seed: int = 0) -> Model:
    """Normally distributed with a deviation of 0.02, which compresses as real weights do; made on the device, or by
    numpy in all threads where that is the host."""
    tensors = {name: torch.empty(size, dtype=DTYPE, device=device) for name, size in shape.tensors().items()}
    if device.type == "cpu":
        _fill_on_host(tensors, seed)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        for tensor in tensors.values():
            tensor.normal_(0, _DEVIATION, generator=generator)
    return Model(tensors)


def _fill_on_host(tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    import numpy as np

    def fill(task: tuple[int, torch.Tensor]) -> None:
        number, part = task
        generator = np.random.Generator(np.random.SFC64([seed, number]))
        part.copy_(torch.from_numpy(generator.standard_normal(part.numel(), np.float32) * np.float32(_DEVIATION)))

    with ThreadPoolExecutor(parallel.default_workers()) as pool:
        list(pool.map(fill, enumerate(_pieces(tensors))))


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors.values():
        flat = tensor.reshape(-1)
        for at in range(0, flat.numel(), _PIECE // 2):
            yield flat[at : at + _PIECE // 2]
