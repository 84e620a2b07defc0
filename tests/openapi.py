"""What the routes of a server are held to by its OpenAPI document; ``schemathesis`` makes the requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

SETTINGS = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})  # tokens are ours to send

latin = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc", "Zs"]))
"""What a header may hold."""
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=5,
)
"""Of JSON, and what Python's takes for it: NaN, and half surrogate pairs."""


def no_objects(*bodies: Any) -> st.SearchStrategy[bytes]:
    """Bytes that are no JSON object: noise, other JSON, deep JSON, one of these bodies cut short."""
    return (
        st.binary(max_size=64).filter(lambda raw: b"{" not in raw)
        | values.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode())
        | st.integers(1, 60_000).map(lambda depth: b"[" * depth)
        | st.builds(
            lambda body, share: json.dumps(body).encode()[: int(len(json.dumps(body)) * share)],
            st.sampled_from(bodies),
            st.floats(0, 0.99),
        )
    )


def operations(schema: Any) -> dict[str, Any]:
    """By method and path."""
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def filled(operation: Any, body: Any = None, query: Any = None, **path: str) -> Any:
    """A request of one operation."""
    more = {} if body is None else {"body": body, "media_type": "application/json"}
    more |= {} if query is None else {"query": query}
    return operation.Case(path_parameters={key: path[key] for key in path if f"{{{key}}}" in operation.path}, **more)


def led_further(case: Any, known: Mapping[str, Sequence[str]]) -> Any:
    """The same request, with most of its texts replaced by known ones, which are given by field."""
    for place in (case.path_parameters, case.query, case.body):
        for name in known.keys() & (place.keys() if isinstance(place, dict) else ()):
            if isinstance(place[name], str) and (length := len(place[name])) % 4 < 3:
                place[name] = known[name][length % len(known[name])]
    return case


def refusal(answer: Any) -> dict[str, Any]:
    """What an answer says that is no success: all have one form, and none is for a fault of the server's own."""
    found = answer.json()
    assert found.keys() == {"error"}, found
    error = found["error"]
    assert isinstance(error["type"], str) and error["type"] and isinstance(error["message"], str) and error["message"]
    assert error.keys() <= {"type", "message", "param", "code"} and error.get("code") in (None, answer.status_code)
    assert error["type"] != "InternalServerError"
    return error


def one_form(context: Any, answer: Any, case: Any) -> None:
    if answer.status_code >= 400:
        refusal(answer)


def named(context: Any, answer: Any, case: Any) -> None:
    """Each status of an operation is in the document by itself; ``default`` is for faults."""
    if case.method == case.operation.method.upper():
        assert str(answer.status_code) in case.operation.definition.raw["responses"], answer.text


CHECKS = [
    named,
    one_form,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
