"""JSON read with suspicion: no duplicate keys, no NaN, typed access with a path in every complaint."""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any, NoReturn

from ..errors import FormatError
from .limits import MAX_BYTES

JSONObject = dict[str, Any]

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""C0 and C1 control characters, which terminals obey, and lone surrogates, which have no UTF-8."""


def _pairs(pairs: list[tuple[str, Any]]) -> JSONObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"the key {twice[:80]!r} stands twice in one JSON object")
    return found


def _constant(text: str) -> NoReturn:
    raise FormatError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise FormatError(f"{text[:40]} is beyond the range of a number")
    return value


def parse(data: bytes, what: str) -> JSONObject:
    """Parse one JSON object out of ``data``.

    Args:
        data: UTF-8 text whose length was checked against the limits.
        what: the section's name, for messages.

    Raises:
        FormatError: not UTF-8, not JSON, nested too deeply, a repeated key, NaN, infinity, or not an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite
        )
    except FormatError as error:
        raise FormatError(f"bad {what}: {error}") from None
    except RecursionError:
        raise FormatError(f"bad {what}: it nests too deeply") from None
    except ValueError as error:
        raise FormatError(f"bad {what}: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"bad {what}: expected a JSON object")
    return value


def dump(value: JSONObject) -> bytes:
    """The compact UTF-8 JSON of ``value``, keys in insertion order.

    Raises:
        FormatError: it holds NaN, infinity or a lone surrogate, which the format has no place for.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise FormatError(f"this cannot be stored as JSON: {error}") from None


def canonical(value: Any) -> bytes:
    """The one JSON spelling of ``value`` that hashes are taken over: sorted keys, no spaces, ASCII escapes."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()


def integer(value: Any, where: str, low: int = 0, high: int = MAX_BYTES) -> int:
    """``value`` as an int within [low, high]; booleans and floats are refused."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(f"{where} must be an integer from {low} to {high}, found {short(value)}")
    return value


def printable(value: str) -> bool:
    """Whether ``value`` holds no control character and no lone surrogate."""
    return not _UNPRINTABLE.search(value)


def text(value: Any, where: str, limit: int = 4096) -> str:
    """``value`` as a string of at most ``limit`` characters, none of them a control character or a lone surrogate."""
    if not isinstance(value, str) or len(value) > limit or not printable(value):
        raise FormatError(f"{where} must be a string of at most {limit} printable characters, found {short(value)}")
    return value


def array(value: Any, where: str, limit: int) -> list[Any]:
    """``value`` as a list of at most ``limit`` entries."""
    if not isinstance(value, list) or len(value) > limit:
        raise FormatError(f"{where} must be a list of at most {limit} entries, found {short(value)}")
    return value


def mapping(value: Any, where: str) -> JSONObject:
    """``value`` as an object."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object, found {short(value)}")
    return value


def short(value: Any) -> str:
    """``value`` for a message: a few levels and characters of it, however large and deep it is."""
    shown = reprlib.repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
