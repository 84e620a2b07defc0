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

import thaw_vllm
from thaw_vllm.errors import ThawError
from thaw_vllm.serve import app as app_module
from thaw_vllm.serve import sessions, state, usage
from thaw_vllm.serve.config import Model

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
