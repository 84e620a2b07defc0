"""``thaw start-report``: the text, the document, the page."""

import json

import pytest

EVENTS = [
    ("process", 100, 100.5),
    ("imports", 100.5, 104.5),
    ("config", 104.5, 105),
    ("a phase\x1b[2J", 105, 106),
    ("first token", 107, 108),
]


@pytest.fixture
def start(tmp_path):
    directory = tmp_path / "start"
    directory.mkdir()
    common = {"pid": 7, "parent": 1, "name": "MainProcess", "created": 100}
    lines = [json.dumps(common | {"phase": phase, "begin": begin, "end": end}) for phase, begin, end in EVENTS]
    (directory / "7.jsonl").write_text("\n".join([*lines, '{"torn']))
    return directory


def test_text(thaw, start):
    ran = thaw("start-report", start)
    assert ran.code == 0 and ran.err == ""
    assert "total          8.000 s, until the first token" in ran.out
    assert "front          pid 7, from 0.000 s" in ran.out and "skipped lines  1, of other" in ran.out
    lines = ran.out.partition("\n\n")[2].splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["process", "imports", "config"]
    assert "4.000 s   50%" in lines[1] and "until the request" in ran.out
    assert "\x1b" not in ran.out


def test_document(thaw, start):
    document = thaw("start-report", start, "--json").document
    assert document["total"] == 8 and document["first_token"] and document["skipped"] == 1
    assert document["phases"][1] == {"phase": "imports", "begin": 0.5, "end": 4.5, "seconds": 4}
    assert document["processes"][0]["spans"][1] == {"phase": "imports", "begin": 0.5, "end": 4.5, "self": 4}


MODULES = ["a.b", "a.c", "a", "b", "c", "d\x1b[2J", "e", 7]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ({"created": 100, "modules": MODULES}, "7 modules since its fork: a (3), b (1), c (1), 'd\\x1b[2J' (1), …"),
        ({"created": 100, "modules": ["a.b"]}, "1 modules since its fork: a (1)"),
        ({"created": 99, "modules": ["of another start"]}, None),
        ({"created": "soon", "modules": ["a"]}, None),
        ({"created": 100, "modules": 7}, None),
        ([], None),
    ],
)
def test_modules_that_were_imported(told, shown, thaw, start):
    (start / "7.imported.json").write_text(json.dumps(told))
    ran = thaw("start-report", start)
    assert ran.code == 0
    if shown is None:
        assert "since its fork" not in ran.out
    else:
        assert shown in ran.out, ran.out
    names = [name for name in told["modules"] if isinstance(name, str)] if shown else []
    assert thaw("start-report", start, "--json").document["processes"][0]["imported"] == names


KERNELS = [{"name": f"k{number}", "why": "there was none of that name"} for number in range(7)]
LOADED = {
    "counts": {"aot_artifacts_loaded": 1, "aot_compiles": 0},
    "parts": [{"state": "found", "why": ""}],
    "kernels": [],
}
COMPILED = {
    "counts": {"aot_artifacts_loaded": 0, "aot_compiles": 2},
    "parts": [{"state": "new", "why": "this model is compiled: \x1b[2J"}, {"state": "found", "why": ""}],
    "kernels": KERNELS,
}
NOT_LOADED = LOADED | {"counts": {"aot_compiles": 1}}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (LOADED, ["compiled code: 1 parts loaded, 0 compiled", "kernels of Triton: 0 compiled"]),
        (
            COMPILED,
            [
                "compiled code: 0 parts loaded, 2 compiled",
                r"'  this model is compiled: \x1b[2J'",
                "kernels of Triton: 7 compiled",
                *(f"  k{number}: there was none of that name" for number in range(5)),
                "  and 2 more",
            ],
        ),
        (
            NOT_LOADED,
            [
                "compiled code: 0 parts loaded, 1 compiled",
                "  what was found could not be loaded; vLLM's log says why",
                "kernels of Triton: 0 compiled",
            ],
        ),
        ({}, ["compiled code: 0 parts loaded, 0 compiled", "kernels of Triton: 0 compiled"]),
        ({"parts": 7, "kernels": None, "counts": None}, ["compiled code: 0 parts loaded, 0 compiled"]),
    ],
)
def test_what_was_compiled(told, shown, thaw, start):
    (start / "7.compiled.json").write_text(json.dumps({"created": 100} | told))
    ran = thaw("start-report", start)
    assert ran.code == 0, ran.err
    lines = [line.removeprefix("caches").strip() for line in ran.out.splitlines() if line.startswith("caches")]
    assert lines[: len(shown)] == [line.strip() for line in shown]
    assert thaw("start-report", start, "--json").document["compiled"] == [told]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"created": 99}', '{"created": "soon"}', "{}"])
def test_of_another_start_and_what_is_damaged(text, thaw, start):
    """A directory may hold several starts, and a pid comes again."""
    (start / "7.compiled.json").write_text(text)
    (start / "8.compiled.json").write_text('{"created": 100}')
    (start / "caches.json").write_text(text)
    document = thaw("start-report", start, "--json").document
    assert document["compiled"] == [] and document["caches"] is None


@pytest.mark.parametrize(
    ("at", "its"), [(100, True), (41, True), (108, True), (39, False), (109, False), (None, False)]
)
def test_what_became_of_a_file_of_caches(at, its, thaw, start):
    said = {"file": "w.thawcaches", "used": False, "said": "caches are not used: why"}
    (start / "caches.json").write_text(json.dumps({"at": at} | said))
    assert thaw("start-report", start, "--json").document["caches"] == (said if its else None)
    assert ("caches are not used: why" in thaw("start-report", start).out) == its


def test_page(thaw, start, tmp_path):
    page = tmp_path / "start.html"
    ran = thaw("start-report", start, "--html", page)
    assert ran.code == 0 and str(page) in ran.out
    assert page.read_text().startswith("<!DOCTYPE html>") and "<svg" in page.read_text()
    again = thaw("start-report", start, "--html", page)
    assert again.code == 6 and "--force" in again.err
    assert thaw("start-report", start, "--html", page, "-f", "--json").code == 0


def test_nothing_there(thaw, tmp_path):
    empty = thaw("start-report", tmp_path)
    assert empty.code == 2 and "THAW_START_REPORT=start/ vllm serve" in empty.err
    assert thaw("start-report", tmp_path / "nowhere").code == 6
