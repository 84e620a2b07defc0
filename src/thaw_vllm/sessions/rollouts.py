"""A record of rollouts: sampled answers to one prompt, the log-probability of every token, and rewards.

It is one JSON document (docs/sessions.md), read and written with neither torch nor an engine.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import CorruptionError, FormatError, StorageError, UsageError, VersionError
from ..format.document import JSONObject, array, canonical, integer, mapping, parse, short
from ..format.identity import model_id
from ..transport.writer import StagedFile
from .context import ID_DIGITS
from .record import MAX_TIME, hex_id

FORMAT, VERSION = "thaw rollouts", 1
MAX_BYTES = 1 << 26
MAX_ROLLOUTS = 4096
MAX_STEPS = 1 << 20
"""Tokens of a rollout, and of the prompt."""
MAX_TOP = 1024
MAX_TEXT = 1 << 22
MAX_DEPTH = 16
"""Of what sampling parameters hold."""
MODES = ("raw_logprobs", "processed_logprobs")
"""vLLM's names: the model's own log-probabilities, or those that temperature, top-k and the like have made of them."""
_TOKEN = (1 << 31) - 1
_MEMBERS = (
    *("format", "version", "id", "created", "versions", "model", "source", "sampling", "logprobs", "task", "prompt"),
    *("session", "pieces", "rollouts"),
)


@dataclass(frozen=True)
class Step:
    """A token that was sampled.

    Attributes:
        token: its id.
        logprob: its log-probability after all tokens before it; natural logarithm, float32 as the engine computed it.
        rank: 1 for the most likely token of the vocabulary.
        top: the most likely tokens there and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    @property
    def gap(self) -> float:
        """By how much its log-probability is below that of the most likely token, in nats; 0 for that one."""
        return max(0.0, self.top[0][1] - self.logprob)


@dataclass(frozen=True)
class Rollout:
    """One of the answers.

    Attributes:
        seed: of its own random numbers.
        session: under which it is kept; None: it is not.
        finished: why it ended, as the engine says it (``stop``, ``length``).
        text: of its tokens, less what it was stopped by.
        reward: what the task gave it.
        steps: its tokens, the one that ends it included.
    """

    seed: int
    session: str | None
    finished: str
    text: str
    reward: float
    steps: tuple[Step, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids."""
        return tuple(step.token for step in self.steps)

    @property
    def sum_logprob(self) -> float:
        """Log-probability of the whole answer, in nats."""
        return math.fsum(step.logprob for step in self.steps)

    @property
    def mean_logprob(self) -> float:
        """The same for each token; of no tokens 0."""
        return self.sum_logprob / max(1, len(self.steps))


@dataclass(frozen=True)
class Rollouts:
    """All answers to a prompt.

    Attributes:
        created: seconds since 1970.
        versions: of the programs that made it, by name.
        model: the model id.
        source: the model's directory or name, as the engine was told.
        sampling: the parameters that all have in common, as a session's record has them.
        logprobs: what the log-probabilities are of, one of ``MODES``.
        task: what was asked, and what the reward is.
        prompt: its text.
        prompt_tokens: ids.
        session: that the prompt is kept under; None: it is not.
        pieces: the text of every token of the steps, by id; not that of the answers where a character is made of
            several tokens.
        rollouts: in the order of their seeds, each of which is there once.
    """

    created: float
    versions: dict[str, str]
    model: str
    source: str
    sampling: JSONObject
    logprobs: str
    task: dict[str, str]
    prompt: str
    prompt_tokens: tuple[int, ...]
    session: str | None
    pieces: dict[int, str]
    rollouts: tuple[Rollout, ...]

    def encode(self) -> bytes:
        """The document, canonical JSON and a line's end.

        Raises:
            UsageError: what no reader would take.
        """
        document = self._to_json()
        try:
            _from_json(document)
            data = canonical(document | {"id": _digest(document)}) + b"\n"
            if len(data) > MAX_BYTES:
                raise FormatError(f"they take more than {MAX_BYTES} bytes")
        except (FormatError, ValueError, TypeError) as error:
            raise UsageError(f"these rollouts cannot be kept: {error}") from None
        return data

    @property
    def id(self) -> str:
        """Of its contents: the beginning of a SHA-256."""
        return _digest(self._to_json())

    def _to_json(self) -> JSONObject:
        return {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            "versions": self.versions,
            "model": self.model,
            "source": self.source,
            "sampling": self.sampling,
            "logprobs": self.logprobs,
            "task": self.task,
            "prompt": {"text": self.prompt, "tokens": list(self.prompt_tokens)},
            "session": self.session,
            "pieces": {str(token): piece for token, piece in self.pieces.items()},
            "rollouts": [_rollout_to_json(one) for one in self.rollouts],
        }


def read(path: str | os.PathLike[str]) -> Rollouts:
    """The record of a file.

    Raises:
        StorageError: it cannot be read; FormatError: it is no such record; VersionError: of a later version;
        CorruptionError: it is damaged.
    """
    what = repr(os.fspath(path))
    try:
        # Without waiting for whoever writes to a pipe; and a device may have no end.
        with open(path, "rb", buffering=0, opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FormatError(f"{what} is no file that a record of rollouts could be in")
            parts = [b""]
            while (room := MAX_BYTES + 1 - sum(map(len, parts))) and (more := file.read(room)):
                parts.append(more)
    except OSError as error:
        raise StorageError(f"{what} cannot be read: {error.strerror or error}") from None
    data = b"".join(parts)
    if len(data) > MAX_BYTES:
        raise FormatError(f"{what} is longer than any record of rollouts")
    return decode(data, what)


def write(path: str | os.PathLike[str], made: Rollouts, *, force: bool = False) -> None:
    """Make a file of a record, whole or not at all, readable for its owner alone.

    Args:
        force: replace what is there.

    Raises:
        UsageError: what no reader would take; StorageError, ExistsError, SpaceError: there is no new file.
    """
    data = made.encode()
    with StagedFile(path, len(data), force=force) as staged:
        staged.write(0, data)
        staged.publish()


def decode(data: bytes, what: str) -> Rollouts:
    """A record of these bytes, held against its own id and sums.

    Args:
        what: its name, for messages.

    Raises:
        As ``read``.
    """
    cure = "make it anew with thaw demo rollouts, or take another copy of it"
    try:
        document = parse(data, what)
    except FormatError as error:
        raise FormatError(f"{error}; it is no record of rollouts, or a damaged one: {cure}") from None
    if document.get("format") != FORMAT:
        raise FormatError(f"{what} is no record of rollouts; thaw demo rollouts --records makes one")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        found = short(document.get("version"))
        raise VersionError(f"{what} is a record of rollouts of version {found}; this thaw knows version {VERSION}")
    try:
        claimed = hex_id(document.pop("id", None), "id")
        if claimed != _digest(document):
            raise CorruptionError("its contents are not those that its id says")
        return _from_json(document)
    except FormatError as error:
        raise type(error)(f"{what} is damaged: {error}; {cure}") from None
    except RecursionError:
        raise FormatError(f"{what} is damaged: it nests too deeply; {cure}") from None


def single(value: float) -> float:
    """The float with the fewest decimal digits that is ``value`` in float32, as engines compute log-probabilities.

    Raises:
        OverflowError: it is beyond float32.
    """
    wanted = struct.pack("<f", value)
    for digits in range(1, 10):  # nine are enough for any
        found = float(f"{value:.{digits}g}")
        if struct.pack("<f", found) == wanted:
            return found
    return value


def _digest(document: JSONObject) -> str:
    return hashlib.sha256(canonical(document)).hexdigest()[:ID_DIGITS]


def _rollout_to_json(one: Rollout) -> JSONObject:
    return {
        "seed": one.seed,
        "session": one.session,
        "finished": one.finished,
        "text": one.text,
        "reward": one.reward,
        "sum_logprob": one.sum_logprob,
        "mean_logprob": one.mean_logprob,
        "steps": [
            {"token": step.token, "logprob": step.logprob, "rank": step.rank, "top": [list(pair) for pair in step.top]}
            for step in one.steps
        ],
    }


def _from_json(document: JSONObject) -> Rollouts:
    _only(document, [name for name in _MEMBERS if name != "id"], "the record")
    if document["logprobs"] not in MODES:
        raise FormatError(f"logprobs must be one of {', '.join(MODES)}, found {short(document['logprobs'])}")
    prompt = mapping(document["prompt"], "prompt")
    _only(prompt, ("text", "tokens"), "prompt")
    pieces = mapping(document["pieces"], "pieces")
    found = Rollouts(
        created=_number(document["created"], "created", 0, MAX_TIME),
        versions=_texts(document["versions"], "versions"),
        model=model_id(document["model"], "model"),
        source=_text(document["source"], "source", 4096),
        sampling=_plain(mapping(document["sampling"], "sampling")),
        logprobs=document["logprobs"],
        task=_texts(document["task"], "task"),
        prompt=_text(prompt["text"], "prompt"),
        prompt_tokens=tuple(_token(one, "prompt") for one in array(prompt["tokens"], "prompt", MAX_STEPS)),
        session=_session(document["session"]),
        pieces={_key(key): _text(piece, "pieces", 4096) for key, piece in pieces.items()},
        rollouts=tuple(_rollout(one) for one in array(document["rollouts"], "rollouts", MAX_ROLLOUTS)),
    )
    if not found.rollouts:
        raise FormatError("it has no rollouts")
    if any(before.seed >= after.seed for before, after in pairwise(found.rollouts)):
        raise FormatError("rollouts must be in the order of their seeds, none twice")
    used = {pair[0] for one in found.rollouts for step in one.steps for pair in ((step.token, 0), *step.top)}
    if used != found.pieces.keys():
        wrong = min(used ^ found.pieces.keys())
        raise FormatError(f"pieces must have the texts of the rollouts' tokens and of no other; {wrong} is wrong")
    return found


def _rollout(value: Any) -> Rollout:
    document = mapping(value, "a rollout")
    sums = ("sum_logprob", "mean_logprob")
    _only(document, ("seed", "session", "finished", "text", "reward", "steps", *sums), "a rollout")
    found = Rollout(
        seed=integer(document["seed"], "seed", -(1 << 63), (1 << 64) - 1),
        session=_session(document["session"]),
        finished=_text(document["finished"], "finished", 64, 1),
        text=_text(document["text"], "text"),
        reward=_number(document["reward"], "reward"),
        steps=tuple(_step(one) for one in array(document["steps"], "steps", MAX_STEPS)),
    )
    for name in sums:
        if not math.isclose(_number(document[name], name), getattr(found, name), rel_tol=1e-9, abs_tol=1e-9):
            raise CorruptionError(f"{name} of the rollout with seed {found.seed} is not that of its tokens")
    return found


def _step(value: Any) -> Step:
    document = mapping(value, "a step")
    _only(document, ("token", "logprob", "rank", "top"), "a step")
    top = []
    for pair in array(document["top"], "top", MAX_TOP):
        if len(array(pair, "top", 2)) != 2:
            raise FormatError("each entry of top must be a token and its log-probability")
        top.append((_token(pair[0], "top"), _logprob(pair[1])))
    if not top or len({token for token, _ in top}) != len(top):
        raise FormatError("top must have the most likely token at least, and none twice")
    if any(before[1] < after[1] for before, after in pairwise(top)):
        raise FormatError("top must have the likeliest token first")
    rank = integer(document["rank"], "rank", 1, _TOKEN)
    found = Step(_token(document["token"], "token"), _logprob(document["logprob"]), rank, tuple(top))
    if dict(top).get(found.token, found.logprob) != found.logprob:
        raise FormatError(f"token {found.token} has another log-probability in top than of its own")
    if rank == 1 and found.token != top[0][0]:
        raise FormatError(f"token {found.token} has rank 1, and is not the likeliest")
    return found


def _only(document: JSONObject, names: Any, what: str) -> None:
    if wrong := document.keys() ^ set(names):
        raise FormatError(f"{short(min(wrong))} of {what} is missing, or nothing known")


def _token(value: Any, where: str) -> int:
    return integer(value, where, 0, _TOKEN)


def _key(value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 10 and str(int(value)) == value):
        raise FormatError(f"pieces must be named by token ids, found {short(value)}")
    return _token(int(value), "pieces")


def _number(value: Any, where: str, low: float = -1e100, high: float = 1e100) -> float:
    """``value`` as a float whose square is one, too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise FormatError(f"{where} must be a number, found {short(value)}")
    return float(value)


def _logprob(value: Any) -> float:
    return _number(value, "a log-probability, at most 0,", high=0)


def _text(value: Any, where: str, limit: int = MAX_TEXT, least: int = 0) -> str:
    """A text that may hold line ends and whatever else a model says; whoever prints it escapes it."""
    if not isinstance(value, str) or not least <= len(value) <= limit or _lone(value):
        raise FormatError(f"{where} must be a text of {least} to {limit} characters, found {short(value)}")
    return value


def _lone(value: str) -> bool:
    """Whether it holds a lone surrogate, which has no UTF-8."""
    return any("\ud800" <= at <= "\udfff" for at in value)


def _plain(value: Any) -> Any:
    """``value``, whose texts have UTF-8, and which is not nested deeply; level by level, however deep it is."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str) and _lone(one):
                raise FormatError("sampling holds a text that has no UTF-8")
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, (list, tuple)):
                below += one
        level = below
    if any(isinstance(one, (dict, list, tuple)) for one in level):
        raise FormatError(f"sampling nests more than {MAX_DEPTH} levels")
    return value


def _texts(value: Any, where: str) -> dict[str, str]:
    found = mapping(value, where)
    if len(found) > 64:
        raise FormatError(f"{where} has more than 64 entries")
    return {_text(name, where, 64): _text(one, where, 4096) for name, one in found.items()}


def _session(value: Any) -> str | None:
    return None if value is None else hex_id(value, "session")
