"""What a request's body may say: JSON to dataclasses that are checked when they are made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ....errors import FormatError, UsageError
from ....format.identity import model_id
from ....kv.table import MAX_SALT
from ....sessions.record import MAX_LABEL, MAX_LABELS, expiry
from .access import SNAPSHOT_ENDING, checked_name

LARGEST_BODY = 32 * 1024 * 1024
"""Bytes; some millions of token ids."""
LARGEST_TOKEN = 2**31 - 1

LONGEST_DEADLINE = 3600.0
"""Seconds."""

Body = TypeVar(
    "Body", "Freezing", "Restoring", "Swapping", "Parking", "Waking", "Checkpointing", "CheckingOut", "Branching"
)


@dataclass(frozen=True)
class Freezing:
    """The body of ``/v1/thaw/kv/freeze``: a file, and one of prompts, token_ids, request and everything.

    Attributes:
        name: the file's, in the server's directory.
        prompts: texts, tokenised as the completions route does.
        token_ids: lists of token ids.
        request: the id of a running request.
        everything: what anybody has asked, as far as its tokens are known.
        cache_salt: of the requests with these prompts or token ids.
        model_id: which weights the engine holds, where it does not know.
        force: replace an existing file.
    """

    name: str
    prompts: list[str] | None = None
    token_ids: list[list[int]] | None = None
    request: str | None = None
    everything: bool = False
    cache_salt: str | None = None
    model_id: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        checked_name(self.name)
        _flag("everything", self.everything)
        _flag("force", self.force)
        _model(self.model_id)
        if self.prompts is not None:
            for text in _items("prompts", self.prompts):
                _text("prompts: each", text)
        if self.token_ids is not None:
            for ids in _items("token_ids", self.token_ids):
                _tokens("token_ids: each", ids)
        if self.request is not None:
            _text("request", self.request, 1024)
        chosen = [name for name in ("prompts", "token_ids", "request") if getattr(self, name) is not None]
        chosen += ["everything"] if self.everything else []
        if len(chosen) != 1:
            raise UsageError(
                f"{' and '.join(chosen) or 'nothing'} was asked for; give one of prompts, token_ids and request, or "
                'say {"everything": true} to write what all users of this server have asked'
            )
        if self.cache_salt is not None:
            _text("cache_salt", self.cache_salt, 1024)
            if chosen[0] not in ("prompts", "token_ids"):
                raise UsageError("cache_salt belongs to prompts or token_ids; the others have their own")


@dataclass(frozen=True)
class Restoring:
    """The body of ``/v1/thaw/kv/restore``.

    Attributes:
        name: the file's, in the server's directory.
        model_id: which weights the engine holds, where it does not know.
        evict: let cached blocks that nobody uses make room.
    """

    name: str
    model_id: str | None = None
    evict: bool = False

    def __post_init__(self) -> None:
        checked_name(self.name)
        _flag("evict", self.evict)
        _model(self.model_id)


@dataclass(frozen=True)
class Swapping:
    """The body of ``/v1/thaw/engine/swap``.

    Attributes:
        name: the snapshot's, in the server's directory of snapshots.
        verify: hold every chunk against its checksum.
        deadline: seconds in which running requests may end.
        served_name: what requests call the model from then on; None: as before.
    """

    name: str
    verify: bool = True
    deadline: float = 30.0
    served_name: str | None = None

    def __post_init__(self) -> None:
        checked_name(self.name, SNAPSHOT_ENDING)
        _flag("verify", self.verify)
        _seconds("deadline", self.deadline)
        if self.served_name is not None:
            _text("served_name", self.served_name, 200)


@dataclass(frozen=True)
class Parking:
    """The body of ``/v1/thaw/engine/park``.

    Attributes:
        kv: a file for what is cached, in the server's directory for KV blocks, restored on waking.
        force: replace that file.
        keep_weights: in host memory.
        driver: whether NVIDIA's driver takes the rest: true, or fail; false, not; null, where it can.
        deadline: seconds in which running requests may end.
    """

    kv: str | None = None
    force: bool = False
    keep_weights: bool = False
    driver: bool | None = None
    deadline: float = 30.0

    def __post_init__(self) -> None:
        if self.kv is not None:
            checked_name(self.kv)
        _flag("force", self.force)
        _flag("keep_weights", self.keep_weights)
        if self.driver is not None:
            _flag("driver", self.driver)
        _seconds("deadline", self.deadline)


@dataclass(frozen=True)
class Waking:
    """The body of ``/v1/thaw/engine/wake``.

    Attributes:
        verify: hold every chunk of the snapshot against its checksum.
    """

    verify: bool = True

    def __post_init__(self) -> None:
        _flag("verify", self.verify)


@dataclass(frozen=True)
class Checkpointing:
    """The body of ``/v1/thaw/sessions/checkpoint``: one of request, token_ids and prompt, and what is to be noted.

    Attributes:
        request: the id of a running request.
        token_ids: one list of them.
        prompt: a text, tokenised as the completions route does.
        labels: names for the session.
        ttl: seconds until it expires; null: it does not.
        parent: the session that it went on from: an id, how one begins, or a label.
        cache_salt: of the request with this prompt or these token ids.
        model_id: which weights the engine holds, where it does not know.
    """

    request: str | None = None
    token_ids: list[int] | None = None
    prompt: str | None = None
    labels: list[str] = field(default_factory=list)
    ttl: float | None = None
    parent: str | None = None
    cache_salt: str | None = None
    model_id: str | None = None

    def __post_init__(self) -> None:
        _labels(self.labels)
        expiry(0, self.ttl)
        _model(self.model_id)
        if self.parent is not None:
            _text("parent", self.parent, MAX_LABEL)
        if self.request is not None:
            _text("request", self.request, 1024)
        if self.token_ids is not None:
            _tokens("token_ids", self.token_ids)
        if self.prompt is not None:
            _text("prompt", self.prompt)
        chosen = [name for name in ("request", "token_ids", "prompt") if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise UsageError(
                f"{' and '.join(chosen) or 'nothing'} was given to keep; give one of request, token_ids and prompt"
            )
        if self.cache_salt is not None:
            _text("cache_salt", self.cache_salt, MAX_SALT)
            if chosen[0] == "request":
                raise UsageError("cache_salt belongs to a prompt or token_ids; a running request has its own")


@dataclass(frozen=True)
class CheckingOut:
    """The body of ``/v1/thaw/sessions/checkout``.

    Attributes:
        session: an id, how one begins, or a label.
        evict: let cached blocks that nobody uses make room.
        model_id: which weights the engine holds, where it does not know.
        token_ids: have the session's tokens told, which are the prompt that goes on.
    """

    session: str
    evict: bool = False
    model_id: str | None = None
    token_ids: bool = False

    def __post_init__(self) -> None:
        _text("session", self.session, MAX_LABEL)
        _flag("evict", self.evict)
        _model(self.model_id)
        _flag("token_ids", self.token_ids)


@dataclass(frozen=True)
class Branching:
    """The body of ``/v1/thaw/sessions/branch``.

    Attributes:
        session: an id, how one begins, or a label.
        at: tokens that the branch has, at least 1; from the end where that is below 0; null: all.
        labels: names for it.
        ttl: seconds until it expires; null: it does not, whatever holds for the other one.
    """

    session: str
    at: int | None = None
    labels: list[str] = field(default_factory=list)
    ttl: float | None = None

    def __post_init__(self) -> None:
        _text("session", self.session, MAX_LABEL)
        if self.at is not None and (type(self.at) is not int or abs(self.at) > LARGEST_TOKEN):
            raise UsageError("at must be a number of tokens, a whole one")
        _labels(self.labels)
        expiry(0, self.ttl)


def parse(raw: bytes, kind: type[Body]) -> Body:
    """A body as one of the classes here.

    Raises:
        UsageError: it is none, with what is wrong.
    """
    try:
        found = json.loads(raw, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError("the body must be a JSON object")
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = [name[:40] for name in found if name not in fields]
    if unknown:
        raise UsageError(f"there is no field {unknown[0]!r}; there are {', '.join(fields)}")
    for name, what in (("name", "which file"), ("session", "which one")):
        if name in fields and name not in found:
            raise UsageError(f"{name} is missing: {what}")
    return kind(**found)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false")


def _seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST_DEADLINE:
        raise UsageError(f"{name} must be a number of seconds from 0 to {LONGEST_DEADLINE:g}")


def _text(name: str, value: object, longest: int | None = None) -> None:
    if not isinstance(value, str) or not value or (longest is not None and len(value) > longest):
        limit = "" if longest is None else f" of at most {longest} characters"
        raise UsageError(f"{name} must be a text{limit}, not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} holds half a surrogate pair, which is no text") from None


def _items(name: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{name} must be a list, not empty")
    return value


def _tokens(name: str, value: object) -> None:
    for token in _items(name, value):
        if type(token) is not int or not 0 <= token <= LARGEST_TOKEN:
            raise UsageError(f"{name} must be a list of token ids, whole numbers from 0 on")


def _labels(value: object) -> None:
    if not isinstance(value, list) or len(value) > MAX_LABELS:
        raise UsageError(f"labels must be a list, of {MAX_LABELS} texts at most")
    for label in value:
        _text("labels: each", label, MAX_LABEL)


def _model(value: object) -> None:
    if value is None:
        return
    try:
        model_id(value, "model_id")
    except FormatError as error:
        raise UsageError(f"{error}; 'thaw id MODEL' says it") from None
