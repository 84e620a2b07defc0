"""A session's record: its tokens, how it was sampled, where it came from, and which blocks were kept of it."""

from __future__ import annotations

import hashlib
import secrets
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import CorruptionError, FormatError, UsageError, VersionError
from ..format.document import JSONObject, canonical, integer, mapping, parse, text
from ..format.document import array as json_array
from ..format.identity import model_id
from ..format.kv import MAX_BLOCK_SIZE, MAX_BLOCKS, MAX_GROUPS
from ..kv.table import MAX_SALT
from .context import ID_DIGITS

MAGIC = b"thaw session 1\n"
"""The first line of a record; the number is the version."""
EXPIRING = b"thaw session 2\n"
"""Likewise, of one that says when it expires: readers of version 1 take no other members than they know."""
MAX_HEAD = 1 << 20
"""Bytes of the line that follows."""
MAX_TOKENS = 1 << 26
MAX_LABELS, MAX_LABEL = 64, 200
MAX_RANKS = 4096
MAX_TIME = 1 << 40
MAX_TTL = 1 << 32
"""Seconds."""
MAX_ADDRESSES = 1 << 22
"""Blocks of a session, counted for each rank: a million tokens of 64 ranks in blocks of 16."""
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Head:
    """A record without its tokens.

    Attributes:
        count: tokens.
        prompt: the first so many of them were given, the others generated.
        created: seconds since 1970.
        parent: the session that it continues or branches off; it may be gone by now.
        fork: tokens that it has in common with the parent as it was then.
        labels: whatever names its owner gave it.
        finished: why generating ended (``stop``, ``length``, …); None: it was still going on.
        sampling: the request's sampling parameters, as plain values; None: not known.
        random: the state of the request's own random numbers, as the engine understands it; None: there was none, or
            the parameters' seed says it all.
        salt: the cache salt of the request.
        model: the model id.
        source: the model's directory or name as the engine was told; where its tokenizer is looked for.
        block_size: tokens of a block.
        blocks: the first so many of them are kept.
        kept: for each group of layers the first block of which pages are kept: 0, or where a window begins.
        contexts: their ids, by rank.
        writer: which program made it.
        nonce: sets it apart from any other of the same content.
        expires: seconds since 1970; from then on it may be removed. None: it stays.
    """

    count: int
    prompt: int
    model: str
    block_size: int
    blocks: int
    kept: tuple[int, ...]
    contexts: tuple[str, ...]
    created: float
    parent: str | None = None
    fork: int | None = None
    labels: tuple[str, ...] = ()
    finished: str | None = None
    sampling: JSONObject | None = None
    random: JSONObject | None = None
    salt: str | None = None
    source: str | None = None
    writer: str = ""
    nonce: str = ""
    expires: float | None = None

    @property
    def magic(self) -> bytes:
        """The record's first line."""
        return MAGIC if self.expires is None else EXPIRING

    @property
    def files(self) -> int:
        """Of blocks, that each rank has."""
        return sum(self.blocks - first for first in self.kept)

    def to_json(self) -> JSONObject:
        """The record's second line."""
        found = {one.name: getattr(self, one.name) for one in fields(Head)}
        if self.expires is None:
            del found["expires"]
        return found | {name: list(found[name]) for name in ("kept", "contexts", "labels")}

    def shown(self, id_: str) -> JSONObject:
        """The session of this id as plain values that people may see: its tokens are counted, its salt is not told."""
        known = {name: value for name, value in self.to_json().items() if name not in ("nonce", "salt", "random")}
        own = {"tokens": known.pop("count"), "salted": self.salt is not None, "expires": self.expires}
        return {"id": id_} | known | own

    def expired(self, at: float) -> bool:
        """Whether its time is over, at so many seconds since 1970."""
        return self.expires is not None and self.expires <= at

    @classmethod
    def from_json(cls, document: JSONObject) -> Head:
        """Checked against docs/sessions.md.

        Raises:
            FormatError: what it does not allow.
        """
        known = {one.name for one in fields(cls)} - ({"expires"} - document.keys())
        if document.keys() != known:
            name = min(document.keys() ^ known)
            raise FormatError(f"the session's {name!r} is missing, or nothing known")
        count = integer(document["count"], "count", 0, MAX_TOKENS)
        size = integer(document["block_size"], "block_size", 1, MAX_BLOCK_SIZE)
        blocks = integer(document["blocks"], "blocks", 0, min(MAX_BLOCKS, count // size))
        kept = json_array(document["kept"], "kept", MAX_GROUPS)
        contexts = json_array(document["contexts"], "contexts", MAX_RANKS)
        labels = json_array(document["labels"], "labels", MAX_LABELS)
        parent, fork = document["parent"], document["fork"]
        if not kept or not contexts:
            raise FormatError("kept and contexts must have an entry for each group and rank")
        if blocks * len(contexts) > MAX_ADDRESSES:
            raise FormatError(
                f"{blocks} blocks of {len(contexts)} ranks are more than {MAX_ADDRESSES}, which is the limit"
            )
        firsts = [integer(at, "kept", 0, blocks) for at in kept]
        if blocks and min(firsts) == blocks:
            raise FormatError("of the blocks that a session has a group must have pages")
        if (parent is None) != (fork is None):
            raise FormatError("a session with a parent says where it forked, and no other does")
        return cls(
            count=count,
            prompt=integer(document["prompt"], "prompt", 0, count),
            model=model_id(document["model"], "model"),
            block_size=size,
            blocks=blocks,
            kept=tuple(firsts),
            contexts=tuple(hex_id(one, "contexts") for one in contexts),
            created=_time(document["created"], "created"),
            parent=None if parent is None else hex_id(parent, "parent"),
            fork=None if fork is None else integer(fork, "fork", 0, count),
            labels=tuple(_label(one) for one in labels),
            finished=_text_or_none(document, "finished", 64),
            sampling=_mapping_or_none(document, "sampling"),
            random=_mapping_or_none(document, "random"),
            salt=_text_or_none(document, "salt", MAX_SALT),
            source=_text_or_none(document, "source", 4096),
            writer=text(document["writer"], "writer", 200),
            nonce=text(document["nonce"], "nonce", 64),
            expires=_time(document["expires"], "expires") if "expires" in document else None,
        )


@dataclass(frozen=True)
class Session:
    """A record whole; ``tokens`` are int32, as many as the head says."""

    head: Head
    tokens: array[int] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != self.head.count:
            raise FormatError(f"the session has {len(self.tokens)} tokens, its head says {self.head.count}")

    def encode(self) -> bytes:
        """The record's bytes.

        Raises:
            UsageError: what no reader would take.
        """
        try:
            line = canonical(self.head.to_json())
            if len(line) >= MAX_HEAD:
                raise FormatError(f"its sampling parameters take more than {MAX_HEAD} bytes")
            Head.from_json(parse(line, "session"))
        except (FormatError, ValueError, TypeError) as error:
            raise UsageError(f"this session cannot be kept: {error}") from None
        return self.head.magic + line + b"\n" + _little(self.tokens)

    @property
    def id(self) -> str:
        """Of these bytes."""
        return record_id(self.encode())


def new_nonce() -> str:
    """For a record that is being made."""
    return secrets.token_hex(8)


def now() -> float:
    """Seconds since 1970, in whole microseconds, which survive being written down."""
    return round(time.time(), 6)


def expiry(created: float, ttl: float | None) -> float | None:
    """When a session expires that was made at ``created`` and may live for ``ttl`` seconds; None: never.

    Raises:
        UsageError: ``ttl`` is no number above 0 and up to ``MAX_TTL``.
    """
    if ttl is None:
        return None
    given: Any = ttl
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= MAX_TTL:
        raise UsageError(f"ttl must be a number of seconds above 0, at most {MAX_TTL}")
    return round(created + ttl, 6)


def ids(tokens: Sequence[int]) -> array[int]:
    """Token ids as a record holds them.

    Raises:
        UsageError: one is below 0, or above 2**31 - 1.
    """
    try:
        found = array("i", tokens)
    except (OverflowError, TypeError):
        raise UsageError("token ids must be whole numbers below 2**31") from None
    assert found.itemsize == 4
    if min(found, default=0) < 0:
        raise UsageError("token ids must not be below 0")
    return found


def checked_labels(given: Sequence[str]) -> tuple[str, ...]:
    """Labels as a record may hold them.

    Raises:
        UsageError: it may not hold these.
    """
    try:
        found = json_array(given if isinstance(given, str) else [*given], "labels", MAX_LABELS)
        return tuple(_label(one) for one in found)
    except FormatError as error:
        raise UsageError(f"this session cannot be kept: {error}") from None


def record_id(data: bytes) -> str:
    """The id of a record: the beginning of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:ID_DIGITS]


def decode_head(data: bytes, what: str, size: int) -> tuple[Head, int]:
    """A record's head, and where its tokens begin.

    Args:
        data: the record's beginning, up to ``MAX_HEAD`` and the magic, or all of it.
        what: its name, for messages.
        size: bytes of the record.

    Raises:
        FormatError: it is none, or of another version; CorruptionError: it is cut, or too long.
    """
    if not data.startswith((MAGIC, EXPIRING)):
        if data.startswith(MAGIC[:13]):
            raise VersionError(f"{what}: it was written by a later version of thaw; this one reads versions 1 and 2")
        raise FormatError(f"{what} is no record of a session")
    end = data.find(b"\n", len(MAGIC), len(MAGIC) + MAX_HEAD)
    if end < 0:
        raise CorruptionError(f"{what} is damaged: it ends, or has no end, in its first lines")
    try:
        head = Head.from_json(parse(data[len(MAGIC) : end], "session"))
    except FormatError as error:
        raise type(error)(f"{what}: {error}") from None
    if not data.startswith(head.magic):
        raise FormatError(f"{what}: records of version 2 say when they expire, and no others do")
    if size != end + 1 + 4 * head.count:
        raise CorruptionError(
            f"{what} is damaged: it has {size} bytes, {head.count} tokens need {end + 1 + 4 * head.count}"
        )
    return head, end + 1


def decode(data: bytes, id_: str, what: str) -> Session:
    """A record, held against its id.

    Raises:
        FormatError, CorruptionError: it is not what its id says.
    """
    if record_id(data) != id_:
        raise CorruptionError(f"{what} is damaged: its bytes are not those that its name says")
    head, at = decode_head(data, what, len(data))
    if canonical(head.to_json()) != data[len(MAGIC) : at - 1]:
        raise FormatError(f"{what} is not written as records are; its id would be another")
    tokens = array("i")
    tokens.frombytes(data[at:])
    if sys.byteorder == "big":
        tokens.byteswap()
    if min(tokens, default=0) < 0:
        raise FormatError(f"{what}: a token id is below 0")
    return Session(head, tokens)


def hex_id(value: Any, where: str) -> str:
    """``value`` as the id of a session or a context.

    Raises:
        FormatError: it is none.
    """
    found = text(value, where, ID_DIGITS)
    if len(found) != ID_DIGITS or not set(found) <= _HEX:
        raise FormatError(f"{where} must be {ID_DIGITS} hexadecimal digits")
    return found


def _little(tokens: array[int]) -> bytes:
    if sys.byteorder == "little":
        return tokens.tobytes()
    turned = array("i", tokens)
    turned.byteswap()
    return turned.tobytes()


def _time(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_TIME:
        raise FormatError(f"{name} must be seconds since 1970")
    return float(value)


def _label(value: Any) -> str:
    found = text(value, "labels", MAX_LABEL)
    if not found:
        raise FormatError("a label is empty")
    return found


def _text_or_none(document: JSONObject, name: str, limit: int) -> str | None:
    return None if document[name] is None else text(document[name], name, limit)


def _mapping_or_none(document: JSONObject, name: str) -> JSONObject | None:
    return None if document[name] is None else mapping(document[name], name)
