"""The routes around a stand-in for the engine: who may call, what a body may say, what errors become."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from thaw_vllm import errors
from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.kv import routes
from thaw_vllm.engines.vllm.kv.access import Access
from thaw_vllm.engines.vllm.swap.routes import Engine as EngineState

TOKEN = "a token of 24 characters"
MODEL = "tensors-blake3:" + "0" * 64


class Engine:
    """A client whose core gives ``answer`` and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: dict[str, Any] = {"blocks": 7}
        self.asleep = False
        self.engine_core = SimpleNamespace(call_utility_async=self._call)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    async def _call(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((method, options))
        return self.answer

    async def is_sleeping(self) -> bool:
        return self.asleep


class Server:
    def __init__(self, access: Access) -> None:
        self.engine, app, plugin = Engine(), FastAPI(), routes.KVRoutes()
        plugin.attach_router(app)
        asyncio.run(plugin.init_state(self.engine, app.state, SimpleNamespace()))
        app.state.thaw_kv = routes._Served(access, self.engine, EngineState(self.engine))
        self.client = TestClient(app, raise_server_exceptions=False)

    def post(self, what: str, body: Any, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {} if token is None else {"X-Thaw-Admin-Token": token}
        answer = self.client.post(f"/v1/thaw/kv/{what}", content=raw, headers=headers)
        return answer.status_code, answer.json()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "there.thawkv").touch()
    return tmp_path


@pytest.fixture
def server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    async def tokens(client: Any, text: str) -> list[int]:
        if text == "too long":
            raise errors.UsageError("maximum context length")
        return [ord(letter) for letter in text]

    monkeypatch.setattr(versions, "completion_tokens", tokens)
    return Server(Access(TOKEN, str(directory)))


@pytest.mark.parametrize(("token", "there", "asked"), [(TOKEN, True, 1), (TOKEN, False, 0), ("", True, 0)])
def test_a_server_that_lets_somebody_restore_makes_ready(token, there, asked, directory, monkeypatch):
    monkeypatch.setenv("THAW_ADMIN_TOKEN", token)
    monkeypatch.setenv("THAW_KV_DIR", str(directory if there else directory / "absent"))
    engine, state = Engine(), SimpleNamespace()

    async def start():
        await routes.KVRoutes().init_state(engine, state, SimpleNamespace())
        await asyncio.gather(*[task for task in asyncio.all_tasks() if task is not asyncio.current_task()])

    asyncio.run(start())
    assert engine.asked == [("thaw_kv_expect", {})] * asked


def test_a_server_starts_where_that_fails(directory, monkeypatch, caplog):
    monkeypatch.setenv("THAW_ADMIN_TOKEN", TOKEN)
    monkeypatch.setenv("THAW_KV_DIR", str(directory))
    engine, state = Engine(), SimpleNamespace()
    engine.answer = {"error": "UnsupportedError", "message": "this engine does not cache prefixes"}

    async def start():
        await routes.KVRoutes().init_state(engine, state, SimpleNamespace())
        await state.thaw_kv_ready

    asyncio.run(start())
    assert "does not cache prefixes" in caplog.text


@pytest.mark.parametrize(
    ("token", "place", "sent", "cure"),
    [
        (None, ".", TOKEN, "THAW_ADMIN_TOKEN set"),
        ("fifteen letters", ".", "fifteen letters", "16 or more"),
        (" " + TOKEN, ".", " " + TOKEN, "printable"),
        (TOKEN, ".", None, "X-Thaw-Admin-Token"),
        (TOKEN, ".", TOKEN[:-1], "X-Thaw-Admin-Token"),
        (TOKEN, ".", "", "X-Thaw-Admin-Token"),
        (TOKEN, None, TOKEN, "THAW_KV_DIR"),
        (TOKEN, "nowhere", TOKEN, "THAW_KV_DIR"),
    ],
)
def test_who_may_not_call(directory: Path, token: Any, place: Any, sent: Any, cure: str):
    server = Server(Access(token, None if place is None else str(directory / place)))
    for what in ("freeze", "restore"):
        status, answer = server.post(what, {"name": "there.thawkv"}, sent)
        assert status == 403 and cure in answer["error"]["message"] and answer["error"]["type"] == "Forbidden"
    headers = {} if sent is None else {"X-Thaw-Admin-Token": sent}
    assert server.client.get("/v1/thaw/kv/info", headers=headers).status_code == 403
    assert server.engine.asked == []


def test_a_relative_directory_is_refused(monkeypatch: pytest.MonkeyPatch, directory: Path):
    monkeypatch.chdir(directory)
    assert "absolute" in str(Access(TOKEN, ".").refusal(TOKEN))


def test_the_environment_says_who_may_call():
    access = Access.from_environment({"THAW_ADMIN_TOKEN": TOKEN, "THAW_KV_DIR": ""})
    assert access == Access(TOKEN, None) and TOKEN not in repr(access)


def test_bytes_that_are_no_ascii_in_the_header(server: Server):
    answer = server.client.get("/v1/thaw/kv/info", headers={b"X-Thaw-Admin-Token": b"\xff" * 24})
    assert answer.status_code == 403


BAD_NAMES = [
    "../x.thawkv", "/etc/x.thawkv", "a/b.thawkv", "a\\b.thawkv", ".x.thawkv", "x\0.thawkv", "x.thawkv\n", "", "..",
    ".thawkv", "x.thaw", "x" * 201 + ".thawkv", "-x.thawkv", 5, None, ["x.thawkv"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("what", ["freeze", "restore"])
def test_a_name_stays_in_its_directory(server: Server, what: str, name: Any):
    body = {"name": name} | ({"prompts": ["a"]} if what == "freeze" else {})
    status, answer = server.post(what, body)
    assert status == 400 and "name" in answer["error"]["message"], answer
    assert server.engine.asked == []


BAD_BODIES: list[tuple[str, Any, str]] = [
    ("freeze", b"", "not JSON"),
    ("freeze", b"\xff\xfe", "not JSON"),
    ("freeze", b"[" * 100_000, "not JSON"),
    ("freeze", b'{"name": "a.thawkv", "name": "b.thawkv"}', "twice"),
    ("freeze", b'{"name": "a.thawkv", "token_ids": [[NaN]]}', "NaN"),
    ("freeze", [], "an object"),
    ("freeze", {"prompts": ["a"]}, "name is missing"),
    ("freeze", {"name": "a.thawkv"}, '"everything": true'),
    ("freeze", {"name": "a.thawkv", "everything": False}, '"everything": true'),
    ("freeze", {"name": "a.thawkv", "everything": 1}, "true or false"),
    ("freeze", {"name": "a.thawkv", "everything": True, "prompts": ["a"]}, "prompts and everything"),
    ("freeze", {"name": "a.thawkv", "request": "r", "token_ids": [[1]]}, "token_ids and request"),
    ("freeze", {"name": "a.thawkv", "prompts": "text"}, "must be a list"),
    ("freeze", {"name": "a.thawkv", "prompts": []}, "not empty"),
    ("freeze", {"name": "a.thawkv", "prompts": [""]}, "not empty"),
    ("freeze", {"name": "a.thawkv", "prompts": ["\ud800"]}, "surrogate"),
    ("freeze", {"name": "a.thawkv", "prompts": ["too long"]}, "maximum context length"),
    ("freeze", {"name": "a.thawkv", "token_ids": [1, 2]}, "token_ids: each"),
    ("freeze", {"name": "a.thawkv", "token_ids": [[]]}, "not empty"),
    ("freeze", {"name": "a.thawkv", "token_ids": [[True]]}, "whole numbers"),
    ("freeze", {"name": "a.thawkv", "token_ids": [[-1]]}, "whole numbers"),
    ("freeze", {"name": "a.thawkv", "token_ids": [[2**31]]}, "whole numbers"),
    ("freeze", {"name": "a.thawkv", "token_ids": [[1.0]]}, "whole numbers"),
    ("freeze", {"name": "a.thawkv", "request": "r", "cache_salt": "s"}, "cache_salt belongs"),
    ("freeze", {"name": "a.thawkv", "prompts": ["a"], "cache_salt": ""}, "cache_salt must"),
    ("freeze", {"name": "a.thawkv", "prompts": ["a"], "model_id": "x"}, "thaw id MODEL"),
    ("freeze", {"name": "a.thawkv", "prompts": ["a"], "force": "yes"}, "true or false"),
    ("freeze", {"name": "a.thawkv", "prompts": ["a"], "path": "/etc/passwd"}, "no field 'path'"),
    ("restore", {"name": "there.thawkv", "evict": 0}, "true or false"),
    ("restore", {"name": "there.thawkv", "force": True}, "no field 'force'"),
]


@pytest.mark.parametrize(("what", "body", "said"), BAD_BODIES)
def test_a_body_that_cannot_be_right(server: Server, what: str, body: Any, said: str):
    status, answer = server.post(what, body)
    message = answer["error"]["message"].replace("JSON object", "an object")
    assert status == 400 and answer["error"]["type"] == "UsageError" and said in message, answer
    assert server.engine.asked == []


def test_a_body_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes, "LARGEST_BODY", 1000)
    status, answer = server.post("freeze", b" " * 1001)
    assert status == 413 and "1000 bytes" in answer["error"]["message"]


def test_what_the_core_is_asked(server: Server, directory: Path):
    place = str(directory.resolve() / "a.thawkv")
    plain = {"path": place, "force": False, "request": None, "model": None, "background": True}
    body = {"name": "a.thawkv", "prompts": ["ab", "c"], "cache_salt": "s", "model_id": MODEL}
    assert server.post("freeze", body) == (200, {"blocks": 7})
    server.post("freeze", {"name": "a.thawkv", "token_ids": [[5, 6]]})
    server.post("freeze", {"name": "a.thawkv", "request": "cmpl-1"})
    server.post("freeze", {"name": "a.thawkv", "everything": True, "force": True})
    server.post("restore", {"name": "there.thawkv", "evict": True})
    server.client.get("/v1/thaw/kv/info", headers={"X-Thaw-Admin-Token": TOKEN})
    salted = [{"tokens": [97, 98], "salt": "s"}, {"tokens": [99], "salt": "s"}]
    assert server.engine.asked == [
        ("thaw_kv_freeze", plain | {"prefixes": salted, "model": MODEL}),
        ("thaw_kv_freeze", plain | {"prefixes": [{"tokens": [5, 6], "salt": None}]}),
        ("thaw_kv_freeze", plain | {"prefixes": None, "request": "cmpl-1"}),
        ("thaw_kv_freeze", plain | {"prefixes": None, "force": True}),
        ("thaw_kv_restore", {"path": str(directory.resolve() / "there.thawkv"), "model": None, "evict": True}),
        ("thaw_kv_info", {}),
    ]


def test_answers_hold_names_not_paths(server: Server):
    server.engine.answer = {"path": "/srv/kv/a.thawkv", "files": ["/srv/kv/a.rank0.thawkv"], "blocks": 1}
    expected = {"name": "a.thawkv", "files": ["a.rank0.thawkv"], "blocks": 1}
    assert server.post("freeze", {"name": "a.thawkv", "everything": True}) == (200, expected)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("UsageError", 400),
        ("CorruptionError", 422),
        ("VersionError", 422),
        ("MismatchError", 409),
        ("UnsupportedError", 501),
        ("BusyError", 409),
        ("ExistsError", 409),
        ("SpaceError", 507),
        ("StorageError", 500),
        ("DeviceError", 503),
        ("SomethingOfALaterVersion", 500),
    ],
)
def test_errors_of_the_core(server: Server, kind: str, status: int):
    server.engine.answer = {"error": kind, "message": "what, where, cure"}
    said = kind if hasattr(errors, kind) else "ThawError"
    expected = {"error": {"type": said, "message": "what, where, cure"}}
    assert server.post("restore", {"name": "there.thawkv"}) == (status, expected)


def test_files_that_are_or_are_not_there(server: Server):
    status, answer = server.post("restore", {"name": "none.thawkv"})
    assert status == 404 and answer["error"]["type"] == "StorageError"
    status, answer = server.post("freeze", {"name": "there.thawkv", "everything": True})
    assert status == 409 and answer["error"]["type"] == "ExistsError" and "--force" in answer["error"]["message"]
    assert server.engine.asked == []


def test_engines_that_cannot(server: Server):
    server.engine.asleep = True
    assert server.post("restore", {"name": "there.thawkv"})[0] == 400
    server.engine.asleep, server.engine.vllm_config.parallel_config.data_parallel_size = False, 2
    status, answer = server.post("restore", {"name": "there.thawkv"})
    assert status == 501 and "data_parallel_size=1" in answer["error"]["message"]
    assert server.engine.asked == []


def test_the_plugin_is_what_vllm_asks_for():
    interface = pytest.importorskip("vllm.plugins.endpoint_plugins.interface", reason="vLLM has no endpoint plugins")
    assert isinstance(routes.KVRoutes(), interface.EndpointPlugin)
