"""Failures as answers: an exception in a worker or in the engine core would take the whole engine down."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...errors import ThawError, named

Answer = dict[str, Any]
"""Plain values; of a failure ``{"error": class name, "message": text}``."""


def answering(work: Callable[..., Answer]) -> Callable[..., Answer]:
    """Have a failure of ``work`` be its answer."""

    @functools.wraps(work)
    def answer(*args: Any, **kwargs: Any) -> Answer:
        try:
            return work(*args, **kwargs)
        except ThawError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            return {"error": "ThawError", "message": f"unexpected {type(error).__name__}: {error}"}

    return answer


def raised(answer: Answer) -> Answer:
    """An answer, or the error that it tells of."""
    if "error" in answer:
        raise (named(answer["error"]) or ThawError)(answer["message"])
    return answer


def all_raised(answers: list[Answer]) -> list[Answer]:
    """The answers of all ranks; or a rank's own error, rather than that of one that was told "rank n could not"."""
    for answer in sorted(answers, key=lambda a: "rank " in a.get("message", "")):
        raised(answer)
    return answers
