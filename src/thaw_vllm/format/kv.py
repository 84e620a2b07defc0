"""The header's ``kv`` object: how the KV cache of one engine was laid out when its blocks were frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import FormatError, MismatchError
from .document import JSONObject, array, integer, mapping, text
from .limits import MAX_RANK

MAX_GROUPS = 64
MAX_REGIONS = 1 << 16
MAX_BLOCKS = 1 << 24
MAX_BLOCK_SIZE = 1 << 16
MAX_TOKENS = 1 << 28
"""Of all blocks together."""
MAX_HASH = 64
"""Bytes of an engine's hash of a block."""
MAX_EXTRA = 64 << 20
"""Bytes of ``blocks.extra``."""
_HASHES = frozenset("0123456789abcdef")

TOKENS, PARENTS, SLOTS, HASHES, EXTRA = (
    "blocks.tokens",
    "blocks.parents",
    "blocks.slots",
    "blocks.hashes",
    "blocks.extra",
)
"""Names of the tensors that make up the table of blocks, in rank 0's file; docs/format.md, section 16."""
PAGES = "pages."
"""What the names of page tensors begin with; the region's name follows."""


@dataclass(frozen=True)
class Group:
    """Layers whose blocks are allocated together.

    Attributes:
        kind: the engine's name of how they attend (``FullAttentionSpec``, ``SlidingWindowSpec``, …).
        window: tokens that a sliding window spans; None without one.
        layers: their names, in order.
    """

    kind: str
    window: int | None
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """Memory of which each block has a page.

    Attributes:
        name: the first layer that lies in it, and its position among that layer's tensors.
        dtype: of its elements as the engine sees them.
        shape, stride: of one block, in elements.
        page: bytes of one block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    page: int

    def to_json(self) -> JSONObject:
        """An entry of ``kv.regions``."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "page": self.page,
        }


@dataclass(frozen=True)
class Layout:
    """Everything about an engine's KV cache that its pages depend on.

    Attributes:
        block_size: tokens of a block.
        cache_dtype: the element type of keys and values.
        groups: of layers; a block belongs to one of them.
        regions: of this rank.
        algorithm: how the engine hashed its blocks. For the record: hashes are computed anew where blocks are thawed.
        none_hash: what it hashed the first block's parent as, in hexadecimal; likewise.
    """

    block_size: int
    cache_dtype: str
    groups: tuple[Group, ...]
    regions: tuple[Region, ...]
    algorithm: str = ""
    none_hash: str = ""

    def to_json(self) -> JSONObject:
        """The header's ``kv``."""
        return {
            "block_size": self.block_size,
            "cache_dtype": self.cache_dtype,
            "groups": [{"kind": g.kind, "window": g.window, "layers": list(g.layers)} for g in self.groups],
            "regions": [r.to_json() for r in self.regions],
            "algorithm": self.algorithm,
            "none_hash": self.none_hash,
        }

    @classmethod
    def from_json(cls, value: Any) -> Layout:
        """Checked against docs/format.md, section 16.

        Raises:
            FormatError: what it does not allow.
        """
        document = mapping(value, "kv")
        none_hash = text(document.get("none_hash", ""), "kv.none_hash", 128)
        if not set(none_hash) <= _HASHES:
            raise FormatError("kv.none_hash must be hexadecimal digits")
        found = cls(
            integer(document.get("block_size"), "kv.block_size", 1, MAX_BLOCK_SIZE),
            text(document.get("cache_dtype"), "kv.cache_dtype", 64),
            tuple(_group(g, f"kv.groups[{i}]") for i, g in enumerate(_some(document, "groups", MAX_GROUPS))),
            tuple(_region(r, f"kv.regions[{i}]") for i, r in enumerate(_some(document, "regions", MAX_REGIONS))),
            text(document.get("algorithm", ""), "kv.algorithm", 64),
            none_hash,
        )
        if len({r.name for r in found.regions}) != len(found.regions):
            raise FormatError("kv.regions names a region twice")
        return found


def require_layout(found: Layout, wanted: Layout, what: str, *, regions: bool = True) -> None:
    """Hold a file's layout against the one an engine has.

    Args:
        found: the file's.
        wanted: the engine's.
        what: the file's name, for messages.
        regions: hold those against each other too; every rank has its own.

    Raises:
        MismatchError: on the first thing that differs, with its cure.
    """

    def differ(thing: str, ours: object, theirs: object, cure: str) -> None:
        if ours != theirs:
            raise MismatchError(f"{what!r} holds KV blocks with {thing} {ours}, the engine has {theirs}; {cure}")

    differ("block size", found.block_size, wanted.block_size, f"start it with block_size={found.block_size}")
    differ("element type", found.cache_dtype, wanted.cache_dtype, "pass the same kv_cache_dtype, or freeze again")
    for thing, ours, theirs in (
        ("groups", [(g.kind, g.window) for g in found.groups], [(g.kind, g.window) for g in wanted.groups]),
        ("layers", [g.layers for g in found.groups], [g.layers for g in wanted.groups]),
        ("regions", [r.name for r in found.regions], [r.name for r in wanted.regions]),
    ):
        if ours != theirs and (regions or thing != "regions"):
            raise MismatchError(
                f"{what!r} holds KV blocks of other {thing} than the engine has; thaw them into the engine version and "
                "configuration they were frozen from, or freeze again"
            )
    for region, other in zip(found.regions, wanted.regions, strict=True) if regions else ():
        if region != other:
            raise MismatchError(
                f"{what!r} holds {region.name!r} as {region.dtype} {list(region.shape)} with strides "
                f"{list(region.stride)}, the engine has {other.dtype} {list(other.shape)} with {list(other.stride)}; "
                "use the same attention backend and vLLM version, or freeze again"
            )


def _some(document: JSONObject, name: str, limit: int) -> list[Any]:
    found = array(document.get(name), f"kv.{name}", limit)
    if not found:
        raise FormatError(f"kv.{name} is empty")
    return found


def _group(value: Any, where: str) -> Group:
    document = mapping(value, where)
    window = document.get("window")
    return Group(
        text(document.get("kind"), f"{where}.kind", 128),
        None if window is None else integer(window, f"{where}.window", 1),
        tuple(text(n, f"{where}.layers", 1024) for n in array(document.get("layers"), f"{where}.layers", MAX_REGIONS)),
    )


def _region(value: Any, where: str) -> Region:
    document = mapping(value, where)
    shape, stride = (
        tuple(integer(n, f"{where}.{name}") for n in array(document.get(name), f"{where}.{name}", MAX_RANK))
        for name in ("shape", "stride")
    )
    return Region(
        text(document.get("name"), f"{where}.name", 1000),
        text(document.get("dtype"), f"{where}.dtype", 64),
        shape,
        stride,
        integer(document.get("page"), f"{where}.page", 1),
    )
