"""What the bytes of a block depend on beside its tokens, and the address that follows from all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import FormatError
from ..format.document import JSONObject, canonical, mapping
from ..format.identity import Identity
from ..format.kv import Layout
from ..kv.table import TOKEN_BYTES, address, packed

ID_DIGITS = 32
"""Hexadecimal digits of the ids of contexts and sessions: 128 bits of SHA-256."""
MAX_CONTEXT = 16 << 20
"""Bytes of a context's document: 65536 regions, the most that a layout may have."""


@dataclass(frozen=True)
class Context:
    """Of one rank of an engine.

    Attributes:
        identity: of the stage ``kv``, the model id known: weights, config, dtype, quantisation, the engine and its
            version, parallel sizes and the rank.
        layout: with this rank's regions. How the engine hashes blocks itself is left out: it changes no byte.
    """

    identity: Identity
    layout: Layout

    def __post_init__(self) -> None:
        if self.identity.stage != "kv" or self.identity.model is None:
            raise FormatError("a context is of KV blocks, and says which weights made them")
        object.__setattr__(self, "layout", replace(self.layout, algorithm="", none_hash=""))

    def to_json(self) -> JSONObject:
        """The document that the store keeps."""
        return {"identity": self.identity.to_json(), "kv": self.layout.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Context:
        """Checked against docs/sessions.md.

        Raises:
            FormatError: what it does not allow.
        """
        document = mapping(value, "context")
        return cls(Identity.from_json(document.get("identity")), Layout.from_json(document.get("kv")))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical document: the address that first blocks have as their parent's."""
        return hashlib.sha256(canonical(self.to_json())).digest()

    @property
    def id(self) -> str:
        """By which records name it."""
        return self.digest.hex()[:ID_DIGITS]

    @cached_property
    def page(self) -> int:
        """Bytes of a block of one group: its page of every region, one after another."""
        return sum(region.page for region in self.layout.regions)

    def addresses(self, tokens: Sequence[int], salt: str | None, blocks: int) -> Iterator[bytes]:
        """Of the first blocks that these tokens fill, 32 bytes each.

        Args:
            salt: the cache salt of the request; it belongs to the first block, and so to all that follow.
        """
        size, parent = self.layout.block_size, self.digest
        data = packed(tokens[: blocks * size])
        for at in range(0, len(data), TOKEN_BYTES * size):
            parent = address(parent, data[at : at + TOKEN_BYTES * size], salt if at == 0 else None)
            yield parent
