"""The page of a pool in a real browser: what an operator sees and does; the engines behind it are stand-ins."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serve.chromium import Heard, browser
from tests.serve.in_thread import InThread, in_thread
from tests.serve.served import TOKEN, Served
from tests.sessions.made import context, save, session

import thaw_vllm
from thaw_vllm.errors import ThawError
from thaw_vllm.serve import app as app_module
from thaw_vllm.serve import kept_sessions, sessions, state, usage
from thaw_vllm.serve.config import Model
from thaw_vllm.sessions.store import Store

pytestmark = pytest.mark.slow

CONTRAST = """() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = numbers(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest(".hidden-text, .skip, script, noscript")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(numbers(node.closest("svg") ? style.fill : style.color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const text = `${node.tagName} ${node.className} ${node.textContent.slice(0, 30)}`;
    if (ratio < 4.5) found.push(`${text}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""
"""Texts with less contrast to what is behind them than WCAG's level AA asks for."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path_factory.mktemp("s")  # sockets want short paths
    monkeypatch.setenv(state.VARIABLE, str(made / "state"))
    monkeypatch.setattr(usage, "FRESH", 0.2)
    monkeypatch.setattr(app_module, "ALIVE", 0.5)
    return made


@contextlib.contextmanager
def opened(chromium: Any, served: Served, log_in: bool = True, port: int = 0, **options: Any) -> Iterator[Any]:
    """The server, a page that is logged in, and what it has logged; errors fail the test."""
    heard = Heard()
    served.grace = 1
    with in_thread(served, port) as running:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        try:
            page = heard.listen(context.new_page())
            page.set_default_timeout(20_000)
            page.goto(f"{served.url}/thaw")
            if log_in:
                page.get_by_label("Admin token").fill(TOKEN)
                page.keyboard.press("Enter")
                live(page)
            yield page, running, heard
        finally:
            context.close()
    assert heard.errors == [] and heard.hosts == {"127.0.0.1"}


def live(page: Any) -> None:
    page.locator("#connection[data-state=live]").wait_for()


def row(page: Any, name: str) -> Any:
    return page.locator("#models tbody tr").filter(has=page.get_by_text(name, exact=True))


def is_in(page: Any, name: str, what: str) -> None:
    row(page, name).locator(".badge").filter(has_text=what).first.wait_for()


def told(page: Any, text: str) -> None:
    page.locator("#activity li").filter(has_text=text).first.wait_for()


def ask(running: InThread, name: str, **more: Any) -> threading.Thread:
    return running.post_soon("/v1/completions", {"model": name, **more})


def test_a_keyboard_is_enough(chromium: Any, folder: Path):
    """Logging in, loading, parking, waking, unloading, logging out; the token stays nowhere."""
    served = Served(folder, Model("org/a", "/m"), given={"seconds": 1.0, "parkable": True})
    with opened(chromium, served, log_in=False) as (page, _, _heard):
        assert page.get_by_role("heading", name="Models").count() == 0
        page.keyboard.type(TOKEN)  # the field has the focus
        page.keyboard.press("Enter")
        live(page)

        def reach(name: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                focused = "document.activeElement.ariaLabel || document.activeElement.textContent"
                if page.evaluate(focused).strip() == name:
                    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                    return
            raise AssertionError(f"{name} cannot be reached")

        is_in(page, "org/a", "not there")
        for button, during, after in (
            ("Load", "starting", "ready"),
            ("Park", "parking", "parked"),
            ("Load", "waking", "ready"),
            ("Unload", "", "not there"),
        ):
            reach(f"{button} org/a")
            page.keyboard.press("Enter")
            is_in(page, "org/a", during)
            is_in(page, "org/a", after)
            assert page.evaluate("document.activeElement.ariaLabel") == f"{button} org/a"
        for text in ("is starting", "is parking", "is awake", "is stopped"):
            told(page, text)
        held = "JSON.stringify([localStorage, sessionStorage, document.cookie, document.documentElement.outerHTML])"
        assert TOKEN not in page.evaluate(held) and TOKEN not in page.url and page.evaluate("document.cookie") == ""
        (cookie,) = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and TOKEN not in cookie["value"]
        reach("Log out")
        page.keyboard.press("Enter")
        page.get_by_label("Admin token").wait_for()
        assert page.locator("#models").count() == 0 and page.context.cookies() == []
    assert [what for what, _ in served.log] == ["start", "park", "wake", "stop"]


def test_a_wrong_token(chromium: Any, folder: Path):
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served, log_in=False) as (page, _, heard):
        page.keyboard.type("a wrong one")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text="this is not the admin token").wait_for()
        page.keyboard.type(TOKEN)  # what was wrong is selected
        page.keyboard.press("Enter")
        live(page)
        assert [error for error in heard.errors if "403" not in error] == []
        heard.errors.clear()


def test_requests_make_models_come_and_go(chromium: Any, folder: Path):
    """From starting to ready, another's weights swapped in, who waits and what is in flight."""
    served = Served(folder, Model("a", "/m"), Model("b", "/m"), given={"seconds": 1.2, "swappable": True})
    with opened(chromium, served) as (page, running, _):
        page.get_by_text("0 of 2 models ready, 0 engines").wait_for()
        ask(running, "a")
        is_in(page, "a", "starting")
        row(page, "a").locator("[data-label=Waiting]").filter(has_text="1").wait_for()
        is_in(page, "a", "ready")
        page.get_by_text("1 of 2 models ready, 1 engine").wait_for()
        page.locator("#said").filter(has_text="a is ready, started in").wait_for(state="attached")
        ask(running, "b")
        is_in(page, "b", "swapping from a")
        is_in(page, "b", "ready")
        is_in(page, "a", "not there")
        told(page, "b is taking the place of a")
        told(page, "b is ready, swapped in")
        asking = ask(running, "b", chunks=["x"] * 1000, pause=0.02)
        row(page, "b").locator("[data-label='In flight']").filter(has_text="1").wait_for()
        page.get_by_role("button", name="Unload b").click()
        dialog = page.get_by_role("dialog")
        dialog.filter(has_text="It has 1 request.").wait_for()
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        page.wait_for_timeout(300)
        is_in(page, "b", "ready")
        assert asking.is_alive()


def test_a_start_that_fails_is_told_as_text(chromium: Any, folder: Path):
    why = "<img src=x onerror=alert(1)> no memory"
    served = Served(folder, Model("a", "/m"), Model("b", "/m"), given={"faults": {"start": ThawError(why)}})
    with opened(chromium, served) as (page, running, _):
        ask(running, "a")
        is_in(page, "a", "failed")
        assert row(page, "a").locator(".why").text_content() == why
        told(page, why)
        is_in(page, "b", "not there")


def test_the_server_is_started_anew(chromium: Any, folder: Path):
    """The page says that it is gone, tries again, asks who one is, and goes on where it was."""
    first, again = folder / "1", folder / "2"
    first.mkdir()
    again.mkdir()
    models = [Model(f"m{number}", "/m", share=0.1) for number in range(12)]
    served = Served(first, *models)
    with opened(chromium, served, viewport={"width": 800, "height": 600}) as (page, running, heard):
        running.post("/v1/thaw/models/m3/load")
        is_in(page, "m3", "ready")
        summary = page.locator("#starts summary").first
        summary.wait_for()
        page.evaluate("scrollTo(0, 500)")
        place = page.evaluate("scrollY")
        assert place > 100
        running.stop()
        page.get_by_role("alert").filter(has_text="Connection lost, trying again").wait_for()
        page.wait_for_timeout(1500)  # some tries in vain
        other = Served(again, *models)
        other.grace = 1
        with in_thread(other, served.port) as anew:
            anew.post("/v1/thaw/models/m5/load")
            dialog = page.get_by_role("dialog")
            dialog.filter(has_text="started anew").wait_for()
            assert abs(page.evaluate("scrollY") - place) < 60
            page.keyboard.press("Escape")  # there is nothing behind it to do
            dialog.get_by_label("Admin token").fill(TOKEN)
            page.keyboard.press("Enter")
            live(page)
            is_in(page, "m5", "ready")
            is_in(page, "m3", "not there")
            told(page, "The server has been started anew.")
            told(page, "m5 is ready")
            page.get_by_role("alert").filter(has_text="Connection lost").wait_for(state="hidden")
            assert abs(page.evaluate("scrollY") - place) < 60
            page.context.close()
        left = [error for error in heard.errors if "net::ERR_" not in error]  # while nobody listened
        heard.errors[:] = left


def test_a_session_that_ends_elsewhere(chromium: Any, folder: Path):
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, _, _heard):
        other = page.context.new_page()
        other.goto(f"{served.url}/thaw")
        live(other)
        other.get_by_role("button", name="Log out").click()
        other.get_by_label("Admin token").wait_for()
        page.get_by_role("dialog").filter(has_text="Log in again").wait_for()
        _heard.errors[:] = [error for error in _heard.errors if "403" not in error]


def test_a_link_of_another_site_leads_to_the_page(chromium: Any, folder: Path):
    """The cookie does not come with it; whoever is logged in is not asked again all the same."""
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, _, heard):
        page.goto("about:blank")
        page.set_content(f'<a href="{served.url}/thaw">there</a>')
        page.get_by_text("there").click()
        live(page)
        heard.hosts.discard("about:blank")


def test_a_session_that_has_had_its_time(chromium: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The page knows when, and asks before anything is refused."""
    monkeypatch.setattr(sessions, "LIFETIME", 3.0)
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, _, _heard):
        page.get_by_role("dialog").filter(has_text="Log in again").wait_for()
        page.get_by_role("dialog").get_by_label("Admin token").fill(TOKEN)
        page.keyboard.press("Enter")
        live(page)


def test_numbers_lines_and_caches(chromium: Any, folder: Path):
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, running, _):
        running.post("/v1/thaw/models/a/load")
        (engine,) = served.engines
        stopped = threading.Event()

        def count() -> None:
            for number in range(1000):
                engine.counted = {
                    "vllm:prompt_tokens_total": 1000 + number * 100,
                    "vllm:generation_tokens_total": 10 + number * 10,
                    "vllm:prefix_cache_queries_total": 1000,
                    "vllm:prefix_cache_hits_total": 750,
                    "vllm:kv_cache_usage_perc": 0.25,
                }
                if stopped.wait(0.1):
                    return

        counting = threading.Thread(target=count)
        counting.start()
        try:
            page.locator("#caches").filter(has_text="75 % hits").wait_for()
            page.locator("#caches").filter(has_text="25 % of the cache in use").wait_for()
            page.locator("#throughput polyline").nth(1).wait_for(state="attached")
            rate = row(page, "a").locator("[data-label='Tokens/s']")
            deadline = time.monotonic() + 20
            while not 50 < float(rate.text_content()) < 150 and time.monotonic() < deadline:
                page.wait_for_timeout(200)
            assert 50 < float(rate.text_content()) < 150
        finally:
            stopped.set()
            counting.join()


def test_snapshots_are_verified(chromium: Any, folder: Path):
    path = folder / "dir" / "sound.thaw"
    path.parent.mkdir()
    thaw_vllm.freeze_model(torch.nn.Linear(64, 64), path)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.with_name("damaged.thaw").write_bytes(damaged)
    served = Served(folder, Model("a", "/m", snapshot=str(path)), directories=[str(path.parent)])
    with opened(chromium, served) as (page, _, _heard):
        page.get_by_text("serves a").wait_for()
        page.get_by_role("button", name="Verify sound.thaw").click()
        page.locator("#snapshots .result").filter(has_text="sound, ").wait_for()
        page.get_by_role("button", name="Verify damaged.thaw").click()
        page.locator("#snapshots .result").filter(has_text="not sound: ").wait_for()
        content = page.get_by_role("button", name="content id of sound.thaw")
        short = content.text_content()
        content.click()
        assert len(content.text_content()) >= 64 and short.rstrip("…") in content.text_content()


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder / "sessions", create=True)


def kept(store: Store, tokens: Any, label: str, parent: str | None = None, fork: int | None = None, **more: Any) -> str:
    """The id of a session made so many seconds ago as ``ago`` says."""
    made = time.time() - more.pop("ago", 0)
    return save(store, session([*tokens], labels=[label], parent=parent, fork=fork, created=made, **more))[0]


def items(page: Any) -> list[tuple[str, int]]:
    """Labels and levels of the tree, from above."""
    read = "all => all.map(one => [one.querySelector('.name').textContent, Number(one.ariaLevel)])"
    return [(name, level) for name, level in page.locator("#sessions [role=treeitem]").evaluate_all(read)]


def item(page: Any, label: str) -> Any:
    return page.locator("#sessions [role=treeitem]").filter(has=page.get_by_text(label, exact=True))


def test_the_tree_of_sessions(chromium: Any, folder: Path, store: Store):
    """Nesting, branch points and counts; one that is new comes by itself, and the keyboard stays where it is."""
    trunk = kept(store, range(40), "trunk", prompt=8, ago=7200, finished="stop")
    a = kept(store, [*range(24), *range(100, 120)], "plan-a", trunk, 24, ago=3600)
    later = kept(store, [*range(24), *range(100, 130)], "later", a, 44, ago=1800, finished="length")
    kept(store, [*range(20), 7], "plan-b", trunk, 20, ago=900, expires=time.time() + 7200)
    kept(store, range(5), "an old one", ago=99999, expires=5.0)
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, _heard):
        item(page, "plan-b").wait_for()
        expected = [("trunk", 1), ("plan-a", 2), ("later", 3), ("plan-b", 2), ("an old one", 1)]
        assert items(page) == expected
        told = {name: item(page, name).inner_text().replace("\xa0", " ") for name, _ in expected}
        for name, *parts in (
            ("trunk", "40 tokens", "finished: stop", "8 given", "40 in blocks", "made 2 h ago", trunk[:12]),
            ("plan-a", "44 tokens", "open", "from token 24 of trunk", "60 min ago", a[:12]),
            ("later", "54 tokens", "finished: length", "from token 44 of plan-a", later[:12]),
            ("plan-b", "21 tokens", "from token 20 of trunk", "expires in 2 h"),
            ("an old one", "5 tokens", "· expired ·"),
        ):
            assert not [part for part in parts if part not in told[name]], told[name]
        assert not [part for part in ("from token", "model", "expire") if part in told["trunk"]]
        page_size = context().page
        assert f"{page_size * 11 / 1000:.1f} kB, {page_size * 5} B of its own" in told["plan-a"]
        drawn = "row => [...row.querySelectorAll('.rails i')].map(i => i.className)"
        lines = {name: item(page, name).evaluate(drawn) for name in told}
        assert lines == {"trunk": [], "plan-a": ["tee"], "later": ["line", "next"], "plan-b": ["end"], "an old one": []}

        item(page, "trunk").focus()
        for key, name in (
            *(("ArrowDown", "plan-a"), ("ArrowRight", "later"), ("ArrowRight", "later"), ("ArrowLeft", "plan-a")),
            *(("ArrowLeft", "trunk"), ("ArrowUp", "trunk"), ("End", "an old one"), ("Home", "trunk")),
            ("End", "an old one"),
        ):
            page.keyboard.press(key)
            focused = page.evaluate("document.activeElement.querySelector('.name').textContent")
            assert focused == name, key
        assert page.locator("#sessions [tabindex='0']").count() == 1
        kept(store, range(39), "a new one", trunk, 39)
        old = store.find("an old one")
        kept(store, range(5), "newest", old, 5)  # which has its tree moved up
        item(page, "newest").wait_for()
        assert items(page) == [("an old one", 1), ("newest", 2), *expected[:-1], ("a new one", 2)]
        assert page.evaluate("document.activeElement.dataset.id") == old
        store.remove(trunk)
        item(page, "trunk").wait_for(state="detached")
        assert f"from token 24 of {trunk[:12]}, which is not shown" in item(page, "plan-a").inner_text()


def test_two_sessions_are_compared(chromium: Any, folder: Path, store: Store):
    trunk = kept(store, range(40), "trunk", prompt=40)
    plan = kept(store, [*range(26), *range(500, 540)], "plan", trunk, 26, prompt=30)
    kept(store, range(10), "early", trunk, 10, salt="s", prompt=10)
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, _heard):
        panel, hint = page.locator("#comparison"), page.locator("#sessions-hint")
        item(page, "trunk").click()
        hint.filter(has_text="trunk is chosen").wait_for()
        assert panel.is_hidden() and item(page, "trunk").get_attribute("aria-selected") == "true"
        item(page, "plan").click()
        verdict = "trunk and plan part after 26 tokens: token 26, counted from 0, is the first that differs."
        panel.get_by_text(verdict).wait_for()
        page.locator("#said").filter(has_text=verdict).wait_for(state="attached")
        rows = panel.locator("tr").evaluate_all("all => all.map(row => [...row.cells].map(cell => cell.textContent))")
        size = context().page
        assert rows[0] == ["", f"trunk {trunk}", f"plan {plan}"]
        assert rows[1:3] == [["Tokens", "40", "66"], ["Tokens of its own", "14", "40"]]
        assert [cell.replace("\xa0", " ") for cell in rows[3]] == [
            *("Blocks of its own", f"4 blocks, {4 * size} B", f"10 blocks, {10 * size / 1000:.1f} kB")
        ]
        shared = panel.locator("p.hint").text_content().replace("\xa0", " ")
        assert shared == f"They share 6 blocks, {6 * size} B. They differ in how many tokens were given."
        assert "500" not in panel.inner_text()
        panel.get_by_role("button", name="Show tokens").click()
        panel.get_by_text("500 501").wait_for()
        told = panel.locator("dl").inner_text().split("\n")
        assert told == [
            *("Both, from token 10", " ".join(map(str, range(10, 26)))),
            *("trunk, from token 26", " ".join(map(str, range(26, 40)))),
            *("plan, from token 26", " ".join(map(str, range(500, 516))) + " …"),
        ]
        panel.get_by_role("button", name="Hide tokens").click()
        assert "500" not in panel.inner_text()
        panel.get_by_role("button", name="Show tokens").click()
        panel.get_by_text("500 501").wait_for()

        page.keyboard.press("Shift+Tab")  # back to the tree, to the one that was pressed
        page.keyboard.press("End")
        page.keyboard.press("Space")
        panel.get_by_text("plan and early part after 10 tokens: early is the beginning of plan.").wait_for()
        panel.get_by_role("button", name="Show tokens").wait_for()  # those of the others are gone
        assert panel.locator("dl").is_hidden() and panel.locator("dl").text_content() == ""
        assert "cannot be shared" in panel.inner_text() and "the salt" in panel.inner_text()
        assert item(page, "trunk").get_attribute("aria-selected") == "false"  # the first of three is let go
        panel.get_by_role("button", name="Choose none").click()
        panel.wait_for(state="hidden")
        assert page.locator("[aria-selected=true]").count() == 0
        item(page, "plan").click()
        item(page, "plan").click()
        hint.filter(has_text="Choose two").wait_for()


def test_a_comparison_that_failed_is_tried_again(chromium: Any, folder: Path, store: Store):
    """Nothing is said to be below before it is, and the same reason is told once."""
    for name in ("trunk", "plan"):
        kept(store, [*range(40), len(name)], name)
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, heard):
        panel, hint = page.locator("#comparison"), page.locator("#sessions-hint")
        why = {"error": {"type": "StorageError", "message": "the disk is away"}}
        asked: list[Any] = []

        def refuse(route: Any) -> None:
            asked.append(route)
            if len(asked) > 1:
                route.fulfill(status=503, json=why)

        page.route("**/sessions/diff?*", refuse)
        item(page, "trunk").click()
        item(page, "plan").click()
        hint.filter(has_text="Two are chosen.").wait_for()
        page.wait_for_timeout(100)
        assert len(asked) == 1 and panel.is_hidden() and "below" not in hint.inner_text()
        asked[0].fulfill(status=503, json=why)
        hint.filter(has_text="could not be compared: the disk is away").wait_for()
        said = page.locator("#said").filter(has_text="the disk is away")
        said.wait_for(state="attached")
        page.evaluate("document.querySelector('#said').textContent = ''")
        with page.expect_response("**/sessions/diff?*"):
            pass
        assert panel.is_hidden() and said.count() == 0 and page.locator("#notice").is_hidden()
        page.unroute("**/sessions/diff?*")
        panel.get_by_text("trunk and plan part after 40 tokens").wait_for()
        hint.filter(has_text="compared below").wait_for()
        assert all("503" in error for error in heard.errors)
        heard.errors.clear()


def test_the_keyboard_stays_among_the_sessions(chromium: Any, folder: Path, store: Store):
    """Whatever has the focus may go: the tree has it then, and what may be done there is said."""
    first, second = (kept(store, range(size), name, ago=size) for size, name in ((5, "trunk"), (9, "plan")))
    kept(store, range(20), "old", ago=99)
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, _heard):
        panel, said = page.locator("#comparison"), page.locator("#said")
        focused = "document.activeElement.dataset.id"
        for name in ("trunk", "plan"):
            item(page, name).click()
        panel.get_by_role("button", name="Choose none").focus()
        page.keyboard.press("Enter")
        panel.wait_for(state="hidden")
        assert page.evaluate(focused) == second
        said.filter(has_text="Choose two").wait_for(state="attached")
        for name in ("plan", "trunk"):
            item(page, name).click()
        panel.get_by_role("button", name="Show tokens").focus()
        store.remove(second)
        item(page, "plan").wait_for(state="detached")
        assert panel.is_hidden() and page.evaluate(focused) == first
        said.filter(has_text="trunk is chosen").wait_for(state="attached")
        page.evaluate("document.querySelector('#said').textContent = ''")
        store.remove(first)
        item(page, "trunk").wait_for(state="detached")
        assert page.evaluate(focused) == store.find("old")
        said.filter(has_text="Choose two").wait_for(state="attached")


def test_labels_that_turn_the_words_after_them(chromium: Any, folder: Path, store: Store):
    turning = kept(store, range(9), "a\u202eb")
    kept(store, range(5), "plan", turning, 5)
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, _heard):
        found = page.locator(f"[data-id='{turning}'] .name")
        assert found.evaluate("node => getComputedStyle(node).unicodeBidi") == "isolate"
        assert "from token 5 of a\\u202eb" in item(page, "plan").inner_text()
        found.click()
        item(page, "plan").click()
        page.locator("#comparison").get_by_text("a\\u202eb and plan part after 5 tokens").wait_for()
        assert "\u202e" not in page.locator("#comparison").inner_text()


def test_what_there_is_to_say_of_a_store(chromium: Any, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    """None, an empty one, records that cannot be read, more than are shown, and one that may not be used."""
    monkeypatch.setattr(kept_sessions, "MOST", 3)
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, _, _heard):
        page.locator("#snapshots .empty").filter(has_text="No model").wait_for()
        assert page.locator("#sessions").is_hidden()
    (folder / "2").mkdir()
    served = Served(folder / "2", Model("a", "/m"), sessions_directory=str(store.directory))
    with opened(chromium, served) as (page, _, heard):
        page.get_by_text("None is kept yet: POST to v1/thaw/models/NAME/sessions/checkpoint").wait_for()
        for number in range(4):
            kept(store, [number], f"<b>{number}</b>", ago=9 - number)
        broken = kept(store, [9], "broken")
        store.record(broken).write_bytes(b"x")
        item(page, "<b>3</b>").wait_for()
        assert items(page) == [("<b>3</b>", 1), ("<b>2</b>", 1)]
        text = page.locator("#sessions").inner_text()
        assert f"{broken[:12]} cannot be read: '{broken}.session' is no record of a session" in text
        assert "The 2 that were used last are shown; 2 are left out, which thaw log shows." in text
        store.directory.chmod(0o777)
        page.locator("#sessions .error").filter(has_text="others may write to the server's store").wait_for()
        assert len(items(page)) == 2 and page.locator("#notice").is_hidden()
        item(page, "<b>3</b>").click(force=True)
        item(page, "<b>2</b>").press("Space")
        assert page.locator("[aria-selected=true]").count() == 0 and page.locator("#comparison").is_hidden()
        page.locator("#sessions-hint").filter(has_text="none can be chosen now").wait_for()
        store.directory.chmod(0o700)
        page.locator("#sessions > .error").wait_for(state="hidden")
        item(page, "<b>3</b>").click()
        page.locator("#sessions-hint").filter(has_text="<b>3</b> is chosen").wait_for()
        assert heard.errors and all("404" in error for error in heard.errors)
        heard.errors.clear()


def test_sessions_on_a_phone(chromium: Any, folder: Path, store: Store):
    """Deep trees and long labels, in two looks."""
    at = None
    for depth in range(20):
        at = kept(store, range(40 + depth), "x" * 200 if depth % 9 == 0 else f"s{depth}", at, at and 40, ago=99 - depth)
        if depth % 2:
            kept(store, [*range(40), depth], f"side {depth}", at, 40, ago=50)
    lost = context(config="d" * 64)
    save(store, session(range(9), contexts=[lost], labels=["lost"]), [lost])
    store.remove_context(lost.id)
    store.record(kept(store, [9], "broken")).write_bytes(b"x")
    served = Served(folder, Model("a", "/m"), sessions_directory=str(store.directory))
    options = {"viewport": {"width": 375, "height": 667}, "color_scheme": "light", "reduced_motion": "reduce"}
    with opened(chromium, served, **options) as (page, _, _heard):
        item(page, "s19").click()
        page.locator("[role=treeitem]").filter(has_text="xxx").first.click()
        page.get_by_role("button", name="Show tokens").click()
        page.locator("#comparison dl code").first.wait_for()
        item(page, "lost").locator(".error").filter(has_text="cannot be read").wait_for()
        pictures = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)
            pictures.append(page.locator("#sessions").screenshot())
            assert page.evaluate(CONTRAST) == []
            for width in (320, 375, 899, 900, 1100, 1280):
                page.set_viewport_size({"width": width, "height": 667})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                inside = "document.querySelector('.tree').scrollWidth <= document.querySelector('.tree').clientWidth"
                assert page.evaluate(inside)
        assert pictures[0] != pictures[1]
        pressed = page.locator("#sessions").locator("button, [role=treeitem]")
        heights = "all => all.filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect().height)"
        assert min(pressed.evaluate_all(heights)) >= 40


def test_phones_schemes_and_contrast(chromium: Any, folder: Path):
    """No sideways scrolling with the longest of names, buttons for thumbs, two looks, all texts to be read."""
    long = "organisation/" + "a-model-with-a-very-long-name" * 6
    models = [Model(long, "/m", share=0.5), Model("b", "/m", share=0.5), Model("c", "/m", share=0.5)]
    kv = folder / "kv"
    kv.mkdir()
    (kv / ("x" * 150 + ".thawkv")).write_bytes(b"none")
    served = Served(folder, *models, given={"parkable": True}, kv_directory=str(kv))
    options = {"viewport": {"width": 375, "height": 667}, "color_scheme": "light", "reduced_motion": "reduce"}
    with opened(chromium, served, **options) as (page, running, _):
        running.post(f"/v1/thaw/models/{long}/load")
        running.post("/v1/thaw/models/b/load")
        running.post("/v1/thaw/models/b/park")
        running.served.given["faults"] = {"start": ThawError("a reason " * 30 + "x" * 200)}
        ask(running, "c")
        is_in(page, "c", "failed")
        is_in(page, "b", "parked")
        page.locator("#kv th .name").wait_for()
        page.locator("#starts summary").first.wait_for()
        pictures = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)
            pictures.append(page.screenshot())
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            assert page.evaluate(CONTRAST) == []
        assert pictures[0] != pictures[1]
        small = "[...document.querySelectorAll('button, summary')].filter(b => b.checkVisibility())"
        assert page.evaluate(f"{small}.filter(b => b.getBoundingClientRect().height < 40).length") == 0
        assert page.evaluate("document.getAnimations().length") == 0
        for width in (320, 899, 900, 1099, 1100, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Admin token").wait_for()
        page.set_viewport_size({"width": 375, "height": 667})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375 and page.evaluate(CONTRAST) == []


def test_what_the_policy_forbids_is_refused(chromium: Any, folder: Path):
    """The headers are more than words: neither a script in the page nor a request to elsewhere goes through."""
    served = Served(folder, Model("a", "/m"))
    with opened(chromium, served) as (page, _, heard):
        tried = """async () => {
          const script = document.createElement("script");
          script.textContent = "window.harmed = true";
          document.body.append(script);
          const asked = await fetch("http://localhost:1/").then(() => "went", () => "refused");
          return [window.harmed ?? false, asked];
        }"""
        assert page.evaluate(tried) == [False, "refused"]
        assert heard.errors and all("Content Security Policy" in e or "violates" in e for e in heard.errors)
        heard.errors.clear()
        heard.hosts.discard("localhost")
