"""What a server's OpenAPI document says of thaw's routes beside what FastAPI finds itself: bodies, and refusals."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter


class Why(BaseModel):
    """What was wrong.

    Attributes:
        type: the error's name.
        message: what, where, and the cure.
        param, code: nothing, and the status; as vLLM words an error.
    """

    model_config = ConfigDict(extra="forbid")

    type: str
    message: str
    param: None = None
    code: int | None = None


class Refusal(BaseModel):
    """The body of each answer that is no success."""

    model_config = ConfigDict(extra="forbid")

    error: Why


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's ``responses``: with which statuses it refuses."""
    return {status: {"model": Refusal} for status in sorted(set(statuses))}


def taken(kind: type, *, required: bool = True) -> dict[str, Any]:
    """A route's ``openapi_extra``: the body that it takes, a class of fields; others are refused."""
    schema = TypeAdapter(kind).json_schema() | {"additionalProperties": False}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}
