"""The routes of a server's engine as a whole: who may call, what they may say, and one change at a time.

What they call is replaced here; real engines are in test_swap.py and tests/gpu.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

pytest.importorskip("vllm", reason="vLLM is not installed")

from thaw_vllm.engines.vllm.kv import routes
from thaw_vllm.engines.vllm.kv.access import Access
from thaw_vllm.engines.vllm.swap import routes as engine_routes
from thaw_vllm.engines.vllm.swap.api import SwapReport
from thaw_vllm.engines.vllm.swap.parked import Parked, WakeReport
from thaw_vllm.errors import BrokenEngineError, MismatchError, UnsupportedError

pytestmark = pytest.mark.vllm
TOKEN = "a token of 24 characters"
SECONDS = {"total": 0.5}


class Server:
    """The app of a plugin, and what its routes called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, token: str | None = TOKEN, fronts: int = 1):
        self.called: list[tuple[str, Any]] = []
        self.error: Exception | None = None
        self.wait: asyncio.Event | None = None
        for name, kind in {"THAW_ADMIN_TOKEN": token, "THAW_KV_DIR": folder, "THAW_SNAPSHOT_DIR": folder}.items():
            if kind is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(kind))
        monkeypatch.setattr(engine_routes, "swap_weights_async", self._swap)
        monkeypatch.setattr(engine_routes, "park_async", self._park)
        monkeypatch.setattr(engine_routes, "wake_async", self._wake)
        monkeypatch.setattr(routes, "_make_ready", self._nothing)
        self.app, plugin = FastAPI(), routes.KVRoutes()
        plugin.attach_router(self.app)
        args = SimpleNamespace(api_server_count=fronts)
        asyncio.run(plugin.init_state(SimpleNamespace(), self.app.state, args))

    async def _nothing(self, client: Any) -> None:
        pass

    async def _did(self, what: str, options: Any) -> None:
        self.called.append((what, options))
        if self.wait is not None:
            await self.wait.wait()
        if self.error is not None:
            raise self.error

    async def _swap(self, client: Any, path: str, **options: Any) -> SwapReport:
        await self._did("swap", (path, options))
        return SwapReport(8, "model", 1, "route", SECONDS)

    async def _park(self, client: Any, **options: Any) -> Parked:
        await self._did("park", options)
        return Parked([3], True, "", 5, "/secret/a.thaw", ["c0"], options["kv"], 2, SECONDS)

    async def _wake(self, client: Any, parked: Parked, *, verify: bool) -> WakeReport:
        await self._did("wake", (parked.contents, verify))
        return WakeReport(8, 4, 0, SECONDS)

    async def asked(self, what: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {} if token is None else {"X-Thaw-Admin-Token": token}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            path = f"/v1/thaw/{what}"
            if body is None:
                answer = await client.get(path, headers=headers)
            else:
                answer = await client.post(path, content=json.dumps(body), headers=headers)
        return answer.status_code, answer.json()

    def ask(self, what: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        return asyncio.run(self.asked(what, body, token))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.thaw").touch()
    (tmp_path / "there.thawkv").touch()
    return tmp_path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(folder, monkeypatch)


ALL = [("engine/state", None), ("engine/swap", {"name": "b.thaw"}), ("engine/park", {}), ("engine/wake", {})]


@pytest.mark.parametrize(("what", "body"), ALL)
@pytest.mark.parametrize("token", [None, "", "a token of 24 charactersX", "é"])
def test_who_may_not_call(what: str, body: Any, token: str | None, server: Server):
    status, answer = server.ask(what, body, None if token == "é" else token)
    assert (status, answer["error"]["type"]) == (403, "Forbidden") and server.called == []


def test_a_server_without_a_token_lets_nobody_in(folder: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(folder, monkeypatch, token=None)
    assert [server.ask(what, body)[0] for what, body in ALL] == [403] * 4 and server.called == []


def test_a_swap(server: Server, folder: Path):
    status, answer = server.ask("engine/swap", {"name": "b.thaw", "verify": False, "deadline": 2})
    assert (status, answer["aborted"], answer["model"]) == (200, 1, "model")
    assert server.called == [("swap", (os.path.realpath(folder / "b.thaw"), {"verify": False, "deadline": 2}))]


def test_a_link_may_go_when_the_swap_is_over(server: Server, folder: Path):
    (folder / "link.thaw").symlink_to("b.thaw")
    assert server.ask("engine/swap", {"name": "link.thaw"})[0] == 200
    assert server.called[0][1][0] == os.path.realpath(folder / "b.thaw"), "waking a parked engine reads it again"


@pytest.mark.parametrize(
    ("what", "body", "said"),
    [
        ("engine/swap", {}, "name is missing"),
        ("engine/swap", {"name": "../b.thaw"}, "cannot be used"),
        ("engine/swap", {"name": "/etc/b.thaw"}, "cannot be used"),
        ("engine/swap", {"name": ".thaw"}, "cannot be used"),
        ("engine/swap", {"name": "b.thawkv"}, "ends in .thaw"),
        ("engine/swap", {"name": "b.thaw", "deadline": -1}, "deadline must be"),
        ("engine/swap", {"name": "b.thaw", "deadline": True}, "deadline must be"),
        ("engine/swap", {"name": "b.thaw", "verify": 1}, "verify must be"),
        ("engine/swap", {"name": "b.thaw", "path": "/x"}, "there is no field 'path'"),
        ("engine/park", {"kv": "x.thaw"}, "ends in .thawkv"),
        ("engine/park", {"driver": "yes"}, "driver must be"),
        ("engine/park", {"deadline": 1e9}, "deadline must be"),
        ("engine/wake", {"verify": "no"}, "verify must be"),
        ("engine/wake", [], "must be a JSON object"),
    ],
)
def test_what_may_not_be_said(what: str, body: Any, said: str, server: Server):
    status, answer = server.ask(what, body)
    assert (status, answer["error"]["type"]) == (400, "UsageError") and said in answer["error"]["message"]
    assert server.called == []


def test_a_snapshot_that_is_not_there_and_a_file_that_is(server: Server):
    status, answer = server.ask("engine/swap", {"name": "c.thaw"})
    assert (status, answer["error"]["type"]) == (404, "StorageError")
    status, answer = server.ask("engine/park", {"kv": "there.thawkv"})
    assert (status, answer["error"]["type"]) == (409, "ExistsError") and server.called == []
    assert server.ask("engine/park", {"kv": "there.thawkv", "force": True})[0] == 200


def test_a_server_without_directories(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Parks without a file, and swaps nothing."""
    server = Server(folder, monkeypatch)
    server.app.state.thaw_kv = routes._Served(Access(TOKEN), None, engine_routes.Engine(None))
    assert "THAW_SNAPSHOT_DIR" in server.ask("engine/swap", {"name": "b.thaw"})[1]["error"]["message"]
    assert "THAW_KV_DIR" in server.ask("engine/park", {"kv": "x.thawkv"})[1]["error"]["message"]
    assert server.ask("engine/park", {})[0] == 200


def test_parked_and_awake(server: Server, folder: Path):
    assert server.ask("engine/state") == (200, {"parked": False, "snapshot": None})
    assert server.ask("engine/wake", {})[1]["error"]["message"] == "the engine is not parked"
    status, answer = server.ask("engine/park", {"kv": "x.thawkv", "deadline": 0})
    assert status == 200 and answer["kv"] == "x.thawkv" and answer["aborted"] == 2
    assert "secret" not in json.dumps(answer) and "pids" not in answer
    assert server.ask("engine/state")[1]["parked"] is True
    calls = [("engine/swap", {"name": "b.thaw"}), ("engine/park", {}), ("kv/info", None)]
    calls += [("kv/restore", {"name": "there.thawkv"}), ("kv/freeze", {"name": "y.thawkv", "everything": True})]
    for what, body in calls:
        status, answer = server.ask(what, body)
        assert (status, "is parked" in answer["error"]["message"]) == (400, True), what
    assert server.ask("engine/wake", {"verify": False})[1]["blocks"] == 4
    assert server.ask("engine/state") == (200, {"parked": False, "snapshot": None})
    assert [name for name, _ in server.called] == ["park", "wake"] and server.called[1][1] == (["c0"], False)


def test_whose_weights_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch):
    server, asked = Server(folder, monkeypatch), []

    async def outcomes(method: str) -> list[Any]:
        asked.append(method)
        return [{"how": "thawed", "path": "/cache/a.thaw", "why": ""}, None]

    server.app.state.thaw_kv.engine.client.collective_rpc = outcomes
    for _ in range(2):
        assert server.ask("engine/state")[1]["snapshot"] == "/cache/a.thaw"
    assert asked == ["thaw_outcome"]
    server.ask("engine/park", {})
    assert server.ask("engine/state")[1]["snapshot"] == "/cache/a.thaw"
    server.ask("engine/wake", {})
    assert server.ask("engine/swap", {"name": "b.thaw"})[0] == 200
    assert server.ask("engine/state")[1]["snapshot"] == os.path.realpath(folder / "b.thaw")


def test_a_parked_engine_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(folder, monkeypatch)
    server.ask("engine/park", {})
    server.app.state.thaw_kv.engine.client.collective_rpc = lambda _: pytest.fail("it would not answer")
    assert server.ask("engine/state")[1]["snapshot"] is None


def test_an_engine_that_could_not_be_woken_stays_parked(server: Server):
    server.ask("engine/park", {})
    server.error = MismatchError("another snapshot")
    assert server.ask("engine/wake", {})[0] == 409
    server.error = None
    assert server.ask("engine/state")[1]["parked"] is True and server.ask("engine/wake", {})[0] == 200


@pytest.mark.parametrize(
    ("error", "status"), [(MismatchError("m"), 409), (UnsupportedError("u"), 501), (BrokenEngineError("b"), 500)]
)
def test_errors_of_a_swap(error: Exception, status: int, server: Server):
    server.error = error
    found, answer = server.ask("engine/swap", {"name": "b.thaw"})
    assert (found, answer["error"]["type"]) == (status, type(error).__name__)


def test_one_change_at_a_time(server: Server):
    async def both() -> tuple[Any, Any, Any]:
        server.wait = asyncio.Event()
        first = asyncio.create_task(server.asked("engine/swap", {"name": "b.thaw"}))
        while not server.called:
            await asyncio.sleep(0.01)
        second = await server.asked("engine/park", {})
        server.wait.set()
        return await first, second, await server.asked("engine/park", {})

    first, second, third = asyncio.run(both())
    assert first[0] == third[0] == 200
    assert second[0] == 400 and "ask again" in second[1]["error"]["message"]


def test_several_front_ends_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(folder, monkeypatch, fronts=2)
    status, answer = server.ask("engine/park", {})
    assert (status, answer["error"]["type"]) == (501, "UnsupportedError") and server.called == []
