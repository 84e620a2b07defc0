"""The page of a pool without a browser: who gets in, how long, from where; what its files and answers are."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from tests.serve.served import TOKEN, Served
from tests.sessions.made import save, session

import thaw_vllm
from thaw_vllm.engines.vllm.start_report import Event, report
from thaw_vllm.serve import app as app_module
from thaw_vllm.serve import page as subject
from thaw_vllm.serve import starts, state, usage, verification
from thaw_vllm.serve.config import Model
from thaw_vllm.serve.sessions import EACH, LIFETIME
from thaw_vllm.sessions.store import Store

ADMIN = {"X-Thaw-Admin-Token": TOKEN}
Work = Callable[[aiohttp.ClientSession], Awaitable[Any]]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # sockets want short paths


def play(served: Served, work: Work) -> Any:
    async def run() -> Any:
        async with served.running():
            jar = aiohttp.DummyCookieJar()  # cookies are ours to send
            async with aiohttp.ClientSession(served.url, cookie_jar=jar) as client:
                return await asyncio.wait_for(work(client), 60)

    return asyncio.run(run())


async def log_in(client: aiohttp.ClientSession, served: Served, token: str = TOKEN, **headers: str) -> Any:
    """Status, document, and the header that sets the cookie."""
    given = {"Origin": served.url} | headers
    async with client.post("/thaw/login", json={"token": token}, headers=given) as answer:
        return answer.status, await answer.json(), answer.headers.get("Set-Cookie", "")


async def logged_in(client: aiohttp.ClientSession, served: Served) -> dict[str, str]:
    """Headers of a browser that has a session, and asks for the page's sake."""
    _, _, cookie = await log_in(client, served)
    return {"Cookie": cookie.partition(";")[0], "Origin": served.url}


class TestFiles:
    def test_only_the_form_without_a_session(self, folder: Path):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.get("/thaw") as answer:
                assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
                text = await answer.text()
                assert "Admin token" in text and "Models" not in text
            async with client.get("/thaw", headers=await logged_in(client, served)) as answer:
                text = await answer.text()
                assert "Models" in text and TOKEN not in text
            async with client.get("/thaw/") as answer:
                assert answer.url.path == "/thaw"

        play(served, work)

    def test_headers(self, folder: Path):
        async def work(client: aiohttp.ClientSession) -> None:
            for path in ("/thaw", "/thaw/static/app.js", "/thaw/static/style.css", "/thaw/session"):
                async with client.get(path) as answer:
                    policy = answer.headers["Content-Security-Policy"]
                    parts = dict(part.split(" ", 1) for part in policy.split("; "))
                    assert parts == {
                        "default-src": "'none'",
                        "script-src": "'self'",
                        "style-src": "'self'",
                        "connect-src": "'self'",
                        "img-src": "'self' data:",
                        "form-action": "'self'",
                        "frame-ancestors": "'none'",
                        "base-uri": "'none'",
                    }
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
                    assert answer.headers["Referrer-Policy"] == "no-referrer"

        play(Served(folder, Model("a", "/m")), work)

    def test_all_that_a_page_names_is_there_and_nothing_is_elsewhere(self, folder: Path):
        files = {path.name: path.read_text() for path in Path(subject.__file__).with_name("page").iterdir()}
        for name, text in files.items():
            assert name == "icon.svg" or "//" not in re.sub(r"(?m)(^|\s)//.*|http://www.w3.org/\S+", "", text), name
            assert "innerHTML" not in text and "<style" not in text and not re.search(r"<script(?! type=.*src=)", text)
            assert not re.search(r"\son\w+=|\sstyle=", text) and len(text.splitlines()) < 400
        named = {
            *re.findall(r'"thaw/static/([^"]+)"', files["index.html"] + files["login.html"]),
            *re.findall(r'from "\./([^"]+)"', "".join(files.values())),
        }
        assert named == files.keys() - {"index.html", "login.html"}

        async def work(client: aiohttp.ClientSession) -> None:
            for name in named:
                async with client.get(f"/thaw/static/{name}") as answer:
                    assert await answer.text() == files[name]
                    assert answer.headers["Cache-Control"] == "no-cache"
                    tag = answer.headers["ETag"]
                async with client.get(f"/thaw/static/{name}", headers={"If-None-Match": tag}) as answer:
                    assert answer.status == 304

        play(Served(folder, Model("a", "/m")), work)

    @pytest.mark.parametrize(
        "name",
        [
            "../page.py",
            "..%2fpage.py",
            "%2e%2e/page.py",
            "/etc/passwd",
            "%2fetc%2fpasswd",
            "..\\page.py",
            "index.html",
            "",
        ],
    )
    def test_no_other_file(self, folder: Path, name: str):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(f"GET /thaw/static/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 404 ") and b"import" not in answer
            writer.close()

        play(served, work)

    def test_not_in_the_description_of_the_api(self, folder: Path):
        async def work(client: aiohttp.ClientSession) -> None:
            async with client.get("/openapi.json") as answer:
                paths = (await answer.json())["paths"]
            assert {"/v1/thaw/usage", "/v1/thaw/starts", "/v1/thaw/verify", "/v1/thaw/kv"} <= paths.keys()
            assert not [path for path in paths if path.startswith("/thaw")]

        play(Served(folder, Model("a", "/m")), work)


class TestLogin:
    def test_the_cookie(self, folder: Path):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            status, told, cookie = await log_in(client, served)
            assert status == 200 and told["in"] and 0 < told["seconds"] <= LIFETIME
            pair, *attributes = cookie.split("; ")
            assert pair.startswith(f"thaw_session_{served.port}=") and TOKEN not in cookie and len(pair) > 43
            assert {*attributes} == {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={int(LIFETIME)}"}
            # Behind a proxy that speaks TLS.
            https = {"X-Forwarded-Proto": "https", "Origin": served.url.replace("http:", "https:")}
            _, _, cookie = await log_in(client, served, **https)
            assert "Secure" in cookie.split("; ")

        play(served, work)

    def test_whether_one_is_in_is_no_error(self, folder: Path):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async def told(**headers: str) -> Any:
                async with client.get("/thaw/session", headers=headers) as answer:
                    assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store"
                    return await answer.json()

            before = await told()
            assert before["in"] is False and before["version"] == thaw_vllm.__version__
            after = await told(**await logged_in(client, served))
            assert after["in"] is True and after["server"] == before["server"]

        play(served, work)

    def test_another_token(self, folder: Path, caplog: pytest.LogCaptureFixture):
        served = Served(folder, Model("a", "/m"), api_keys=["key of an ordinary user"])

        async def work(client: aiohttp.ClientSession) -> None:
            for bad in ("", "another", TOKEN[:-1], "ü", "key of an ordinary user"):
                status, told, cookie = await log_in(client, served, bad)
                assert status == 403 and not cookie and "not the admin token" in told["error"]["message"]
            status, told, cookie = await log_in(client, served)  # the right one, but too late
            assert status == 429 and not cookie and "try again in" in told["error"]["message"]
            async with client.get("/v1/thaw/status", headers=ADMIN) as answer:
                assert answer.status == 200, "the header goes on working"

        with caplog.at_level(logging.WARNING, "thaw.serve"):
            play(served, work)
        assert caplog.text.count("a login to the page was refused, from 127.0.0.1") == EACH + 1

    @pytest.mark.parametrize(
        ("body", "kind", "status"),
        [
            (b'{"token": 1}', "application/json", 400),
            (b"[" * 4000, "application/json", 400),
            (b"\xff", "application/json", 400),
            (b'{"token": "' + b"x" * 70_000 + b'"}', "application/json", 413),
            (f"token={TOKEN}".encode(), "application/x-www-form-urlencoded", 415),
            (json.dumps({"token": TOKEN}).encode(), "text/plain", 415),
        ],
    )
    def test_bodies(self, folder: Path, body: bytes, kind: str, status: int):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            headers = {"Origin": served.url, "Content-Type": kind}
            async with client.post("/thaw/login", data=body, headers=headers) as answer:
                assert answer.status == status and "Set-Cookie" not in answer.headers

        play(served, work)

    def test_logging_out(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(app_module, "ALIVE", 0.05)
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            mine, others = await logged_in(client, served), await logged_in(client, served)
            events = await client.get("/v1/thaw/events?after=0", headers=mine)
            assert events.status == 200 and await events.content.readline() == b": \n"
            async with client.post("/thaw/logout", headers={"Cookie": mine["Cookie"]}) as answer:
                assert answer.status == 403, "another site could send that"
            async with client.post("/thaw/logout", headers=mine) as answer:
                assert answer.status == 200 and (await answer.json())["in"] is False
                assert "Max-Age=0" in answer.headers["Set-Cookie"]
            await asyncio.wait_for(events.read(), 5)
            for headers, status in ((mine, 403), (others, 200)):
                async with client.get("/v1/thaw/status", headers=headers) as answer:
                    assert answer.status == status

        play(served, work)


class TestAccess:
    def test_what_a_session_may(self, folder: Path):
        store = Store(folder / "sessions", create=True)
        save(store, session(range(9), labels=["trunk"]))
        directories = {"kv_directory": str(folder), "sessions_directory": str(store.directory)}
        served = Served(folder, Model("a", "/m"), given={"parkable": True}, **directories)

        async def work(client: aiohttp.ClientSession) -> None:
            headers = await logged_in(client, served)
            reading = ("status", "models", "usage", "starts", "snapshots", "kv", "verify", "sessions")
            for path in (*reading, "sessions/diff?a=trunk&b=trunk&tokens=1"):
                async with client.get(f"/v1/thaw/{path}", headers=headers) as answer:
                    assert answer.status == 200 and answer.headers["Cache-Control"] == "no-store", path
            for path in ("load", "park", "unload"):
                async with client.post(f"/v1/thaw/models/a/{path}", headers=headers) as answer:
                    assert answer.status == 200, await answer.text()
            # These are for whoever has the token itself.
            of_servers = ("kv/freeze", "kv/restore", "sessions/checkpoint", "sessions/checkout")
            for path in ("models", *(f"models/a/{path}" for path in of_servers)):
                async with client.post(f"/v1/thaw/{path}", json={"name": "b", "path": "b"}, headers=headers) as answer:
                    assert answer.status == 403, path

        play(served, work)

    @pytest.mark.parametrize(
        ("headers", "reads", "writes"),
        [
            ({}, 200, 200),
            ({"Origin": None}, 200, 403),
            ({"Origin": "http://evil.example"}, 403, 403),
            ({"Origin": "null"}, 403, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 200, 200),
            ({"Sec-Fetch-Site": "none", "Origin": None}, 200, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403, 403),
            ({"Sec-Fetch-Site": "cross-site", "Origin": None}, 403, 403),
            ({"Host": "evil.example", "Origin": "http://evil.example"}, 403, 403),
            ({"Cookie": None}, 403, 403),
            ({"Cookie": "thaw_session=x"}, 403, 403),
            ({"Cookie": None, "Authorization": "Bearer key"}, 403, 403),
            ({"X-Thaw-Admin-Token": "another"}, 403, 403),
        ],
    )
    def test_from_where(self, folder: Path, headers: dict[str, str | None], reads: int, writes: int):
        served = Served(folder, Model("a", "/m"), api_keys=["key"])

        async def work(client: aiohttp.ClientSession) -> None:
            mine: dict[str, str | None] = {**await logged_in(client, served)}
            if headers.get("Host"):  # a cookie that such a page would have been given
                mine["Cookie"] = f"thaw_session={(mine['Cookie'] or '').partition('=')[2]}"
            sent = {name: value for name, value in (mine | headers).items() if value is not None}
            async with client.get("/v1/thaw/status", headers=sent) as answer:
                assert answer.status == reads
            async with client.get("/v1/thaw/events?after=0", headers=sent) as answer:
                assert answer.status == reads
            async with client.post("/v1/thaw/models/a/load", headers=sent) as answer:
                assert answer.status == writes

        play(served, work)
        assert bool(served.engines) == (writes == 200)

    def test_names_that_lead_here(self, folder: Path):
        served = Served(folder, Model("a", "/m"), hosts=["box"])

        async def work(client: aiohttp.ClientSession) -> None:
            for path in ("/thaw", "/thaw/session", "/thaw/static/app.js"):
                for host, status in (("evil.example", 403), ("[", 403), ("box", 200), ("localhost:1", 200)):
                    async with client.get(path, headers={"Host": host}) as answer:
                        assert answer.status == status, (path, host)
            status, _, cookie = await log_in(client, served, Host="evil.example", Origin="http://evil.example")
            assert status == 403 and not cookie
            for origin in ("http://evil.example", "null"):
                status, _, cookie = await log_in(client, served, Origin=origin)
                assert status == 403 and not cookie

        play(served, work)

    def test_engines_do_not_see_the_cookie(self, folder: Path):
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/x", json={"model": "a"}, headers=await logged_in(client, served)) as answer:
                assert answer.status == 200
            (asked,) = served.engines[0].requests
            assert b"cookie" not in dict(asked["headers"])

        play(served, work)


class TestShown:
    def test_usage(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(usage, "FRESH", 0.0)
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async def asked() -> Any:
                async with client.get("/v1/thaw/usage", headers=ADMIN) as answer:
                    return (await answer.json())["engines"]

            assert await asked() == []
            async with client.post("/v1/thaw/models/a/load", headers=ADMIN):
                pass
            (engine,) = served.engines
            assert await asked() == [{"model": "a", "engine": engine.pid}]
            engine.counted = {"vllm:prompt_tokens_total": 7, "vllm:prefix_cache_hits_total": 3, "vllm:other_total": 1}
            (found,) = await asked()
            assert (found["prompt_tokens"], found["prefix_hits"]) == (7, 3) and "other" not in found
            engine.counted = {"vllm:kv_cache_usage_perc": math.nan, "vllm:prompt_tokens_total": 7}
            (found,) = await asked()
            assert found["prompt_tokens"] == 7 and "kv_cache_usage" not in found

        play(served, work)

    def test_many_who_look_ask_engines_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(usage, "FRESH", 60.0)
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/thaw/models/a/load", headers=ADMIN):
                pass
            await asyncio.gather(*(client.get("/v1/thaw/usage", headers=ADMIN) for _ in range(20)))
            assert [asked["path"] for asked in served.engines[0].requests] == [b"/metrics"]

        play(served, work)

    def test_starts(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(state.VARIABLE, str(folder / "state"))
        served = Served(folder, Model("a", "/m"))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/thaw/models/a/load", headers=ADMIN):
                pass
            pid = served.engines[0].pid
            async with client.get("/v1/thaw/starts", headers=ADMIN) as answer:
                (found,) = (await answer.json())["starts"]
            assert (found["model"], found["engine"]) == ("a", pid) and "phases" not in found
            written = folder / "state" / "starts" / f"20260101-000000-{pid}"
            written.mkdir(parents=True)
            line = {"pid": pid, "parent": 1, "name": "MainProcess", "created": 1.0}
            events = [("config", 1.0, 1.5), ("first token", 9.5, 10.0)]
            text = "".join(json.dumps(line | {"phase": p, "begin": b, "end": e}) + "\n" for p, b, e in events)
            (written / f"{pid}.jsonl").write_text(text)
            for _ in range(2):
                async with client.get("/v1/thaw/starts", headers=ADMIN) as answer:
                    (found,) = (await answer.json())["starts"]
                assert (found["total"], found["waited"], found["first_token"]) == (1.0, 8.0, True)
                assert [phase["phase"] for phase in found["phases"]] == ["config", "first token"]

        play(served, work)

    def test_phases_leave_out_the_time_until_somebody_asked(self):
        spans = [("config", 0.0, 1.0), ("graphs", 1.0, 3.0), ("first token", 103.0, 103.5)]
        made = report([Event(1, 0, "", 0.0, *span) for span in spans])
        found = starts.phases(made)
        assert (found["total"], found["waited"]) == (3.5, 100.0)
        assert [(p["phase"], p["begin"], p["end"]) for p in found["phases"]] == [
            ("config", 0.0, 1.0),
            ("graphs", 1.0, 3.0),
            ("first token", 3.0, 3.5),
        ]


@pytest.fixture
def snapshot(folder: Path) -> Path:
    (folder / "w").mkdir()
    path = folder / "w" / "own.thaw"
    thaw_vllm.freeze_model(torch.nn.Linear(64, 64), path)
    return path


class TestSnapshots:
    def test_names_that_are_not_utf8(self, folder: Path):
        for ending in ("thaw", "thawkv"):
            (folder / os.fsdecode(f"\xff.{ending}".encode("latin-1"))).write_bytes(b"none")
        served = Served(folder, Model("a", "/m"), directories=[str(folder)], kv_directory=str(folder))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.get("/v1/thaw/snapshots", headers=ADMIN) as answer:
                assert [one["path"] for one in (await answer.json())["snapshots"]] == ["\\xff.thaw"]
            async with client.get("/v1/thaw/kv", headers=ADMIN) as answer:
                assert [one["name"] for one in (await answer.json())["files"]] == ["\\xff.thawkv"]

        play(served, work)

    def test_listed_and_verified(self, folder: Path, snapshot: Path):
        other = folder / "dir" / "other.thaw"
        other.parent.mkdir()
        other.write_bytes(snapshot.read_bytes())
        damaged = bytearray(snapshot.read_bytes())
        damaged[-100] ^= 1
        (other.parent / "damaged.thaw").write_bytes(damaged)
        models = [Model("a", "/m", snapshot=str(snapshot)), Model("b", "/m", snapshot=str(other)), Model("c", "/m")]
        served = Served(folder, *models, directories=[str(other.parent)], kv_directory=str(folder))

        async def work(client: aiohttp.ClientSession) -> None:
            headers = await logged_in(client, served)

            async def get(path: str) -> Any:
                async with client.get(f"/v1/thaw/{path}", headers=headers) as answer:
                    return await answer.json()

            async def verify(**what: str) -> tuple[int, Any]:
                async with client.post("/v1/thaw/verify", json=what, headers=headers) as answer:
                    return answer.status, await answer.json()

            async def result() -> Any:
                while (found := await get("verify"))["running"]:
                    await asyncio.sleep(0.05)
                return found["results"][-1]

            found = {one["path"]: one for one in (await get("snapshots"))["snapshots"]}
            assert {name: (one["what"], one["models"]) for name, one in found.items()} == {
                "damaged.thaw": ({"path": "damaged.thaw"}, []),
                "other.thaw": ({"path": "other.thaw"}, ["b"]),
                "own.thaw": ({"model": "a"}, ["a"]),
            }
            assert found["own.thaw"]["bytes"] == 64 * 65 * 4
            status, told = await verify(model="a")
            assert status == 202 and told["running"]["what"] == {"model": "a"}
            status, told = await verify(path="other.thaw")
            assert status == 409 and "is being verified" in told["error"]["message"]
            sound = await result()
            assert sound["what"] == {"model": "a"} and sound["content"] == found["own.thaw"]["content"]
            assert sound["bytes"] == snapshot.stat().st_size and "error" not in sound
            assert (await verify(path="damaged.thaw"))[0] == 202
            assert "damaged" in (await result())["error"]
            assert [one["event"] for one in map(lambda e: e.document(), served.pool.events.last)] == [
                *("verifying", "verified", "verifying", "verification failed")
            ]
            for what, status in (
                ({"path": "../w/own.thaw"}, 400),
                ({"path": str(snapshot)}, 400),
                ({"path": "none.thaw"}, 404),
                ({"model": "none"}, 404),
                ({"model": "c"}, 409),
                ({"kv": "../x.thawkv"}, 409),
                ({"kv": "none.thawkv"}, 404),
                ({}, 409),
                ({"file": "other.thaw"}, 400),
                ({"model": "a", "path": "other.thaw"}, 409),
            ):
                assert (await verify(**what))[0] == status, what

        play(served, work)

    def test_a_process_that_nobody_understands(self, folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch):
        program = folder / "noise.py"
        program.write_text("import time; print('no JSON', flush=True); time.sleep(60)")
        monkeypatch.setattr(verification, "__name__", "noise")
        monkeypatch.setenv("PYTHONPATH", str(folder))
        served = Served(folder, Model("a", "/m", snapshot=str(snapshot)))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/thaw/verify", json={"model": "a"}, headers=ADMIN) as answer:
                assert answer.status == 202
            while (last := served.pool.events.last[-1]).what != "verification failed":
                await asyncio.sleep(0.01)
            assert "is not understood" in last.more["why"]

        play(served, work)

    def test_cancelled(self, folder: Path, snapshot: Path):
        served = Served(folder, Model("a", "/m", snapshot=str(snapshot)))

        async def work(client: aiohttp.ClientSession) -> None:
            async with client.post("/v1/thaw/verify", json={"model": "a"}, headers=ADMIN) as answer:
                assert answer.status == 202
            async with client.post("/v1/thaw/verify/cancel", headers=ADMIN) as answer:
                assert await answer.json() == {"running": None, "results": []}
            assert served.pool.events.last[-1].what == "verification cancelled"
            async with client.post("/v1/thaw/verify", json={"model": "a"}, headers=ADMIN) as answer:
                assert answer.status == 202  # and the server stops in the middle of it

        play(served, work)

    def test_files_of_kv_blocks(self, folder: Path):
        (folder / "bad.thawkv").write_bytes(b"none")
        (folder / ".hidden.thawkv").write_bytes(b"none")
        (folder / "link.thawkv").symlink_to("/etc/passwd")

        async def listed(directory: str | None) -> Any:
            served = Served(folder, Model("a", "/m"), kv_directory=directory)
            async with served.running() as client, client.get("/v1/thaw/kv", headers=ADMIN) as answer:
                found = await answer.json()
                async with client.post("/v1/thaw/verify", json={"kv": "link.thawkv"}, headers=ADMIN) as answer:
                    assert answer.status == (404 if directory == str(folder) else answer.status)
                return found

        found = asyncio.run(listed(str(folder)))
        assert [one["name"] for one in found["files"]] == ["bad.thawkv", "link.thawkv"] and found["directory"]
        assert all("error" in one for one in found["files"])
        for directory in (None, str(folder / "none")):
            assert asyncio.run(listed(directory)) == {"directory": False, "files": []}
