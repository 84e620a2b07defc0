"""The header: identity, ids, source, the set of ranks, and what loading left behind beside tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError
from .document import JSONObject, array, integer, mapping, printable, short, text
from .identity import Identity, Parallel, hex_digest
from .kv import Layout
from .limits import MAX_RANKS

UNSEALED = "0" * 64
"""Stands where an id is not known yet while the file is being written; never valid in a published file."""

SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Member:
    """One rank's file of a set: a base name beside the manifest, its size in bytes and its content id."""

    name: str
    size: int
    content: str


@dataclass(frozen=True)
class RankSet:
    """The set this file belongs to. ``members`` (by rank, the manifest's own entry left out) only in rank 0's file."""

    id: str
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Header:
    """Everything about a snapshot that is not a tensor's shape or place.

    Attributes:
        identity: who this is.
        content: the content id, 64 hexadecimal digits (docs/format.md, section 7).
        writer: name and version of the program that wrote it.
        source: what it was made from: file names, sizes and digests (``weights/provenance.py``), free otherwise.
        attributes: ``module path|attribute`` → plain value, set on the modules after loading.
        ranks: the set of rank files, when there is more than one.
        metadata: free text by key.
        kv: of a file that holds KV blocks; None in one that holds weights.
    """

    identity: Identity
    content: str = UNSEALED
    writer: str = ""
    source: JSONObject = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    ranks: RankSet | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    kv: Layout | None = None

    @property
    def set_id(self) -> str | None:
        """Of the set of ranks' files that the file belongs to; None of one that stands alone."""
        return None if self.ranks is None else self.ranks.id

    def to_json(self) -> JSONObject:
        """The document of docs/format.md, section 3."""
        document: JSONObject = {
            "format": "thaw",
            "holds": "weights" if self.kv is None else "kv",
            "content": self.content,
            "identity": self.identity.to_json(),
            "writer": self.writer,
            "source": self.source,
            "attributes": self.attributes,
            "metadata": self.metadata,
        }
        if self.kv is not None:
            document["kv"] = self.kv.to_json()
        if self.ranks is not None:
            document["set"] = {
                "id": self.ranks.id,
                "members": [{"name": m.name, "size": m.size, "content": m.content} for m in self.ranks.members],
            }
        return document


def from_json(document: JSONObject) -> Header:
    """Check a parsed header.

    Raises:
        FormatError: anything docs/format.md, section 3, does not allow.
    """
    if document.get("format") != "thaw":
        raise FormatError(f"the header says it is of the format {short(document.get('format'))}, not thaw")
    holds = document.get("holds")
    if holds not in ("weights", "kv"):
        raise FormatError(f"the header says it holds {short(holds)}, neither weights nor kv")
    attributes = mapping(document.get("attributes", {}), "attributes")
    for key, value in attributes.items():
        if not isinstance(value, SCALARS) or key.count("|") != 1 or "__" in key:
            raise FormatError(f"attributes: {key[:80]!r} is not a plain value of a module's attribute")
    metadata = mapping(document.get("metadata", {}), "metadata")
    identity = Identity.from_json(document.get("identity"))
    if (identity.stage == "kv") != (holds == "kv"):
        raise FormatError(f"the header says it holds {holds}, and its identity is of the stage {identity.stage!r}")
    content = hex_digest(document.get("content"), "content")
    if content == UNSEALED:
        raise FormatError("content is not filled in: the file was never finished")
    return Header(
        identity=identity,
        content=content,
        writer=text(document.get("writer", ""), "writer", 256),
        source=mapping(document.get("source", {}), "source"),
        attributes=attributes,
        ranks=_ranks(document.get("set"), identity.parallel),
        metadata={text(k, "metadata key", 256): _free(v, f"metadata.{k[:40]}") for k, v in metadata.items()},
        kv=Layout.from_json(document.get("kv")) if holds == "kv" else None,
    )


def _free(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where} must be a string")
    return value


def _ranks(value: Any, parallel: Parallel) -> RankSet | None:
    if value is None:
        if parallel.world > 1:
            raise FormatError(f"set: missing, though this is rank {parallel.rank} of {parallel.world}")
        return None
    document = mapping(value, "set")
    identifier = text(document.get("id"), "set.id", 32)
    if len(identifier) != 32 or not set(identifier) <= set("0123456789abcdef"):
        raise FormatError("set.id must be 32 hexadecimal digits")
    members = []
    for i, entry in enumerate(array(document.get("members", []), "set.members", MAX_RANKS)):
        entry = mapping(entry, f"set.members[{i}]")
        name = text(entry.get("name"), f"set.members[{i}].name")
        if not plain_member_name(name):
            raise FormatError(f"set.members[{i}]: {name[:80]!r} is not a base name beside the manifest")
        size = integer(entry.get("size"), f"set.members[{i}].size", 1)
        members.append(Member(name, size, hex_digest(entry.get("content"), f"set.members[{i}].content")))
    expected = parallel.world - 1 if parallel.rank == 0 else 0
    if len(members) != expected:
        raise FormatError(f"set.members names {len(members)} files, rank {parallel.rank} must name {expected}")
    if len({m.name for m in members}) != len(members):
        raise FormatError("set.members names a file twice")
    return RankSet(identifier, tuple(members))


def plain_member_name(name: str) -> bool:
    """Whether ``name`` can be a rank's file: a printable base name without a path, not hidden."""
    return 0 < len(name) <= 255 and name[0] != "." and not {"/", "\\"} & set(name) and printable(name)
