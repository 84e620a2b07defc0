"""``thaw checkpoint`` and ``thaw checkout`` against a stand-in for the server: what they send, and what they say."""

import json

import pytest
from tests.cli.standin import TOKEN

ID = "0123456789abcdef0123456789abcdef"
KEPT = {"session": ID, "tokens": 300, "blocks": 2, "added": 1, "bytes": 4096, "seconds": 0.25, "phases": {}}
BACK = {
    "session": ID,
    "tokens": 300,
    "blocks": 2,
    "present": 3,
    "left_out": 4,
    "lost": 5,
    "cached": 256,
    "bytes": 4096,
    "seconds": 0.25,
    "phases": {},
}


def one_line(ran):
    assert ran.out == "" and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    return ran.err


class TestCheckpoint:
    @pytest.fixture(autouse=True)
    def kept(self, server):
        server.answer = json.dumps(KEPT).encode()

    def test_what_is_sent(self, thaw, server):
        options = ["--label", "a", "--label", "b", "--parent", "trunk", "--cache-salt", "s", "--model-id", "m"]
        options += ["--ttl", "30m"]
        ran = thaw("checkpoint", "--prompt", "x", *options, "--server", server.url + "/base/", "--api-key", "key")
        assert ran.code == 0 and ran.err == ""
        assert [line.split()[0] for line in ran.out.splitlines()] == ["session", "tokens", "kept", "added", "seconds"]
        assert ID in ran.out and "1 files of blocks, 4.1 kB" in ran.out
        ((method, path, headers, body),) = server.asked
        assert (method, path) == ("POST", "/base/v1/thaw/sessions/checkpoint")
        assert headers["X-Thaw-Admin-Token"] == TOKEN and headers["Authorization"] == "Bearer key"
        assert json.loads(body) == {
            "prompt": "x",
            "labels": ["a", "b"],
            "ttl": 1800,
            "parent": "trunk",
            "cache_salt": "s",
            "model_id": "m",
        }

    def test_a_time_to_live_that_is_none(self, thaw, server):
        ran = thaw("checkpoint", "--prompt", "x", "--ttl", "a week", "--server", server.url)
        assert ran.code == 2 and "--ttl must be a time above 0" in one_line(ran) and server.asked == []

    def test_every_source(self, thaw, server, tmp_path):
        (tmp_path / "p.txt").write_text("from a file\n")
        (tmp_path / "ids.json").write_text("[1, 2]")
        (tmp_path / "lists.json").write_text("[[3]]")
        for option, value, sent in (
            ("--request", "cmpl-1", {"request": "cmpl-1"}),
            ("--prompt-file", tmp_path / "p.txt", {"prompt": "from a file\n"}),
            ("--token-ids", tmp_path / "ids.json", {"token_ids": [1, 2]}),
            ("--token-ids", tmp_path / "lists.json", {"token_ids": [3]}),
        ):
            assert thaw("checkpoint", option, value, "--server", server.url, "--json").document == KEPT
            assert json.loads(server.asked.pop()[3]) == sent

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "nothing is named to keep; give one of --request, --token-ids, --prompt, --prompt-file"),
            (["--request", "a", "--prompt", "b"], "--request and --prompt do not go together"),
            (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file do not go together"),
        ],
    )
    def test_one_source(self, thaw, server, words, said):
        ran = thaw("checkpoint", *words, "--server", server.url)
        assert ran.code == 2 and said in one_line(ran) and server.asked == []

    @pytest.mark.parametrize(
        ("option", "content", "code", "said"),
        [
            ("--token-ids", b"{", 2, "not JSON"),
            ("--token-ids", b"[[1], [2]]", 2, "holds 2 lists"),
            ("--prompt-file", b"\xff", 2, "UTF-8"),
            ("--prompt-file", None, 6, "No such file"),
        ],
    )
    def test_files_that_cannot_be_used(self, thaw, server, tmp_path, option, content, code, said):
        if content is not None:
            (tmp_path / "file").write_bytes(content)
        ran = thaw("checkpoint", option, tmp_path / "file", "--server", server.url)
        assert ran.code == code and said in one_line(ran) and server.asked == []


class TestCheckout:
    def test_what_is_sent_and_said(self, thaw, server):
        server.answer = json.dumps(BACK).encode()
        ran = thaw("checkout", "trunk", "--server", server.url)
        assert ran.code == 0 and ran.err == ""
        lines = dict(line.split("  ", 1) for line in ran.out.splitlines())
        assert {name: said.strip() for name, said in lines.items()} == {
            "session": ID,
            "thawed": "2 blocks, 4.1 kB",
            "cached before": "3 blocks",
            "left out": "4 blocks for want of room",
            "lost": "5 blocks that the store lacks",
            "cached": "256 of 300 tokens",
            "seconds": "0.25",
        }
        ((method, path, _, body),) = server.asked
        assert (method, path) == ("POST", "/v1/thaw/sessions/checkout")
        assert json.loads(body) == {"session": "trunk", "evict": False, "token_ids": False}

    @pytest.mark.parametrize(("salted", "said"), [(False, "salted         no"), (True, "send the cache_salt")])
    def test_with_tokens(self, thaw, server, salted, said):
        server.answer = json.dumps(BACK | {"token_ids": [5, 6, 7], "salted": salted, "generated": 2}).encode()
        ran = thaw("checkout", ID, "--evict", "--show-tokens", "--model-id", "m", "--server", server.url)
        assert ran.code == 0 and said in ran.out and ran.out.endswith("token ids      5 6 7\n")
        sent = {"session": ID, "evict": True, "token_ids": True, "model_id": "m"}
        assert json.loads(server.asked.pop()[3]) == sent
        assert thaw("checkout", ID, "--show-tokens", "--json", "--server", server.url).document["token_ids"] == [
            5,
            6,
            7,
        ]


@pytest.mark.parametrize("command", [["checkpoint", "--prompt", "x"], ["checkout", "trunk"]])
@pytest.mark.parametrize(
    ("status", "answer", "code", "said"),
    [
        (400, {"error": {"type": "UsageError", "message": "there is no session"}}, 2, "there is no session"),
        (409, {"error": {"type": "MismatchError", "message": "other\nweights"}}, 4, "other\\nweights"),
        (422, {"error": {"type": "CorruptionError", "message": "damaged"}}, 3, "damaged"),
        (403, {"error": {"type": "Forbidden", "message": "start it with THAW_SESSIONS_DIR"}}, 2, "THAW_SESSIONS_DIR"),
        (404, {"detail": "Not Found"}, 2, "thaw doctor"),
    ],
)
def test_answers_become_errors(thaw, server, command, status, answer, code, said):
    server.status, server.answer = status, json.dumps(answer).encode()
    ran = thaw(*command, "--server", server.url)
    assert ran.code == code and said in one_line(ran)
