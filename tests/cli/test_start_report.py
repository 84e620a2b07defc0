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
