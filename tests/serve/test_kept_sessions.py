"""What a pool tells of the sessions that its engines keep, and what it does not."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.serve.served import TOKEN, Served
from tests.sessions.made import MODEL, SIZE, context, save, session

from thaw_vllm.errors import FormatError, ThawError, UnknownSessionError, UsageError
from thaw_vllm.serve import kept_sessions
from thaw_vllm.serve.app import _told
from thaw_vllm.serve.config import Model
from thaw_vllm.sessions.diff import difference
from thaw_vllm.sessions.record import MAX_HEAD
from thaw_vllm.sessions.store import Store

ADMIN = {"X-Thaw-Admin-Token": TOKEN}
PAGE = context().page


@pytest.fixture
def store(memory_path: Path) -> Store:
    return Store(memory_path / "secret place", create=True)


@pytest.fixture
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, Any]]]:
    """``ask(directory, path, …)``: statuses and documents of a pool whose engines have their store there."""

    def asked(directory: Path | None, *paths: str) -> list[tuple[int, Any]]:
        async def work(client: aiohttp.ClientSession) -> list[tuple[int, Any]]:
            return [await got(client, path) for path in paths]

        return played(tmp_path_factory.mktemp("s"), directory, work)

    return asked


def played(folder: Path, directory: Path | None, work: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        given = None if directory is None else str(directory)
        async with Served(folder, Model("a", "/m"), sessions_directory=given).running() as client:
            return await asyncio.wait_for(work(client), 60)

    return asyncio.run(run())


async def got(client: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with client.get(f"/v1/thaw/{path}", headers=ADMIN) as answer:
        return answer.status, await answer.json()


def test_without_a_store(ask: Any, tmp_path: Path):
    for directory, there in ((None, False), (tmp_path / "none", False), (tmp_path, True)):
        (status, told), refused = ask(directory, "sessions", "sessions/diff?a=trunk&b=plan")
        expected = {"directory": there, "sessions": [], "broken": {}, "left_out": 0}
        assert status == 200 and told == expected | {"time": told["time"]}
        assert refused[0] == 404 and "--sessions-dir" in refused[1]["error"]["message"]
    assert [*tmp_path.iterdir()] == []


def test_the_tree(ask: Any, store: Store):
    more = {"salt": "pepper", "sampling": {"stop": ["a stop word"]}, "source": "/home/me/model"}
    trunk, _ = save(store, session(range(12), created=5.0, labels=["trunk"], prompt=8, finished="stop", **more))
    late = session([*range(9), *range(90, 99)], created=7.0, parent=trunk, fork=9, salt="pepper")
    late_id, _ = save(store, late)
    early, _ = save(store, session([*range(5), 77], created=6.0, parent=trunk, fork=5))
    other, _ = save(store, session([1], created=1.0, expires=3.0))
    store.pin(early)
    ((status, told),) = ask(store.directory, "sessions")
    assert status == 200 and told["directory"] and told["broken"] == {} and told["left_out"] == 0
    found = {one["id"]: one for one in told["sessions"]}
    assert [(one["id"], one["depth"]) for one in told["sessions"]] == [(other, 0), (trunk, 0), (early, 1), (late_id, 1)]
    assert found[trunk] == {
        "id": trunk,
        "parent": None,
        "fork": None,
        "depth": 0,
        "tokens": 12,
        "prompt": 8,
        "block_size": SIZE,
        "blocks": 3,
        "model": MODEL,
        "labels": ["trunk"],
        "finished": "stop",
        "created": 5.0,
        "used": store.record(trunk).stat().st_mtime,
        "pinned": False,
        "expires": None,
        "bytes": 3 * PAGE,
        "shared_bytes": 0,
    }
    assert found[other]["expires"] == 3.0
    assert (found[late_id]["parent"], found[late_id]["fork"], found[late_id]["tokens"]) == (trunk, 9, 18)
    shared = difference(store, store.read(trunk), store.read(late_id)).shared_bytes
    assert (found[late_id]["bytes"], found[late_id]["shared_bytes"]) == (4 * PAGE, shared) and shared == 2 * PAGE
    assert found[early]["pinned"] and found[early]["shared_bytes"] == 0  # of another salt
    text = json.dumps(told)
    assert not [word for word in ("pepper", "stop word", "/home", "secret place", "nonce") if word in text]


def test_what_is_damaged_is_named_and_the_rest_is_shown(ask: Any, store: Store):
    good, _ = save(store, session(range(9), created=1.0))
    bad, _ = save(store, session(range(8)))
    cut, _ = save(store, session(range(7)))
    gone = context(config="d" * 64)
    lost, _ = save(store, session(range(9), created=2.0, contexts=[gone]), [gone])
    store.record(bad).write_bytes(b"x")
    os.truncate(store.record(cut), 100)
    store.remove_context(gone.id)
    (status, told), *refused = ask(store.directory, "sessions", *(f"sessions/diff?a={good}&b={b}" for b in (bad, lost)))
    assert status == 200 and [one["id"] for one in told["sessions"]] == [good, lost]
    assert told["sessions"][0]["bytes"] == 2 * PAGE and "error" not in told["sessions"][0]
    assert "bytes" not in told["sessions"][1] and f"'{gone.id}.json' cannot be read" in told["sessions"][1]["error"]
    assert told["broken"].keys() == {bad, cut}
    assert told["broken"][bad] == f"'{bad}.session' is no record of a session"
    assert [status for status, _ in refused] == [422, 404]
    assert f"'{bad}.session' is damaged" in refused[0][1]["error"]["message"]
    assert "secret place" not in json.dumps([told, refused])


def test_of_many_those_that_were_used_last(ask: Any, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_sessions, "MOST", 3)
    ids = [save(store, session(range(9), created=float(at)))[0] for at in range(6)]
    child, _ = save(store, session(range(9), created=9.0, parent=ids[1], fork=9))
    store.record(ids[0]).write_bytes(b"x")  # which is not opened
    for at, id_ in enumerate([*ids, child]):
        os.utime(store.record(id_), (at, at))
    store.touch(ids[2])
    ((_, told),) = ask(store.directory, "sessions")
    assert [one["id"] for one in told["sessions"]] == [ids[2], ids[5], child]
    assert (told["broken"], told["left_out"]) == ({}, 4)
    assert (told["sessions"][2]["parent"], told["sessions"][2]["depth"]) == (ids[1], 0)
    assert told["sessions"][2]["bytes"] == 2 * PAGE and told["sessions"][2]["shared_bytes"] is None


def test_two_compared(ask: Any, store: Store):
    a, _ = save(store, session(range(13), labels=["trunk"]))
    b, _ = save(store, session([*range(9), 99, 98, 97], parent=a, fork=9, labels=["plan b"]))
    paths = [
        f"sessions/diff?a={a}&b={b}",
        "sessions/diff?a=trunk&b=plan%20b&tokens=2",
        f"sessions/diff?a={b[:9]}&b=trunk&tokens=100",
        "sessions/diff?a=trunk&b=trunk&tokens=3",
    ]
    plain, some, all_, same = (told for status, told in ask(store.directory, *paths) if status == 200)
    found = difference(store, store.read(a), store.read(b))
    assert plain == json.loads(json.dumps({"a": a, "b": b, "first_difference": 9} | asdict(found)))
    assert (plain["shared_blocks"], plain["own_blocks"], plain["own_bytes"]) == (2, [1, 1], [PAGE, PAGE])
    assert some == plain | {"token_ids": {"from": 7, "common": [7, 8], "a": [9, 10], "b": [99, 98]}}
    assert (all_["a"], all_["b"]) == (b, a)
    assert all_["token_ids"] == {"from": 0, "common": [*range(9)], "a": [99, 98, 97], "b": [9, 10, 11, 12]}
    assert same["first_difference"] is None
    assert same["token_ids"] == {
        "from": 10,
        "common": [10, 11, 12],
        "a": [],
        "b": [],
    }


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("a=trunk&b=none", 404, "there is no session 'none' in the server's store"),
        ("a=twice&b=trunk", 409, "means 2 sessions"),
        ("a=../x&b=trunk", 404, "there is no session '../x'"),
        ("a=trunk", 400, "b: "),
        ("a=&b=trunk", 400, "a: "),
        ("a=trunk&b=trunk&tokens=101", 400, "tokens: "),
        ("a=trunk&b=trunk&tokens=-1", 400, "tokens: "),
        ("a=trunk&b=trunk&tokens=all", 400, "tokens: "),
    ],
)
def test_what_is_refused(ask: Any, store: Store, query: str, status: int, said: str):
    for labels in (["trunk"], ["twice"], ["twice"]):
        save(store, session([1, 2], labels=labels))
    ((found, told),) = ask(store.directory, f"sessions/diff?{query}")
    assert found == status and said in told["error"]["message"] and "secret place" not in str(told)


def test_a_store_that_is_none_of_ours(ask: Any, store: Store):
    save(store, session([1], labels=["trunk"]))
    store.directory.chmod(0o777)
    told = ask(store.directory, "sessions", "sessions/diff?a=trunk&b=trunk")
    assert [status for status, _ in told] == [404, 404] and "others may write to the server's store" in str(told)
    store.directory.chmod(0o700)
    (store.directory / "store.json").write_text('{"holds": "sessions", "version": 2}')
    told = ask(store.directory, "sessions", "sessions/diff?a=trunk&b=trunk")
    assert [status for status, _ in told] == [422, 422] and "is of version 2" in str(told)


def test_what_other_routes_refuse_is_as_it_was():
    assert [status_of(kind) for kind in (FormatError, UsageError, UnknownSessionError)] == [503, 409, 404]


def status_of(kind: type[ThawError]) -> int:
    return asyncio.run(_told(None, kind("enough"))).status_code  # type: ignore[arg-type]


def test_records_are_read_once(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    """However often labels are asked for; what is removed, added, damaged or forbidden meanwhile is seen."""
    opened: list[str] = []

    def counting(self: Store, ids: Any) -> Any:
        opened.extend(ids)
        return listed(self, ids)

    listed = Store._listed
    monkeypatch.setattr(Store, "_listed", counting)
    ids = {label: save(store, session([1, 2, len(label)], labels=[label]))[0] for label in ("trunk", "plan")}

    async def work(client: aiohttp.ClientSession) -> None:
        async def answer(a: str, b: str) -> int:
            status, _ = await got(client, f"sessions/diff?a={a}&b={b}")
            return status

        assert [await answer("trunk", "plan") for _ in range(3)] == [200] * 3
        assert sorted(opened) == sorted(ids.values())
        ids["new"] = save(store, session([7], labels=["new"]))[0]
        assert await answer("trunk", "new") == 200
        assert opened[2:] == [ids["new"]]
        store.remove(ids["plan"])
        assert await answer("trunk", "plan") == 404
        store.directory.chmod(0o777)
        assert await answer("trunk", "new") == 404
        store.directory.chmod(0o700)
        assert await answer("trunk", "new") == 200
        store.remove_context(context().id)
        assert await answer("trunk", "new") == 404
        away = store.directory.rename(store.directory.with_name("away"))
        assert await answer("trunk", "new") == 404
        other = Store(store.directory, create=True)
        save(other, session([3], labels=["other"]))
        assert [await answer("other", "other"), await answer("trunk", "new")] == [200, 404]
        assert away.is_dir()

    played(tmp_path, store.directory, work)


def test_a_session_too_long_to_be_compared(ask: Any, store: Store, monkeypatch: pytest.MonkeyPatch):
    """The event loop would wait for it; of a record that long nothing is read."""
    monkeypatch.setattr(kept_sessions, "LONGEST", 8)
    save(store, session(range(8), labels=["eight"]))
    save(store, session(range(9), labels=["nine"]))
    longer, _ = save(store, session(range(10)))
    os.truncate(store.record(longer), MAX_HEAD + 4 * 8 + 1)
    good, *long = ask(store.directory, *(f"sessions/diff?a=eight&b={b}" for b in ("eight", "nine", longer)))
    assert good[0] == 200
    for status, told in long:
        assert status == 409 and "more than 8 tokens; thaw diff compares" in told["error"]["message"]


def test_reading_keeps_nobody_waiting(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    save(store, session([1], labels=["trunk"]))
    go_on, reading = threading.Event(), 0

    def slow(self: Store, *given: Any) -> Any:
        nonlocal reading
        reading += 1
        assert go_on.wait(30)
        raise kept_sessions.UsageError("enough")

    monkeypatch.setattr(Store, "latest", slow)
    monkeypatch.setattr(Store, "find", slow)

    async def work(client: aiohttp.ClientSession) -> list[int]:
        paths = ("sessions", "sessions/diff?a=x&b=y", "sessions")
        asking = [asyncio.create_task(got(client, path)) for path in paths]
        try:
            await asyncio.sleep(0.3)
            assert reading == 1 and not any(task.done() for task in asking)
            assert (await asyncio.wait_for(got(client, "status"), 10))[0] == 200
        finally:
            go_on.set()
        return [status for status, _ in await asyncio.gather(*asking)]

    assert played(tmp_path, store.directory, work) == [409, 409, 409]
