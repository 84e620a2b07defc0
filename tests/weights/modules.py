"""Modules for the tests: planned by hypothesis or at random, built with any bytes and any layout in memory."""

import random
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from thaw_vllm.format.dtypes import ITEM_SIZE

DTYPES = [name for name in sorted(ITEM_SIZE) if hasattr(torch, name)]
LAYOUTS = ("contiguous", "permuted", "gaps", "offset")


def raw(length, rng):
    """Random bytes as a tensor, none of them a bool that is neither 0 nor 1."""
    return torch.frombuffer(bytearray(rng.randbytes(length) or b"\0"), dtype=torch.uint8)[:length]


def elements(count, dtype, rng):
    """``count`` elements of any bits, as one row."""
    item = ITEM_SIZE[dtype]
    # Allocated by torch, so that its address suits every dtype.
    found = torch.empty(count * item, dtype=torch.uint8)
    found.copy_(raw(count * item, rng))
    if dtype == "bool":
        found &= 1
    return found.view(getattr(torch, dtype))


def bits(tensor):
    """The elements' bytes in row-major order, whatever the layout."""
    if not tensor.numel():
        return b""
    item = tensor.element_size()
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[item]
    return tensor.detach().view(same_size).contiguous().reshape(-1).numpy().tobytes()


def state(module):
    """Dtype, shape and bytes of every parameter and buffer, under every name."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: (str(t.dtype), tuple(t.shape), bits(t)) for name, t in named}


@dataclass(frozen=True)
class Plan:
    """One tensor to be: how it lies in memory, and which of its dimensions repeat.

    ``order`` is that of the dimensions of a permuted one, from the largest step; without it, they are reversed.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple
    layout: str = "contiguous"
    order: tuple = ()
    repeated: tuple = ()

    def build(self, rng):
        """A tensor of random bits."""
        small = [1 if dim in self.repeated else size for dim, size in enumerate(self.shape)]
        count = torch.Size(small).numel()
        if self.layout == "permuted" and small:
            order = self.order or tuple(reversed(range(len(small))))
            there = [small[dim] for dim in order]
            back = [order.index(dim) for dim in range(len(small))]
            found = elements(count, self.dtype, rng).reshape(there).permute(back)
        elif self.layout == "gaps" and small:
            wide = [*small[:-1], 2 * small[-1] + 1]
            found = elements(torch.Size(wide).numel(), self.dtype, rng).reshape(wide)[..., 1::2]
        elif self.layout == "offset":
            found = elements(count + 3, self.dtype, rng)[3:].reshape(small)
        else:
            found = elements(count, self.dtype, rng).reshape(small)
        return found.expand(self.shape)


@dataclass(frozen=True)
class Tie:
    """A second name for a tensor, or a view inside it: ``dtype``, first byte, shape and whether it is transposed."""

    name: str
    kind: str
    owner: str
    view: tuple = None

    def build(self, owner):
        if self.view is None:
            return owner
        dtype, at, shape, transposed = self.view
        item = ITEM_SIZE[dtype]
        data = owner.view(torch.uint8)[at : at + item * torch.Size(shape).numel()]
        found = data.view(getattr(torch, dtype)).reshape(shape)
        return found.t() if transposed else found


@dataclass(frozen=True)
class Plans:
    """A module to be."""

    tensors: tuple
    ties: tuple = ()

    def build(self, seed):
        """The module with random bits."""
        rng, module, made = random.Random(seed), torch.nn.Module(), {}
        for plan in self.tensors:
            made[plan.name] = plan.build(rng)
            _register(module, plan, made[plan.name])
        for tie in self.ties:
            _register(module, tie, tie.build(made[tie.owner]))
        return module

    def elsewhere(self, layouts):
        """The same module, each tensor that nothing is tied to in another layout."""
        tied = {tie.owner for tie in self.ties}
        return Plans(
            tuple(p if p.name in tied else replace(p, layout=layouts[i]) for i, p in enumerate(self.tensors)), self.ties
        )


def _register(module, plan, tensor):
    *path, name = plan.name.split(".")
    for step in path:
        if step not in dict(module.named_children()):
            module.add_module(step, torch.nn.Module())
        module = module.get_submodule(step)
    if plan.kind == "parameter":
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


@st.composite
def plans(draw, ties=True, max_tensors=6):
    """Modules of any dtypes, shapes and layouts, with ties and views of other dtypes."""
    count = draw(st.integers(0, max_tensors))
    tensors = []
    for number in range(count):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        kind = draw(st.sampled_from(("parameter", "buffer")))
        repeated = [
            dim for dim, size in enumerate(shape) if size > 1 and kind == "buffer" and draw(st.integers(0, 3)) == 0
        ]
        tensors.append(
            Plan(
                draw(st.sampled_from(("", "child.", "child.deep."))) + f"t{number}",
                kind,
                draw(st.sampled_from(DTYPES)),
                shape,
                draw(st.sampled_from(LAYOUTS)),
                tuple(draw(st.permutations(range(len(shape))))),
                tuple(repeated),
            )
        )
    if not ties:
        return Plans(tuple(tensors))
    found = []
    for number, plan in enumerate(tensors):
        if draw(st.integers(0, 3)) == 0:
            found.append(Tie(f"tie{number}", plan.kind, plan.name))
    if draw(st.booleans()):
        length = 16 * draw(st.integers(1, 8))
        tensors.append(Plan("flat", "buffer", "uint8", (length,)))
        for number in range(draw(st.integers(0, 3))):
            dtype = draw(st.sampled_from([d for d in DTYPES if d != "bool"]))
            item = ITEM_SIZE[dtype]
            at = item * draw(st.integers(0, length // item - 1))
            rows = draw(st.integers(1, (length - at) // item))
            columns = draw(st.integers(1, (length - at) // item // rows))
            found.append(Tie(f"view{number}", "buffer", "flat", (dtype, at, (rows, columns), draw(st.booleans()))))
    return Plans(tuple(tensors), tuple(found))
