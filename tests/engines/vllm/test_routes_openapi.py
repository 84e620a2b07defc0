"""A single server's routes of thaw's do what its OpenAPI document says; what they call is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.engines.vllm.session_client import keep, restore
from tests.openapi import CHECKS, SETTINGS, filled, latin, led_further, no_objects, operations, refusal, schemathesis
from tests.sessions.made import save, session

from thaw_vllm import errors
from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.kv import routes
from thaw_vllm.engines.vllm.kv.access import Access
from thaw_vllm.engines.vllm.swap import routes as engine_routes
from thaw_vllm.engines.vllm.swap.api import SwapReport
from thaw_vllm.engines.vllm.swap.parked import Parked, WakeReport
from thaw_vllm.sessions.store import Store

pytestmark = pytest.mark.vllm
TOKEN = "a token of 24 characters"
ADMIN = {"X-Thaw-Admin-Token": TOKEN}
BODIES = {
    "/v1/thaw/kv/freeze": {"name": "b.thawkv", "everything": True},
    "/v1/thaw/kv/restore": {"name": "there.thawkv"},
    "/v1/thaw/sessions/checkpoint": {"token_ids": [1, 2, 3, 4, 5], "labels": ["trunk"]},
    "/v1/thaw/sessions/checkout": {"session": "first", "token_ids": True},
    "/v1/thaw/sessions/branch": {"session": "first", "at": 3},
    "/v1/thaw/engine/swap": {"name": "b.thaw"},
    "/v1/thaw/engine/park": {"kv": "c.thawkv"},
    "/v1/thaw/engine/wake": {},
}
STORED = ("GET /v1/thaw/sessions", "POST /v1/thaw/sessions/branch")
"""What needs no engine."""
NAMES = ["there.thawkv", "none.thawkv", "b.thaw", "none.thaw", "../b.thaw", ""]
SESSIONS = ["first", "trunk", "nobody", ""]
ONE = ("prompts", "prompt", "token_ids", "request", "everything")
KINDS = [*routes.STATUS, errors.StorageError, errors.BrokenEngineError]
"""What may go wrong beneath the routes."""


def wrong(said: Any) -> type[errors.ThawError] | None:
    """The same each time for the same request; nothing half of the time."""
    length = len(json.dumps(said))
    return KINDS[length // 2 % len(KINDS)] if length % 2 else None


class Client:
    """vLLM's client of an engine."""

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
        self.sound = False

    async def _call(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        kind = None if self.sound else wrong({name: options[name] for name in options if name != "store"})
        if kind is not None:
            return {"error": kind.__name__, "message": "what, where, cure"}
        of_sessions = {"thaw_session_keep": keep, "thaw_session_restore": restore}
        return of_sessions[method](options, "model") if method in of_sessions else {"blocks": 7}

    async def is_sleeping(self) -> bool:
        return False

    async def collective_rpc(self, method: str) -> list[Any]:
        return [{"path": "/cache/a.thaw"}]


app = FastAPI()
routes.KVRoutes().attach_router(app)
schema = schemathesis.openapi.from_dict(app.openapi(), config=SETTINGS)
OPERATIONS = operations(schema)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The app is ready meanwhile."""
    folder, made = tmp_path_factory.mktemp("files"), Client()
    for name in ("there.thawkv", "b.thaw"):
        (folder / name).touch()

    def doing(report: Any) -> Any:
        async def did(client: Any, *given: Any, **options: Any) -> Any:
            said = [str(one) for one in given] + [str(Path(str(one)).name) for one in options.values()]
            if not made.sound and (kind := wrong(said)) is not None:
                raise kind("what, where, cure")
            return report

        return did

    async def tokens(client: Any, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    seconds = {"total": 0.5}
    store = Store(tmp_path_factory.mktemp("sessions"), create=True)
    save(store, session(range(18), labels=("first",)))
    access = Access(TOKEN, str(folder), str(folder), str(store.directory))
    app.state.thaw_kv = routes._Served(access, made, engine_routes.Engine(made))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "completion_tokens", tokens)
        patch.setattr(engine_routes, "swap_weights_async", doing(SwapReport(8, "model", 1, "route", seconds)))
        parked = Parked([3], True, "", 5, "/secret/a.thaw", ["c0"], None, 2, seconds)
        patch.setattr(engine_routes, "park_async", doing(parked))
        patch.setattr(engine_routes, "wake_async", doing(WakeReport(8, 4, 0, seconds)))
        yield made


@pytest.mark.soak
@schema.parametrize()
def test_anything(case, client):
    led_further(case, {"name": NAMES, "kv": NAMES, "session": SESSIONS, "parent": SESSIONS})
    if isinstance(case.body, dict) and not case.operation.path.endswith("/checkout"):
        for name in [name for name in ONE if case.body.get(name)][1:]:
            del case.body[name]  # one is what a freeze takes, or a checkpoint
    client.sound = False
    if case.method == case.operation.method.upper():  # the rest is vLLM's own to answer
        case.validate_response(case.call(app=app, headers=ADMIN), checks=CHECKS)


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("label", OPERATIONS)
def test_successes_and_an_engine_that_is_parked(label, parked, client):
    client.sound = True
    for first in ("wake", "park")[: 1 + parked]:
        filled(OPERATIONS[f"POST /v1/thaw/engine/{first}"], {}).call(app=app, headers=ADMIN)
    case = filled(OPERATIONS[label], BODIES.get(label.partition(" ")[2]))
    answer = case.call(app=app, headers=ADMIN)
    case.validate_response(answer, checks=CHECKS)
    right = label.endswith("/state") or label in STORED or label.endswith("/wake") == parked
    assert answer.status_code == (200 if right else 400), answer.text


@pytest.mark.parametrize("label", ["POST /v1/thaw/engine/park", "POST /v1/thaw/engine/wake"])
def test_bodies_that_need_not_be_there(label, client):
    client.sound = True
    other = filled(OPERATIONS["POST /v1/thaw/engine/" + ("wake" if label.endswith("park") else "park")], {})
    other.call(app=app, headers=ADMIN)
    assert filled(OPERATIONS[label]).call(app=app, headers=ADMIN).status_code == 200
    assert OPERATIONS[label].definition.raw["requestBody"]["required"] is False


@pytest.mark.soak
@given(st.sampled_from(list(OPERATIONS)), st.none() | latin | st.sampled_from(["", TOKEN[:-1], TOKEN.upper()]))
def test_no_other_token(client, label, token):
    assume(token is None or token.strip() != TOKEN)
    case = filled(OPERATIONS[label], BODIES.get(label.partition(" ")[2]))
    answer = case.call(app=app, headers={} if token is None else {"X-Thaw-Admin-Token": token})
    assert answer.status_code == 403 and refusal(answer)["type"] == "Forbidden"


@pytest.mark.soak
@given(st.sampled_from(list(BODIES)), no_objects(*BODIES.values()))
def test_bodies_that_are_no_objects(client, path, body):
    assume(body or not path.endswith(("/park", "/wake")))
    answer = filled(OPERATIONS[f"POST {path}"]).call(app=app, headers=ADMIN, data=body)
    assert answer.status_code == 400 and refusal(answer)["type"] == "UsageError"


def test_what_it_says_of_refusals():
    for operation in OPERATIONS.values():
        told = {status: answer for status, answer in operation.definition.raw["responses"].items() if status != "200"}
        assert "403" in told
        for answer in told.values():
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Refusal"}
