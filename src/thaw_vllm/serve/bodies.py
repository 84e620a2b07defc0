"""Bodies of requests to the pool's own routes: read after it is known who asks, and never more than a little."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from .router import BODY_LIMIT, Refused

LARGEST = 64 * 1024
"""Bytes."""
REFUSED = (400, 408, 413, 415)
"""Statuses of a body that is."""

T = TypeVar("T", bound=BaseModel)


async def parsed(request: Request, kind: type[T]) -> T:
    """
    Raises:
        Refused: it is too large, does not come, says not that it is JSON, or holds something else.
    """
    said = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if said != "application/json":  # a page of another site may not send that without being asked first
        raise Refused(415, "UnsupportedMediaType", "send JSON, and say so: Content-Type: application/json")
    try:
        raw = await asyncio.wait_for(_read(request), BODY_LIMIT)
        return kind.model_validate_json(raw)
    except asyncio.TimeoutError:
        raise Refused(408, "RequestTimeout", f"the body was not there within {BODY_LIMIT:.0f} s") from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        told = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in found)
        raise Refused(400, "UsageError", told) from None


async def _read(request: Request) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST:
            raise Refused(413, "BadRequestError", f"the body is larger than {LARGEST} bytes")
    return bytes(found)
