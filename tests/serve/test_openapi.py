"""A pool's routes do what their OpenAPI document says, whatever they are sent; the servers behind are stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tests.openapi import (
    CHECKS,
    SETTINGS,
    checks,
    filled,
    latin,
    led_further,
    no_objects,
    operations,
    refusal,
    schemathesis,
    values,
)
from tests.serve.in_thread import in_thread
from tests.serve.served import TOKEN, FakeServer, Served
from tests.sessions.made import save
from tests.sessions.made import session as session_record

from thaw_vllm.engines.vllm.kv import routes
from thaw_vllm.engines.vllm.kv.bodies import CheckingOut, Checkpointing, Freezing, Restoring, parse
from thaw_vllm.errors import ThawError, UsageError
from thaw_vllm.serve.app import application
from thaw_vllm.serve.config import Model
from thaw_vllm.serve.verification import Verification
from thaw_vllm.sessions.store import Store

KEY = "an API key"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
ADMIN = {"X-Thaw-Admin-Token": TOKEN} | WITH_KEY
JSON = {"Content-Type": "application/json"}
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}

EVENTS = "/v1/thaw/events"
BODIES = {
    "/v1/thaw/models": {"name": "registered", "path": "m", "like": "a"},
    "/v1/thaw/models/{name}/kv/freeze": {"name": "b.thawkv", "everything": True},
    "/v1/thaw/models/{name}/kv/restore": {"name": "a.thawkv"},
    "/v1/thaw/models/{name}/sessions/checkpoint": {"token_ids": [1]},
    "/v1/thaw/models/{name}/sessions/checkout": {"session": "trunk"},
    "/v1/thaw/verify": {"path": "broken.thaw"},
}
QUERIES = {"/v1/thaw/sessions/diff": {"a": "trunk", "b": "plan", "tokens": 8}}
KNOWN = {
    "name": ["a", "org/b", "broken", "c", "a.thawkv", ""],
    "path": ["m", ".", "broken.thaw", "out", "m/none", "m" * 300, ""],
    "snapshot": ["broken.thaw", "out"],
    "like": ["a", "org/b", "d"],
    "model": ["a", "org/b", "d"],
    "kv": ["a.thawkv", "none.thawkv"],
    "a": ["trunk", "plan", "broken", "none"],
    "b": ["trunk", "plan", "broken", "none"],
}
"""Texts that lead further than to the first refusal, by the field that they are for."""


TAKEN: dict[str, Any] = {
    "kv/freeze": Freezing,
    "kv/restore": Restoring,
    "sessions/checkpoint": Checkpointing,
    "sessions/checkout": CheckingOut,
}
"""By the route of a model's server."""


class Server(FakeServer):
    """Has thaw's routes, too, and refuses with every status that those know; one of its models does not start."""

    async def start(self) -> None:
        self.faults = {"start": ThawError("no memory")} if self.model.name == "broken" else {}
        await super().start()

    async def ask(self, what: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            parse(body, TAKEN[what])
        except UsageError as error:
            statuses = [*routes.STATUS.values()]  # 413 is no answer to a body that is wrong
            status = statuses[len(body) % len(statuses)]
            return status, {"error": {"type": "UsageError", "message": str(error)}} if len(body) % 3 else {}
        return 200, {"blocks": 7}


class Pool(Served):
    def make(self, model: Model) -> FakeServer:
        path = self.folder / f"{len(self.engines)}.sock"
        self.engines.append(Server(model, self.log, path, **self.given))
        return self.engines[-1]


MODELS = [Model("a", "/m", share=0.5), Model("org/b", "/m", share=0.5), Model("broken", "/m", park=False)]
DOCUMENT = application(Pool(Path(), *MODELS).pool, TOKEN, [KEY]).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT, config=SETTINGS)
answering = schema.exclude(path=EVENTS)  # that one streams until its client leaves
OPERATIONS = operations(schema)
GUARDED = {label: operation for label, operation in OPERATIONS.items() if operation.path.startswith("/v1/thaw/")}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where one listens that has something of everything."""
    root, kv = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("kv")
    (root / "m").mkdir()
    (root / "out").symlink_to("/etc")
    (root / "broken.thaw").write_bytes(b"none")
    (root / os.fsdecode(b"\xff.thaw")).touch()
    (kv / "a.thawkv").touch()
    (kv / os.fsdecode(b"\xff.thawkv")).touch()
    store = Store(tmp_path_factory.mktemp("sessions"), create=True)
    for label in ("trunk", "plan", "broken"):
        id_, _ = save(store, session_record([1, 2, 3, 4, len(label)], labels=(label,)))
    store.record(id_).write_bytes(store.record(id_).read_bytes()[:-4] + b"\0\0\0\0")

    async def found(self: Verification, path: Path) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"bytes": 0}

    served = Pool(
        *(tmp_path_factory.mktemp("s"), *MODELS),
        given={"parkable": True},
        api_keys=[KEY],
        directories=[str(root)],
        kv_directory=str(kv),
        sessions_directory=str(store.directory),
    )
    with pytest.MonkeyPatch.context() as patch, in_thread(served) as running:
        patch.setattr(Verification, "_followed", found)  # which starts a process each time
        yield served.url
        running.soon(served.pool.close)  # who follows the events is let go


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False
        yield made


def valid(operation: Any) -> Any:
    """A request that succeeds where the model is there."""
    body = BODIES.get(operation.path) if operation.method == "post" else None
    return filled(operation, body, QUERIES.get(operation.path), name="a")


def sent(case: Any, pool: str, session: requests.Session, headers: dict[str, str], **more: Any) -> Any:
    return case.call(base_url=pool, session=session, headers=headers, allow_redirects=False, **more)


@pytest.mark.soak
@answering.parametrize()
def test_anything(case, pool, session):
    answer = sent(led_further(case, KNOWN), pool, session, ADMIN)
    case.validate_response(answer, checks=[*CHECKS, checks.unsupported_method])


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label != f"GET {EVENTS}"])
def test_successes(label, pool, session):
    operation = OPERATIONS[label]
    for first in ("models/a/load", "verify/cancel"):
        assert session.post(f"{pool}/v1/thaw/{first}", headers=ADMIN).status_code == 200
    case = valid(operation)
    answer = sent(case, pool, session, ADMIN)
    case.validate_response(answer, checks=CHECKS)
    assert answer.status_code < 300, answer.text


numbers = st.integers().map(str) | st.integers(0, 20).map(lambda digits: "9" * digits)


@pytest.mark.soak
@example(None, "9" * 5000)
@example("9" * 5000, None)
@given(st.none() | numbers | st.text(), st.none() | numbers | latin)
def test_where_events_begin(pool, session, after, last):
    """Nothing but the head of an answer is read: it streams until its client leaves."""
    headers = ADMIN | ({} if last is None else {"Last-Event-ID": last})
    with session.get(f"{pool}{EVENTS}", params={"after": after}, headers=headers, stream=True) as answer:
        if answer.status_code != 200:
            assert answer.status_code == 400 and "after" in refusal(answer)["message"]
        else:
            assert answer.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    content = OPERATIONS[f"GET {EVENTS}"].definition.raw["responses"]["200"]["content"]
    assert content.keys() == {"text/event-stream"}


@pytest.mark.parametrize("label", GUARDED)
def test_near_misses_of_the_token(label, pool, session):
    operation, port = GUARDED[label], pool.rpartition(":")[2]
    case = valid(operation)
    for headers in (
        {},
        {"X-Thaw-Admin-Token": ""},
        {"X-Thaw-Admin-Token": TOKEN[:-1]},
        {"X-Thaw-Admin-Token": f"{TOKEN}x"},
        {"X-Thaw-Admin-Token": TOKEN.upper()},
        {"X-Thaw-Admin-Token": KEY},
        {"X-Thaw-Token": TOKEN},
        {"Authorization": f"Bearer {TOKEN}"},
        {"Cookie": f"thaw_session_{port}={TOKEN}"},
        ADMIN | {"Host": "thaw.example"},
        ADMIN | {"Origin": "http://thaw.example"},
    ):
        answer = sent(case, pool, session, headers, params={"token": TOKEN})
        assert answer.status_code == 403 and refusal(answer)["type"] == "Forbidden", headers


@pytest.mark.soak
@given(st.data(), latin)
def test_no_other_token(pool, session, data, token):
    assume(token.strip() != TOKEN)
    case = data.draw(GUARDED[data.draw(st.sampled_from(list(GUARDED)))].as_strategy())
    answer = sent(led_further(case, KNOWN), pool, session, WITH_KEY | {"X-Thaw-Admin-Token": token})
    told = (answer.status_code, refusal(answer)["type"])
    assert told in ((403, "Forbidden"), (404, "NotFoundError"))  # a name that is empty, or two lines, leads nowhere


def test_api_keys(pool, session):
    for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"X-Thaw-Admin-Token": TOKEN}):
        answer = session.get(f"{pool}/v1/models", headers=headers)
        assert answer.status_code == 401 and refusal(answer)
    assert "401" in DOCUMENT["paths"]["/v1/models"]["get"]["responses"]


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_other_methods(path, pool, session):
    known = {method.upper() for method in DOCUMENT["paths"][path]}
    for method in sorted(METHODS - known):
        answer = session.request(method, pool + path.replace("{name}", "org/b"), headers=ADMIN, json={"model": "a"})
        assert answer.status_code == 405 and refusal(answer)["type"] == "MethodNotAllowedError", method
        assert set(answer.headers["Allow"].split(", ")) == known
    assert session.head(pool + path.replace("{name}", "a"), headers=ADMIN).status_code == 405


@pytest.mark.soak
@given(st.sampled_from(list(BODIES)), no_objects(*BODIES.values()))
def test_bodies_that_are_no_objects(pool, session, path, body):
    answer = session.post(pool + path.replace("{name}", "a"), data=body, headers=ADMIN | JSON)
    if "/kv/" not in path and "/sessions/" not in path:  # the status of those is the stand-in's
        assert answer.status_code == 400
    assert answer.status_code >= 400 and refusal(answer)


@pytest.mark.soak
@example(json.dumps({"model": "\ud800"}).encode())
@given(
    no_objects({"model": "a"}) | st.fixed_dictionaries({"model": values}).map(lambda body: json.dumps(body).encode())
)
def test_what_is_passed_on(pool, session, body):
    """What is in no document of ours: which model it is for is read all the same."""
    answer = session.post(f"{pool}/v1/completions", data=body, headers=WITH_KEY | JSON)
    assert answer.status_code in (400, 404) and refusal(answer)["code"] == answer.status_code


def test_what_it_says_of_refusals_and_of_who_may_ask():
    for label, operation in OPERATIONS.items():
        described = operation.definition.raw
        told = {status: answer for status, answer in described["responses"].items() if status[0] != "2"}
        for answer in told.values():
            assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Refusal"}
        assert ("403" in told) == (label in GUARDED)
        asked = [name for one in described.get("security", []) for name in one]
        assert asked == (["admin token"] if label in GUARDED else ["API key"] if "401" in told else [])
    schemes = DOCUMENT["components"]["securitySchemes"]
    assert schemes["admin token"] == {"type": "apiKey", "in": "header", "name": "X-Thaw-Admin-Token"}
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]
