"""What goes through the pool's front unchanged, what does not, who is let in; the servers behind are stand-ins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.serve.loops import event_loops
from tests.serve.served import TOKEN, Served

from thaw_vllm.errors import ThawError
from thaw_vllm.serve import app as app_module
from thaw_vllm.serve import router as subject
from thaw_vllm.serve.config import Model

ITS_OWN = (b"accept", b"accept-encoding", b"user-agent")
"""Headers of the client."""
JSON = {"Content-Type": "application/json"}
ADMIN = {"X-Thaw-Admin-Token": TOKEN}


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds; the program runs on the second where it is installed."""
    with event_loops(request.param):
        yield


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # sockets want short paths


def play(served: Served, work: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with served.running() as client:
            return await asyncio.wait_for(work(client), 60)

    return asyncio.run(run())


def model(name: str = "a", **more: Any) -> Model:
    return Model(name, "/m", **more)


class TestPassedOn:
    def test_bytes_and_headers_both_ways(self, folder: Path):
        served = Served(folder, model())
        body = b'{"model" : "a", "chunks": ["\\u00e9", "data: [DONE]\\n\\n"], "n": 1e-3}'

        async def work(client: aiohttp.ClientSession) -> None:
            headers = {"Content-Type": "application/json", "X-Mine": "x", "Authorization": "Bearer k", "TE": "trailers"}
            headers |= {"Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Umlaut": "ü"}
            async with client.post("/v1/any%2Fpath?x=1&y=%20", data=body, headers=headers) as answer:
                assert await answer.read() == "édata: [DONE]\n\n".encode()
                assert answer.status == 200 and answer.headers.getall("x-own") == ["1", "2"]
                assert answer.headers["content-type"] == "text/event-stream"
            (asked,) = served.engines[0].requests
            assert asked["body"] == body and asked["path"] == b"/v1/any%2Fpath" and asked["query"] == b"x=1&y=%20"
            sent = dict(asked["headers"])
            assert sent[b"x-mine"] == b"x" and sent[b"authorization"].startswith(b"Bearer key of")
            assert b"te" not in sent and b"x-hop" not in sent
            assert sent.keys() <= {
                *(b"host", b"x-mine", b"authorization", b"content-type", b"content-length"),
                *ITS_OWN,
                b"x-umlaut",
            }
            assert sent[b"x-umlaut"] == "ü".encode()

        play(served, work)

    @pytest.mark.parametrize("status", [400, 404, 422, 500])
    def test_errors_are_the_servers(self, folder: Path, status: int):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            asked = {"model": "a", "status": status, "chunks": ["why"]}
            async with client.post("/v1/completions", json=asked) as answer:
                assert (answer.status, await answer.text()) == (status, "why")

        play(served, work)

    def test_a_stream_arrives_as_it_is_sent(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            asked = {"model": "a", "chunks": [f"{n};" for n in range(5)], "pause": 0.05}
            async with client.post("/v1/completions", json=asked) as answer:
                got = [(chunk, asyncio.get_running_loop().time()) async for chunk in answer.content.iter_any()]
            assert [chunk for chunk, _ in got] == [b"0;", b"1;", b"2;", b"3;", b"4;"]
            assert got[-1][1] - got[0][1] > 0.15

        play(served, work)

    def test_many_streams_at_once(self, folder: Path):
        served = Served(folder, model("a", share=0.5), model("b", share=0.5))

        async def work(client: aiohttp.ClientSession) -> None:
            async def one(number: int) -> None:
                chunks = [f"{number}:{n};" for n in range(20)]
                asked = {"model": "ab"[number % 2], "chunks": chunks, "pause": 0.001}
                async with client.post("/v1/completions", json=asked) as answer:
                    assert await answer.text() == "".join(chunks)

            await asyncio.gather(*map(one, range(64)))

        play(served, work)

    def test_without_a_name_the_only_model_is_meant(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/completions", json={}) as answer:
                assert answer.status == 200

        play(served, work)


class TestLeft:
    def test_who_leaves_ends_the_work(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            asked = {"model": "a", "chunks": ["x"] * 1000, "pause": 0.01}
            async with client.post("/v1/completions", json=asked) as answer:
                await answer.content.read(1)
                answer.close()
            await asyncio.wait_for(served.engines[0].aborted.wait(), 10)
            while served.pool.residents[0].inflight:
                await asyncio.sleep(0.005)

        play(served, work)

    def test_who_leaves_while_waiting_is_forgotten(self, folder: Path):
        served = Served(folder, model(), given={"seconds": 0.3})

        async def work(client: aiohttp.ClientSession) -> None:
            asking = asyncio.create_task(client.post("/v1/completions", json={"model": "a"}).__aenter__())
            while not served.pool.waiting:
                await asyncio.sleep(0.005)
            asking.cancel()
            while served.pool.waiting:
                await asyncio.sleep(0.005)
            assert served.engines[0].requests == []

        play(served, work)

    def test_an_answer_that_breaks_off_does_not_look_whole(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            with pytest.raises(aiohttp.ClientError):
                async with client.post(
                    "/v1/completions", json={"model": "a", "chunks": ["x", "die"], "pause": 0.05}
                ) as answer:
                    await answer.read()

        play(served, work)

    def test_an_engine_that_is_gone(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/completions", json={"model": "a"}):
                pass
            served.engines[0].socket.unlink()
            await served.engines[0].session.close()
            async with client.post("/v1/completions", json={"model": "a"}) as answer:
                assert answer.status == 502 and answer.headers["retry-after"] == "1"
                assert "send the request again" in (await answer.json())["error"]["message"]

        play(served, work)

    def test_an_answer_is_cut_when_its_engine_has_to_go(self, folder: Path):
        """After the drain: what has begun breaks off, what has not may be sent again; neither hangs."""
        served = Served(folder, model("a"), model("b"), drain=0.2)

        async def work(client: aiohttp.ClientSession) -> None:
            asked = {"model": "a", "chunks": ["x"] * 2000, "pause": 0.01}
            answer = await client.post("/v1/completions", json=asked).__aenter__()
            silent = asyncio.create_task(client.post("/v1/completions", json=asked | {"before": 20}).__aenter__())
            while served.pool.residents[0].inflight < 2:
                await asyncio.sleep(0.005)
            async with client.post("/v1/completions", json={"model": "b"}) as other:
                assert other.status == 200
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(answer.read(), 5)
            told = await asyncio.wait_for(silent, 5)
            assert told.status == 503 and "send the request again" in await told.text()

        play(served, work)

    def test_one_clients_cookies_are_not_anothers(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            for _ in range(2):
                async with (
                    aiohttp.ClientSession() as fresh,
                    fresh.post(f"{served.url}/v1/x", json={"model": "a"}) as answer,
                ):
                    assert answer.status == 200
            assert all(key != b"cookie" for asked in served.engines[0].requests for key, _ in asked["headers"])

        play(served, work)


class TestRefused:
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
    )
    def test_what_does_not_say_that_it_is_json(self, folder: Path, kind: str):
        """A page of another site can send that, and nothing is started for it."""
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/x", data=b'{"model": "a"}', headers={"Content-Type": kind}) as answer:
                assert answer.status == 415

        play(served, work)
        assert served.engines == []

    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"{", 400, "not JSON"),
            (b"[" * 100_000, 400, "not JSON"),
            (b"[1]", 400, "names no model"),
            (b'{"model": 3}', 400, "names no model"),
            (b"{}", 400, "names no model"),
            (b'{"model": "c"}', 404, "The model `c` does not exist."),
            (b'{"model": "\\ud800"}', 404, "The model `\\ud800` does not exist."),
            (b"\xff", 400, "not JSON"),
        ],
    )
    def test_bodies(self, folder: Path, body: bytes, status: int, said: str):
        served = Served(folder, model("a"), model("b"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/completions", data=body, headers=JSON) as answer:
                error = (await answer.json())["error"]
                assert answer.status == error["code"] == status and said in error["message"]

        play(served, work)
        assert served.engines == []

    def test_a_body_that_is_too_large(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(subject, "LARGEST_BODY", 1000)
        served = Served(folder, model())

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 100

        async def work(client: aiohttp.ClientSession) -> None:
            for body in (b"x" * 2000, chunks()):
                async with client.post("/v1/completions", data=body, headers=JSON) as answer:
                    assert answer.status == 413

        play(served, work)

    def test_a_body_that_does_not_come(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(subject, "BODY_LIMIT", 0.2)
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            head = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: 10\r\n\r\n{")
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
            writer.close()

        play(served, work)

    def test_a_start_that_fails(self, folder: Path):
        served = Served(folder, model(), given={"faults": {"start": ThawError("no memory")}})

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/completions", json={"model": "a"}) as answer:
                assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
                assert "no memory" in (await answer.json())["error"]["message"]

        play(served, work)

    @pytest.mark.parametrize("value", [b"a\x01b", b"\x7f", b"a\rb"])
    def test_headers_with_control_characters(self, value: bytes):
        """Not every web server refuses them, and the HTTP client does."""
        with pytest.raises(subject.Refused, match="control characters") as raised:
            subject._passed([(b"x-mine", value)])
        assert raised.value.status == 400 and subject._passed([(b"x-mine", b"a\tb")]) == [("x-mine", "a\tb")]

    def test_a_deadline_of_the_request(self, folder: Path):
        served = Served(folder, model(), given={"seconds": 5})

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/x", json={"model": "a"}, headers={"X-Thaw-Deadline": "0.1"}) as answer:
                assert answer.status == 503 and "not there within 0.1 s" in await answer.text()
            for bad in ("soon", "-1", "nan", "inf"):
                async with client.post("/v1/x", json={"model": "a"}, headers={"X-Thaw-Deadline": bad}) as answer:
                    assert answer.status == 400

        play(served, work)

    def test_routes_of_a_single_server(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/thaw/kv/freeze", json={"name": "x.thawkv"}, headers=ADMIN) as answer:
                assert answer.status == 404 and "several models" in await answer.text()

        play(served, work)

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
    def test_other_methods(self, folder: Path, method: str):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.request(method, "/v1/none") as answer:
                assert answer.status == 404

        play(served, work)

    def test_api_keys(self, folder: Path):
        served = Served(folder, model(), api_keys=["one", "two"])

        async def work(client: aiohttp.ClientSession) -> None:
            for key, status in (
                (None, 401),
                ("Bearer three", 401),
                ("one", 401),
                ("Bearer one", 200),
                ("bearer two", 200),
            ):
                headers = {} if key is None else {"Authorization": key}
                async with client.post("/v1/x", json={"model": "a"}, headers=headers) as answer:
                    assert answer.status == status
                async with client.get("/v1/models", headers=headers) as answer:
                    assert answer.status == status

        play(served, work)
        assert len(served.engines) == 1


class TestOwn:
    def test_what_changes_take_by_phase(self, folder: Path):
        served = Served(folder, model("a"), model("b"), given={"swappable": True})

        async def work(client: aiohttp.ClientSession) -> None:
            for name in "ab":
                async with client.post("/v1/x", json={"model": name}) as answer:
                    assert answer.status == 200
            async with client.get("/metrics") as answer:
                text = await answer.text()
            assert 'thaw_change_phase_seconds_sum{change="swapped",model="b",phase="fill"} 0.1' in text
            assert "# TYPE thaw_start_phase_seconds gauge" in text
            async with client.get("/v1/thaw/events?after=0", headers=ADMIN) as answer:
                while "swapped" not in (line := (await answer.content.readline()).decode()):
                    pass
                while not line.startswith("data: "):
                    line = (await answer.content.readline()).decode()
                assert json.loads(line[6:])["phases"] == {"fill": 0.1}

        play(served, work)

    def test_models_health_and_metrics(self, folder: Path):
        served = Served(folder, model("a"), model("b"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.get("/v1/models") as answer:
                found = await answer.json()
                assert [one["id"] for one in found["data"]] == ["a", "b"] and found["object"] == "list"
            async with client.get("/health") as answer:
                assert answer.status == 200
            async with client.post("/v1/x", json={"model": "a"}):
                pass
            async with client.get("/metrics") as answer:
                text = await answer.text()
            pid = served.engines[0].pid
            assert f'x:n{{model_name="m",thaw_engine="{pid}",thaw_model="a"}} 3.0' in text
            assert 'thaw_engines{model="a",state="ready"} 1.0' in text
            assert 'thaw_change_seconds_count{change="started",model="a"} 1.0' in text

        play(served, work)
        assert len(served.engines) == 1, "asking what there is starts nothing"

    @pytest.mark.parametrize(
        ("headers", "said"),
        [
            ({}, "admin token"),
            ({"X-Thaw-Admin-Token": "another"}, "admin token"),
            ({"Authorization": f"Bearer {TOKEN}"}, "admin token"),
            (ADMIN | {"Host": "evil.example"}, "not called 'evil.example'"),
            (ADMIN | {"Host": "["}, "not called '['"),
            (ADMIN | {"Host": "a:b:c"}, "not called 'a:b:c'"),
            (ADMIN | {"Origin": "http://evil.example"}, "other sites"),
        ],
    )
    def test_strangers(self, folder: Path, headers: dict[str, str], said: str):
        served = Served(folder, model(), api_keys=[TOKEN])

        async def work(client: aiohttp.ClientSession) -> None:
            for method, path in (("GET", "status"), ("GET", "events"), ("POST", "models"), ("POST", "models/a/load")):
                async with client.request(method, f"/v1/thaw/{path}", headers=headers) as answer:
                    assert answer.status == 403 and said in await answer.text()

        play(served, work)
        assert served.engines == []

    def test_load_park_unload(self, folder: Path):
        served = Served(folder, model(), model("org/b"), given={"parkable": True}, hosts=["Box"])

        async def work(client: aiohttp.ClientSession) -> None:
            async def post(path: str, **headers: str) -> tuple[int, Any]:
                async with client.post(f"/v1/thaw/models/{path}", headers=ADMIN | headers) as answer:
                    return answer.status, await answer.json()

            assert (await post("a/load", Host="box"))[0] == 200
            async with client.get("/v1/thaw/status", headers=ADMIN) as answer:
                found = await answer.json()
            assert found["models"]["a"]["states"] == ["ready"] and found["engines"][0]["requests"] == 0
            assert (await post("a/park"))[0] == 200
            assert (await post("org/b/load"))[0] == 200
            assert (await post("a/park"))[0] == 409
            assert (await post("a/unload"))[0] == 200
            status, told = await post("c/load")
            assert status == 404 and told["error"]["type"] == "UnknownModelError"
            async with client.get("/openapi.json") as answer:
                assert "/v1/thaw/models/{name}/load" in (await answer.json())["paths"]

        play(served, work)
        assert served.log[:4] == [("start", "a"), ("park", "a"), ("start", "org/b"), ("stop", "a")]

    def test_register(self, folder: Path):
        """Models out of the server's directories, with the options of another; nothing from elsewhere."""
        root = folder / "models"
        (root / "b").mkdir(parents=True)
        (root / "out").symlink_to("/etc")
        (root / "broken.thaw").write_bytes(b"none")
        served = Served(folder, model("a", share=0.5, args=("--x",), pinned=True), directories=[str(root)])

        async def work(client: aiohttp.ClientSession) -> None:
            async def post(**body: Any) -> tuple[int, str]:
                async with client.post("/v1/thaw/models", json=body, headers=ADMIN) as answer:
                    return answer.status, await answer.text()

            for bad, status, said in (
                ({"name": "b", "path": "/etc"}, 400, "must be relative"),
                ({"name": "b", "path": "../models/b"}, 400, "must be relative"),
                ({"name": "b", "path": "out"}, 400, "leads out"),
                ({"name": "b", "path": "b", "snapshot": "out/passwd"}, 400, "leads out"),
                ({"name": "b", "path": "none"}, 404, "there is no 'none'"),
                ({"name": "b", "path": "n" * 300}, 404, "there is no"),
                ({"name": "b", "path": "b", "args": ["--trust-remote-code"]}, 400, "args"),
                ({"name": "b", "path": "b", "like": "c"}, 404, "no model 'c'"),
                ({"name": "b b", "path": "b", "like": "a"}, 409, "cannot name a model"),
                ({"name": "a", "path": "b", "like": "a"}, 409, "already"),
                ({"name": "b", "path": "b"}, 409, "no room"),
                ({"path": "b"}, 400, "name"),
            ):
                assert (found := await post(**bad))[0] == status and said in found[1], (bad, found)
            assert (await post(name="b", path="b", like="a"))[0] == 200
            made = served.pool.models["b"]
            assert (made.path, made.args, made.share, made.pinned) == (str(root / "b"), ("--x",), 0.5, False)
            async with client.post("/v1/x", json={"model": "b"}) as answer:
                assert answer.status == 200
            async with client.get("/v1/thaw/snapshots", headers=ADMIN) as answer:
                (found,) = (await answer.json())["snapshots"]
            assert found["path"] == "broken.thaw" and "broken.thaw" in found["error"]

        play(served, work)

    def test_bodies_of_strangers_are_not_read(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            for path in ("models", "verify"):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                head = f"POST /v1/thaw/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: 1000000000\r\n\r\n".encode())
                assert b" 403 " in await asyncio.wait_for(reader.readline(), 10)
                writer.close()
                async with client.post(f"/v1/thaw/{path}", data=b"[" * 70_000, headers=ADMIN | JSON) as answer:
                    assert answer.status == 413
            async with client.get("/openapi.json") as answer:
                described = (await answer.json())["paths"]["/v1/thaw/models"]["post"]["requestBody"]
            assert "snapshot" in described["content"]["application/json"]["schema"]["properties"]

        play(served, work)

    def test_events(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/x", json={"model": "a"}):
                pass
            async with client.get("/v1/thaw/events?after=0", headers=ADMIN) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                found = []
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        found.append(json.loads(line[6:]))
                    if len(found) == 2:
                        break
            assert [one["event"] for one in found] == ["starting", "started"] and found[1]["model"] == "a"
            headers = ADMIN | {"Last-Event-ID": "9" * 5000}
            async with client.get("/v1/thaw/events?after=1", headers=headers) as answer:
                assert answer.status == 200 and await answer.content.readline() == b"id: 2\n"

        play(served, work)

    def test_a_method_that_a_route_does_not_have(self, folder: Path):
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            for method, path, allowed in (
                ("POST", "/health", "GET"),
                ("DELETE", "/v1/thaw/models", "GET, POST"),
                ("GET", "/v1/thaw/models/org/b/load", "POST"),
                ("PUT", "/thaw/login", "POST"),
            ):
                async with client.request(method, path, json={"model": "a"}, headers=ADMIN) as answer:
                    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
                    assert (await answer.json())["error"]["message"] == f"there is no {method} {path} here"

        play(served, work)
        assert served.engines == []

    def test_a_fault_of_the_server(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        def broken(pool: Any) -> Any:
            raise RuntimeError("a secret")

        monkeypatch.setattr(app_module, "document", broken)
        served = Served(folder, model())

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.get("/v1/thaw/status", headers=ADMIN) as answer:
                error = (await answer.json())["error"]
                assert answer.status == error["code"] == 500 and "its log" in error["message"]
                assert "secret" not in await answer.text()

        play(served, work)
