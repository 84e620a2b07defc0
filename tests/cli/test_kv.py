"""``thaw kv`` against a stand-in for the server: what it sends, and what each answer becomes."""

import json

import pytest
from tests.cli.standin import TOKEN

FROZEN = {
    "name": "a.thawkv",
    "bytes": 4096,
    "blocks": 2,
    "prefixes": 1,
    "tokens": 256,
    "skipped": {"of images": 3},
    "files": ["a.thawkv"],
    "seconds": 0.1,
}


@pytest.fixture(autouse=True)
def frozen(server):
    server.answer = json.dumps(FROZEN).encode()


def one_line(ran):
    assert ran.out == "" and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    return ran.err


def test_freeze_sends_what_was_asked(thaw, server, tmp_path):
    (tmp_path / "p.txt").write_text("from a file\n")
    options = ["--prompt", "x", "--prompt-file", tmp_path / "p.txt", "--cache-salt", "s", "--model-id", "m", "--force"]
    ran = thaw("kv", "freeze", "a.thawkv", *options, "--server", server.url + "/base/", "--api-key", "key")
    assert ran.code == 0 and ran.err == ""
    assert "1, the longest of 256 tokens" in ran.out and "3 blocks of images" in ran.out
    ((method, path, headers, body),) = server.asked
    assert (method, path) == ("POST", "/base/v1/thaw/kv/freeze")
    assert headers["X-Thaw-Admin-Token"] == TOKEN and headers["Authorization"] == "Bearer key"
    assert json.loads(body) == {
        "name": "a.thawkv",
        "force": True,
        "everything": False,
        "prompts": ["x", "from a file\n"],
        "cache_salt": "s",
        "model_id": "m",
    }


@pytest.mark.parametrize(("text", "lists"), [("[1, 2]", [[1, 2]]), ("[[1], [2]]", [[1], [2]])])
def test_token_ids(thaw, server, tmp_path, text, lists):
    (tmp_path / "ids.json").write_text(text)
    ran = thaw("kv", "freeze", "a.thawkv", "--token-ids", tmp_path / "ids.json", "--server", server.url, "--json")
    assert ran.document == FROZEN and json.loads(server.asked[0][3])["token_ids"] == lists


@pytest.mark.parametrize(
    ("option", "content", "code", "said"),
    [
        ("--token-ids", b"{", 2, "not JSON"),
        ("--token-ids", b"{}", 2, "JSON list"),
        ("--token-ids", b"[" * 100_000, 2, "not JSON"),
        ("--prompt-file", b"\xff", 2, "UTF-8"),
        ("--prompt-file", None, 6, "No such file"),
    ],
)
def test_files_that_cannot_be_used(thaw, server, tmp_path, option, content, code, said):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    ran = thaw("kv", "freeze", "a.thawkv", option, tmp_path / "file", "--server", server.url)
    assert ran.code == code and said in one_line(ran) and server.asked == []


@pytest.mark.parametrize(
    ("status", "answer", "code", "said"),
    [
        (400, {"error": {"type": "UsageError", "message": "what"}}, 2, "error: what"),
        (404, {"error": {"type": "StorageError", "message": "no file"}}, 6, "no file"),
        (409, {"error": {"type": "MismatchError", "message": "other\nweights"}}, 4, "other\\nweights"),
        (422, {"error": {"type": "CorruptionError", "message": "damaged"}}, 3, "damaged"),
        (501, {"error": {"type": "UnsupportedError", "message": "states"}}, 5, "states"),
        (403, {"error": {"type": "Forbidden", "message": "send the token"}}, 2, "send the token"),
        (401, {"error": "Unauthorized"}, 2, "VLLM_API_KEY"),
        (404, {"detail": "Not Found"}, 2, "thaw doctor"),
        (404, {"error": {"type": "NotFoundError", "message": "Not Found"}}, 2, "thaw doctor"),
        (405, {"detail": "Method Not Allowed"}, 2, "thaw doctor"),
        (500, {"error": {"type": "InternalServerError", "message": "the engine died"}}, 1, "500: the engine died"),
        (500, {"error": {"type": "annotations", "message": "no error class"}}, 1, "500"),
        (502, None, 1, "502"),
        (200, [], 1, "200"),
    ],
)
def test_answers_become_errors(thaw, server, status, answer, code, said):
    server.status, server.answer = status, b"<html>" if answer is None else json.dumps(answer).encode()
    ran = thaw("kv", "restore", "a.thawkv", "--server", server.url)
    assert ran.code == code and said in one_line(ran)


def test_a_redirect_is_not_followed(thaw, server):
    server.status, server.headers = 307, {"Location": server.url + "/elsewhere"}
    ran = thaw("kv", "info", "--server", server.url)
    assert ran.code == 1 and "307" in one_line(ran) and len(server.asked) == 1


def test_a_proxy_is_not_used(thaw, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert thaw("kv", "freeze", "a.thawkv", "--everything", "--server", server.url).code == 0


def test_nobody_listens(thaw, server):
    ran = thaw("kv", "info", "--server", "http://127.0.0.1:1")
    assert ran.code == 1 and "Connection refused" in one_line(ran) and "http://127.0.0.1:1" in ran.err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a?x", ""])
def test_no_address(thaw, server, url):
    ran = thaw("kv", "info", "--server", url)
    assert ran.code == 2 and "--server" in one_line(ran)


@pytest.mark.parametrize("token", ["", "ünïcode and long enough", "two\nlines and long enough"])
def test_tokens_that_cannot_be_sent(thaw, server, token, tmp_path, monkeypatch):
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path))  # where no server of this user has left a token
    ran = thaw("kv", "info", "--server", server.url, "--token", token)
    assert ran.code == 2 and "token" in one_line(ran) and server.asked == []
