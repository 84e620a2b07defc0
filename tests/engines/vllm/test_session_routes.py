"""The routes of sessions around a stand-in for the engine: who may call, what is told, and what is not."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.engines.vllm.session_client import RUNNING, Client
from tests.sessions.locks import free, held
from tests.sessions.made import MODEL, context, resumes, save, session

from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.kv import routes
from thaw_vllm.engines.vllm.kv.access import Access
from thaw_vllm.engines.vllm.swap.parked import Parked
from thaw_vllm.engines.vllm.swap.routes import Engine as EngineState
from thaw_vllm.sessions.store import Store

TOKEN = "a token of 24 characters"
ROUTES: dict[str, Any] = {
    "": None,
    "/checkpoint": {"token_ids": [1]},
    "/checkout": {"session": "trunk"},
    "/branch": {"session": "trunk"},
}


class Server:
    def __init__(self, directory: Path | None, token: str | None = TOKEN) -> None:
        self.engine, self.directory = Client(), directory
        app, plugin = FastAPI(), routes.KVRoutes()
        plugin.attach_router(app)
        access = Access(token, sessions=None if directory is None else str(directory))
        self.state = EngineState(self.engine)
        app.state.thaw_kv = routes._Served(access, self.engine, self.state)
        self.client = TestClient(app, raise_server_exceptions=False)

    @property
    def store(self) -> Store:
        assert self.directory is not None
        return Store(self.directory)

    def ask(self, what: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        headers = {} if token is None else {"X-Thaw-Admin-Token": token}
        path = f"/v1/thaw/sessions{what}"
        if what == "":
            answer = self.client.get(path, headers=headers)
        else:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = self.client.post(path, content=raw, headers=headers)
        return answer.status_code, answer.json()

    def tokens(self, id_: str) -> list[int]:
        return self.store.read(id_).tokens.tolist()

    def kept(self, **body: Any) -> str:
        status, answer = self.ask("/checkpoint", body)
        assert status == 200, answer
        return str(answer["session"])


@pytest.fixture
def directory(memory_path: Path) -> Path:
    found = memory_path / "secret place"
    found.mkdir(mode=0o700)
    return found


@pytest.fixture
def server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    async def tokens(client: Any, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    monkeypatch.setattr(versions, "completion_tokens", tokens)
    return Server(directory)


def message(answer: dict[str, Any]) -> str:
    return str(answer["error"]["message"])


class TestWhoMayCall:
    @pytest.mark.parametrize("sent", [None, "", TOKEN[:-1], TOKEN.upper()])
    def test_only_with_the_token(self, server: Server, sent: str | None):
        for what, body in ROUTES.items():
            status, answer = server.ask(what, body, sent)
            assert status == 403 and "X-Thaw-Admin-Token" in message(answer)
        assert server.engine.asked == [] and [*server.directory.iterdir()] == []

    @pytest.mark.parametrize("place", [None, "none", "relative"])
    def test_only_where_there_is_a_directory(self, directory: Path, place: str | None, monkeypatch: Any):
        monkeypatch.chdir(directory.parent)
        places = {None: None, "none": directory / "none", "relative": Path(directory.name)}
        server = Server(places[place])
        for what, body in ROUTES.items():
            status, answer = server.ask(what, body)
            assert status == 403 and answer["error"]["type"] == "Forbidden"
            assert "THAW_SESSIONS_DIR" in message(answer) and "thaw serve --sessions-dir DIRECTORY" in message(answer)
        assert not (directory / "none").exists() and server.engine.asked == []

    def test_a_server_without_a_token_lets_nobody(self, directory: Path):
        for what, body in ROUTES.items():
            assert Server(directory, None).ask(what, body)[0] == 403

    def test_the_environment_says_where(self):
        found = Access.from_environment({"THAW_ADMIN_TOKEN": TOKEN, "THAW_SESSIONS_DIR": "/srv/sessions"})
        assert found == Access(TOKEN, None, None, "/srv/sessions")
        assert Access.from_environment({"THAW_SESSIONS_DIR": ""}).sessions is None


class TestWhatIsKept:
    def test_before_the_first_one(self, server: Server):
        assert server.ask("") == (200, {"sessions": [], "broken": {}})
        for what in ("/checkout", "/branch"):
            status, answer = server.ask(what, {"session": "trunk"})
            assert status == 400 and "there is no session 'trunk'" in message(answer), answer
        assert [*server.directory.iterdir()] == []

    def test_token_ids(self, server: Server):
        body = {"token_ids": [*range(9)], "labels": ["a", "b"], "cache_salt": "s", "model_id": MODEL}
        status, answer = server.ask("/checkpoint", body)
        page = context().page
        assert status == 200 and answer == {
            "session": answer["session"],
            "tokens": 9,
            "blocks": 2,
            "added": 2,
            "bytes": 2 * page,
            "seconds": 0.25,
            "phases": {"workers": 0.25},
            "expires": None,
        }
        head = server.store.read(answer["session"]).head
        assert (head.labels, head.salt, head.prompt) == (("a", "b"), "s", 9)
        assert resumes(server.store, answer["session"])
        options = {"tokens": [*range(9)], "salt": "s", "model": MODEL, "store": str(server.directory)}
        assert server.engine.asked == [("thaw_session_keep", options)]

    def test_a_prompt(self, server: Server):
        assert server.tokens(server.kept(prompt="abcde")) == [97, 98, 99, 100, 101]

    def test_a_running_request(self, server: Server):
        trunk = server.kept(token_ids=RUNNING[:5], labels=["trunk"])
        id_ = server.kept(request="cmpl-1", parent="trunk")
        head = server.store.read(id_).head
        assert server.tokens(id_) == RUNNING and (head.parent, head.fork, head.prompt) == (trunk, 5, 6)
        assert server.engine.asked[-1][1]["request"] == "cmpl-1"

    def test_the_list(self, server: Server):
        trunk = server.kept(token_ids=[*range(9)], labels=["trunk"], cache_salt="pepper")
        late = server.ask("/branch", {"session": "trunk", "at": 5})[1]["id"]
        server.store.pin(late)
        status, answer = server.ask("")
        assert status == 200 and answer["broken"] == {}
        first, second = answer["sessions"]
        assert (first["id"], first["tokens"], first["salted"], first["depth"]) == (trunk, 9, True, 0)
        assert (second["id"], second["parent"], second["fork"], second["depth"]) == (late, trunk, 5, 1)
        assert first["pinned"] is False and second["pinned"] is True and first["source"] == "tiny"
        told = json.dumps(answer)
        assert "pepper" not in told and "secret place" not in told and "nonce" not in told

    def test_a_broken_record_is_told_beside_the_others(self, server: Server):
        good, bad = server.kept(token_ids=[1, 2, 3]), server.kept(token_ids=[4])
        server.store.record(bad).write_bytes(b"x")
        status, answer = server.ask("")
        assert status == 200 and [one["id"] for one in answer["sessions"]] == [good]
        assert answer["broken"] == {bad: f"'{bad}.session' is no record of a session"}


class TestCheckout:
    def test_what_is_told(self, server: Server):
        id_ = server.kept(token_ids=[*range(9)], labels=["trunk"], cache_salt="pepper")
        expected = {
            "session": id_,
            "tokens": 9,
            "blocks": 2,
            "present": 0,
            "left_out": 0,
            "lost": 0,
            "cached": 8,
            "bytes": 2 * context().page,
            "seconds": 0.5,
            "phases": {"workers": 0.5},
        }
        for named in ("trunk", id_, id_[:8]):
            assert server.ask("/checkout", {"session": named}) == (200, expected)
        status, answer = server.ask("/checkout", {"session": "trunk", "token_ids": True, "evict": True})
        told = {"token_ids": [*range(9)], "salted": True, "generated": 0, "sampling": None}
        assert status == 200 and answer == expected | told
        asked = server.engine.asked[-1]
        options = {"store": str(server.directory), "session": id_, "model": None, "evict": True}
        assert asked == ("thaw_session_restore", options)

    def test_sessions_that_are_finished_or_whose_sampling_is_not_known(self, server: Server):
        server.kept(token_ids=[1])  # which makes the store
        save(server.store, session(range(8), finished="stop", sampling={"max_tokens": 1}, labels=("done",)))
        assert server.ask("/checkout", {"session": "done"})[0] == 200

    def test_it_is_used_now(self, server: Server):
        id_ = server.kept(token_ids=[1, 2])
        os.utime(server.store.record(id_), (1, 1))
        server.ask("/checkout", {"session": id_})
        assert server.store.listed()[0][0].used > 1000


class TestBranch:
    def test_a_branch(self, server: Server):
        trunk = server.kept(token_ids=[*range(9)], labels=["trunk"])
        status, answer = server.ask("/branch", {"session": "trunk", "at": -3, "labels": ["x"]})
        assert status == 200
        assert (answer["parent"], answer["fork"], answer["tokens"], answer["labels"]) == (trunk, 6, 6, ["x"])
        assert answer["source"] == "tiny" and "nonce" not in answer and len(server.engine.asked) == 1
        assert server.tokens(answer["id"]) == [*range(6)]
        assert server.ask("/branch", {"session": trunk})[1]["tokens"] == 9

    def test_what_expires(self, server: Server):
        server.kept(token_ids=[*range(9)], labels=["trunk"], ttl=3600)
        early, whole = (server.ask("/branch", {"session": "trunk"} | more)[1] for more in ({"ttl": 0.5}, {}))
        trunk = server.ask("")[1]["sessions"][0]
        assert trunk["expires"] == pytest.approx(trunk["created"] + 3600, abs=1e-5)
        assert early["expires"] == pytest.approx(early["created"] + 0.5, abs=1e-5) and whole["expires"] is None

    @pytest.mark.parametrize("at", [0, 10, -10])
    def test_no_such_token(self, server: Server, at: int):
        server.kept(token_ids=[*range(9)], labels=["trunk"])
        status, answer = server.ask("/branch", {"session": "trunk", "at": at})
        assert status == 400 and "has 9 tokens" in message(answer) and len(server.store.listed()[0]) == 1


BAD_BODIES: list[tuple[str, Any, str]] = [
    ("checkpoint", b"", "not JSON"),
    ("checkpoint", b'{"prompt": "a", "prompt": "b"}', "twice"),
    ("checkpoint", [], "an object"),
    ("checkpoint", {}, "one of request, token_ids and prompt"),
    ("checkpoint", {"prompt": "a", "request": "b"}, "request and prompt was given"),
    ("checkpoint", {"prompt": ""}, "not empty"),
    ("checkpoint", {"prompt": "\ud800"}, "surrogate"),
    ("checkpoint", {"prompt": ["a"]}, "must be a text"),
    ("checkpoint", {"token_ids": []}, "not empty"),
    ("checkpoint", {"token_ids": [[1]]}, "whole numbers"),
    ("checkpoint", {"token_ids": [True]}, "whole numbers"),
    ("checkpoint", {"token_ids": [-1]}, "whole numbers"),
    ("checkpoint", {"token_ids": [2**31]}, "whole numbers"),
    ("checkpoint", {"request": "r", "cache_salt": "s"}, "has its own"),
    ("checkpoint", {"prompt": "a", "cache_salt": ""}, "cache_salt must"),
    ("checkpoint", {"prompt": "a", "labels": "b"}, "labels must be a list"),
    ("checkpoint", {"prompt": "a", "labels": None}, "labels must be a list"),
    ("checkpoint", {"prompt": "a", "labels": ["b"] * 65}, "64 texts at most"),
    ("checkpoint", {"prompt": "a", "labels": [""]}, "not empty"),
    ("checkpoint", {"prompt": "a", "labels": ["x" * 201]}, "at most 200"),
    ("checkpoint", {"prompt": "a", "labels": ["a\n"]}, "printable"),
    ("checkpoint", {"prompt": "a", "ttl": 0}, "ttl must be a number of seconds"),
    ("checkpoint", {"prompt": "a", "ttl": "7d"}, "ttl must be a number of seconds"),
    ("checkpoint", {"prompt": "a", "parent": 5}, "parent must"),
    ("checkpoint", {"prompt": "a", "parent": "nobody"}, "there is no session 'nobody' in the server's store"),
    ("checkpoint", {"prompt": "a", "model_id": "x"}, "thaw id MODEL"),
    ("checkpoint", {"prompt": "a", "store": "/tmp"}, "no field 'store'"),
    ("checkout", {}, "session is missing"),
    ("checkout", {"session": ""}, "not empty"),
    ("checkout", {"session": "../x"}, "there is no session '../x'"),
    ("checkout", {"session": "nobody"}, "there is no session 'nobody' in the server's store"),
    ("checkout", {"session": "trunk", "evict": 1}, "true or false"),
    ("checkout", {"session": "trunk", "token_ids": [1]}, "true or false"),
    ("checkout", {"session": "trunk", "model_id": "x"}, "thaw id MODEL"),
    ("checkout", {"session": "trunk", "append": [1]}, "no field 'append'"),
    ("branch", {}, "session is missing"),
    ("branch", {"session": "trunk", "at": True}, "a whole one"),
    ("branch", {"session": "trunk", "at": 1.0}, "a whole one"),
    ("branch", {"session": "trunk", "at": 10**30}, "a whole one"),
    ("branch", {"session": "trunk", "labels": [5]}, "must be a text"),
    ("branch", {"session": "trunk", "labels": ["a\n"]}, "printable"),
    ("branch", {"session": "trunk", "ttl": True}, "ttl must be a number of seconds"),
    ("branch", {"session": "trunk", "path": "x"}, "no field 'path'"),
]


@pytest.mark.parametrize(("what", "body", "said"), BAD_BODIES)
def test_a_body_that_cannot_be_right(server: Server, what: str, body: Any, said: str):
    server.kept(token_ids=[1, 2, 3], labels=["trunk"])
    status, answer = server.ask(f"/{what}", body)
    told = message(answer).replace("JSON object", "an object")
    kind = "UnknownSessionError" if "there is no session" in said else "UsageError"
    assert status == 400 and answer["error"]["type"] == kind and said in told, answer
    assert "secret place" not in told and len(server.engine.asked) == len(server.store.listed()[0]) == 1


def test_a_body_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes, "LARGEST_BODY", 1000)
    for what in ("/checkpoint", "/checkout", "/branch"):
        assert server.ask(what, b" " * 1001)[0] == 413


class TestEngines:
    @pytest.mark.parametrize("away", ["asleep", "parked"])
    def test_that_are_away(self, server: Server, away: str):
        """Are not asked; what needs the store alone goes on."""
        server.kept(token_ids=[1, 2, 3], labels=["trunk"])
        if away == "asleep":
            server.engine.asleep = True
        else:
            server.state.parked = Parked([3], True, "", 5, "/secret/a.thaw", ["c0"], None, 2, {"total": 1.0})
        for what, body in ROUTES.items():
            status, answer = server.ask(what, body)
            assert status == (400 if what in ("/checkpoint", "/checkout") else 200), answer
            assert status == 200 or away in message(answer)
        assert len(server.engine.asked) == 1

    def test_of_which_there_are_several(self, server: Server):
        server.engine.vllm_config.parallel_config.data_parallel_size = 2
        status, answer = server.ask("/checkpoint", {"token_ids": [1]})
        assert status == 501 and "data_parallel_size=1" in message(answer)

    @pytest.mark.parametrize(
        ("kind", "status"),
        [("MismatchError", 409), ("UnsupportedError", 501), ("SpaceError", 507), ("DeviceError", 503)],
    )
    def test_that_refuse(self, server: Server, kind: str, status: int):
        server.kept(token_ids=[1, 2, 3], labels=["trunk"])
        server.engine.fault = {"error": kind, "message": "what, where, cure"}
        for what in ("/checkpoint", "/checkout"):
            assert server.ask(what, ROUTES[what]) == (status, {"error": {"type": kind, "message": "what, where, cure"}})


class TestNoPaths:
    """Where the store is nobody is told; which file is wrong is."""

    def damaged(self, server: Server, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)

    @pytest.mark.parametrize("what", ["/checkout", "/branch", "/checkpoint"])
    def test_of_a_record(self, server: Server, what: str):
        id_ = server.kept(token_ids=[*range(9)], labels=["trunk"])
        self.damaged(server, server.store.record(id_))
        body = {"prompt": "a", "parent": id_} if what == "/checkpoint" else {"session": id_}
        status, answer = server.ask(what, body)
        assert status == 422 and answer["error"]["type"] == "CorruptionError"
        assert message(answer).startswith(f"'{id_}.session' is damaged") and "/" not in message(answer)

    def test_of_a_block(self, server: Server):
        id_ = server.kept(token_ids=[*range(9)])
        path = next(server.store.block_files())
        self.damaged(server, path)
        # As the engine core answers it.
        what = f"{str(path)!r} is damaged: the checksum of its bytes does not agree; thaw fsck --repair"
        server.engine.fault = {"error": "CorruptionError", "message": what}
        status, answer = server.ask("/checkout", {"session": id_})
        assert status == 422 and message(answer) == what.replace(str(path), path.name)

    def test_of_a_directory_that_others_may_write_to(self, server: Server):
        server.directory.chmod(0o777)
        status, answer = server.ask("/checkpoint", {"token_ids": [1]})
        assert status == 500 and answer["error"]["type"] == "StorageError"
        assert "others may write to the server's store; chmod 700 it" in message(answer)
        assert "secret" not in message(answer) and server.engine.asked == []

    def test_of_a_directory_that_is_something_else(self, server: Server):
        (server.directory / "file").touch()
        status, answer = server.ask("/checkpoint", {"token_ids": [1]})
        assert status == 500 and "the server's store has other files in it" in message(answer)
        assert "secret" not in message(answer)

    def test_a_directory_of_another_name_is_no_part_of_it(self, server: Server):
        other = f"'{server.directory}s/x'"
        server.engine.fault = {"error": "StorageError", "message": f"{other} and {str(server.directory)!r}/"}
        told = message(server.ask("/checkpoint", {"token_ids": [1]})[1])
        assert told.startswith(other) and "the server's store" in told

    @pytest.mark.parametrize(
        ("source", "shown"),
        [("org/model", "org/model"), ("/a/b/model/", "model"), ("./model", "model"), ("a/b/model", "model")],
    )
    def test_of_a_model(self, server: Server, source: str, shown: str):
        server.engine.source = source
        server.kept(token_ids=[1])
        assert server.ask("")[1]["sessions"][0]["source"] == shown


def test_waiting_for_a_collection_keeps_no_other_route_waiting(server: Server):
    server.kept(token_ids=[1, 2, 3], labels=["trunk"])
    app = server.client.app

    async def run() -> None:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        headers = {"X-Thaw-Admin-Token": TOKEN}
        async with httpx.AsyncClient(transport=transport, base_url="http://a", headers=headers) as client:
            with held(server.store):
                waiting = [
                    asyncio.create_task(client.post(f"/v1/thaw/sessions{what}", json=ROUTES[what]))
                    for what in [*ROUTES][1:] * 4
                ]
                await asyncio.sleep(0.3)
                listed = await asyncio.wait_for(client.get("/v1/thaw/sessions"), 10)
                assert listed.status_code == 200 and not any(task.done() for task in waiting)
            for answer in await asyncio.gather(*waiting):
                assert answer.status_code == 200, answer.text

    asyncio.run(run())
    assert server.directory is not None and free(server.directory)
