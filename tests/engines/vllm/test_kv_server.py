"""vLLM's own server with thaw's routes: one is asked and frozen, the next one restored; no import by the user."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engines.vllm import forks

from thaw_vllm.cli import doctor
from thaw_vllm.sessions.store import Store

openai = pytest.importorskip("openai", reason="openai is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOKEN = "a token of 24 characters"
# Words from t300 on: the tokenizer finds its special tokens t0, t1 and t2 at the beginning of others.
PROMPT = " ".join(f"t{7 * i % 199 + 300}" for i in range(300))
SALTED = " ".join(f"t{11 * i % 199 + 300}" for i in range(300))
KEPT = " ".join(f"t{13 * i % 199 + 300}" for i in range(300))
KEPT_SALTED = " ".join(f"t{17 * i % 199 + 300}" for i in range(300))
"""Of sessions; no file of KV blocks has the beginning of these."""
Answer = tuple[str, tuple[float, ...]]
COMMAND = [sys.executable, "-c", "from thaw_vllm.cli.main import main; raise SystemExit(main())"]


class Server:
    """A process of vLLM's server, its environment as ``thaw doctor`` prints it."""

    def __init__(
        self, model: Path, directory: Path, log: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.directory = model, directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--enforce-eager", "--enable-prompt-tokens-details", "--max-model-len", "512"]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        environment = os.environ | {"THAW_ADMIN_TOKEN": TOKEN, "THAW_KV_DIR": str(directory), "VLLM_PLUGINS": plugins()}
        environment |= forks.PLAIN | (variables or {})
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment
            )
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait(self) -> Server:
        """Itself, when it is healthy."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}: {self.log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        pytest.fail("the server did not become healthy")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def ask(self, prompt: str | list[int], salt: str | None = None) -> tuple[Answer, int]:
        """Text and log-probabilities, and how many tokens of the prompt were cached."""
        extra = {} if salt is None else {"cache_salt": salt}
        answer = self.client.completions.create(
            model=str(self.model), prompt=prompt, max_tokens=16, temperature=0, logprobs=1, extra_body=extra
        )
        details = answer.usage.prompt_tokens_details
        said = answer.choices[0].text, tuple(answer.choices[0].logprobs.token_logprobs)
        return said, (details.cached_tokens or 0) if details else 0

    def call(self, what: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        return self.route(f"kv/{what}", body, token)

    def route(self, what: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json"} | ({} if token is None else {"X-Thaw-Admin-Token": token})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/thaw/{what}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def thaw_kv(self, *arguments: Any, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        return self.thaw("kv", *arguments, token=token)

    def thaw(self, *arguments: Any, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *map(str, arguments), "--server", self.url]
        environment = os.environ | {"THAW_ADMIN_TOKEN": token}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def plugins() -> str:
    """What ``thaw doctor`` tells to set VLLM_PLUGINS to."""
    (found,) = re.findall(r"VLLM_PLUGINS=(\S+)", doctor._routes().cure)
    return found


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("tied")


@pytest.fixture(scope="module")
def model_id(model: Path) -> str:
    from thaw_vllm.weights.checkpoint import open_checkpoint
    from thaw_vllm.weights.provenance import checkpoint_id

    return checkpoint_id(open_checkpoint(model), cache=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of both servers."""
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def servers(
    model: Path, directory: Path, sessions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Two that are started at the same time, each of which takes a core."""
    variables, logs, started = {"THAW_SESSIONS_DIR": str(sessions)}, tmp_path_factory.mktemp("log"), []
    try:
        for name in ("first", "second"):
            started.append(Server(model, directory, logs / f"{name}.log", variables=variables))
        yield started
    finally:
        for server in started:
            server.stop()


@pytest.fixture(scope="module")
def first(servers: list[Server]) -> Server:
    return servers[0].wait()


@pytest.fixture(scope="module")
def asked(first: Server) -> dict[str, Answer]:
    """What the first server answered when it had the prompts cached itself."""
    found = {}
    for prompt, salt in ((PROMPT, None), (SALTED, "pepper"), (KEPT, None), (KEPT_SALTED, "pepper")):
        (text, _), cached = first.ask(prompt, salt)
        assert cached == 0
        found[prompt], cached = first.ask(prompt, salt)
        assert cached == 256 and found[prompt][0] == text
    return found


@pytest.fixture(scope="module")
def running(first: Server, model_id: str, asked: dict[str, Answer]) -> tuple[list[int], Answer, int]:
    """What a request had come to when it was kept as the session "running", while it went on; and how that goes on."""
    body = {"request": "cmpl-none", "model_id": model_id}
    status, answer = first.route("sessions/checkpoint", body)
    assert status == 400 and "running requests" in answer["error"]["message"]
    stream = first.client.completions.create(
        model=str(first.model),
        prompt=" ".join(["t410"] * 140),
        max_tokens=360,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    body = {"request": next(chunks).id, "labels": ["running"], "model_id": model_id}
    status, report = first.route("sessions/checkpoint", body)
    assert status == 200 and 140 < report["tokens"] < 490 and report["blocks"] == report["tokens"] // 128, report
    assert next(chunks) is not None  # it was not ended
    threading.Thread(target=stream.close).start()
    tokens = first.route("sessions/checkout", {"session": "running", "model_id": model_id, "token_ids": True})[1]
    ids = tokens["token_ids"]
    assert ids[:140] == [410] * 140 and len(ids) == report["tokens"]
    said, cached = first.ask(ids)
    assert cached == report["tokens"] // 128 * 128 > 0
    return ids, said, cached


@pytest.fixture(scope="module")
def second(servers: list[Server]) -> Server:
    """Asked nothing before the first one has ended."""
    servers[0].stop()
    return servers[1].wait()


class TestFirst:
    def test_others_are_refused(self, first: Server, directory: Path):
        for token in (None, "", "another token of 24 chars"):
            for what, body in (("freeze", {"name": "x.thawkv", "everything": True}), ("info", None)):
                status, answer = first.call(what, body, token)
                assert status == 403 and "X-Thaw-Admin-Token" in answer["error"]["message"]
        assert list(directory.iterdir()) == []

    def test_bodies_are_checked(self, first: Server, directory: Path, model_id: str):
        known = {"model_id": model_id}
        for body, said in (
            ({"name": "../x.thawkv", "prompts": [PROMPT]}, "names no directory"),
            ({"name": "x.thawkv", "prompts": [PROMPT], "path": "/tmp/x"}, "no field 'path'"),
            ({"name": "x.thawkv"}, '"everything": true'),
            ({"name": "x.thawkv", "prompts": [PROMPT + PROMPT]}, "cannot be tokenised"),
            ({"name": "x.thawkv", "request": "cmpl-none"}, "running requests"),
            ({"name": "x.thawkv", "prompts": ["t1 t2"]}, "nothing to freeze"),
        ):
            status, answer = first.call("freeze", body | known)
            assert status == 400 and said in answer["error"]["message"], answer
        assert list(directory.iterdir()) == []

    def test_weights_must_be_known(self, first: Server, asked: dict[str, Answer]):
        status, answer = first.call("freeze", {"name": "x.thawkv", "prompts": [PROMPT]})
        assert status == 400 and "thaw id MODEL" in answer["error"]["message"]

    def test_freeze_by_prompt(
        self, first: Server, asked: dict[str, Answer], directory: Path, model_id: str, tmp_path: Path
    ):
        (tmp_path / "prompt.txt").write_text(PROMPT)
        options = ["--prompt-file", tmp_path / "prompt.txt", "--model-id", model_id]
        ran = first.thaw_kv("freeze", "a.thawkv", *options, "--json")
        assert ran.returncode == 0, ran.stderr
        report = json.loads(ran.stdout)
        assert report["name"] == "a.thawkv" and report["tokens"] == 256 and report["prefixes"] == 1
        assert (directory / "a.thawkv").stat().st_mode & 0o777 == 0o600
        ran = first.thaw_kv("freeze", "a.thawkv", *options)
        assert ran.returncode == 6 and "--force" in ran.stderr
        ran = first.thaw_kv("freeze", "a.thawkv", *options, "--force")
        assert ran.returncode == 0 and "longest of 256 tokens" in ran.stdout, ran.stderr

    def test_freeze_by_prompt_and_salt(self, first: Server, asked: dict[str, Answer], model_id: str):
        body = {"name": "salted.thawkv", "prompts": [SALTED], "model_id": model_id}
        assert first.call("freeze", body)[0] == 400
        status, report = first.call("freeze", body | {"cache_salt": "pepper"})
        assert status == 200 and report["tokens"] == 256

    def test_freeze_by_token_ids(self, first: Server, asked: dict[str, Answer], model_id: str, tmp_path: Path):
        (tmp_path / "ids.json").write_text(json.dumps([int(word[1:]) for word in PROMPT.split()]))
        options = ["--token-ids", tmp_path / "ids.json", "--model-id", model_id, "--json"]
        ran = first.thaw_kv("freeze", "ids.thawkv", *options)
        assert ran.returncode == 0 and json.loads(ran.stdout)["tokens"] == 256, ran.stderr

    def test_freeze_a_running_request(self, first: Server, asked: dict[str, Answer], model_id: str):
        stream = first.client.completions.create(
            model=str(first.model),
            prompt=" ".join(["t400"] * 130),
            max_tokens=380,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunk = next(iter(stream))
        body = {"name": "running.thawkv", "request": chunk.id, "model_id": model_id}
        status, report = first.call("freeze", body)
        threading.Thread(target=stream.close).start()
        assert status == 200 and report["prefixes"] == 1 and report["tokens"] >= 128, report

    def test_everything_needs_its_flag(self, first: Server, asked: dict[str, Answer], model_id: str):
        ran = first.thaw_kv("freeze", "all.thawkv", "--model-id", model_id)
        assert ran.returncode == 2 and "everything" in ran.stderr
        ran = first.thaw_kv("freeze", "all.thawkv", "--everything", "--model-id", model_id, "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout)["prefixes"] >= 2, ran.stderr

    def test_info(self, first: Server, asked: dict[str, Answer]):
        ran = first.thaw_kv("info", "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout)["cached"] >= 4, ran.stderr
        assert "tokens are known" in first.thaw_kv("info").stdout

    def test_sessions_are_not_for_others(self, first: Server, sessions: Path):
        for token in (None, "", "another token of 24 chars"):
            for what, body in (("sessions", None), ("sessions/checkpoint", {"prompt": PROMPT})):
                status, answer = first.route(what, body, token)
                assert status == 403 and "X-Thaw-Admin-Token" in answer["error"]["message"]

    def test_checkpoint(self, first: Server, asked: dict[str, Answer], sessions: Path, model_id: str, tmp_path: Path):
        """By prompt and, salted, by token ids."""
        (tmp_path / "prompt.txt").write_text(KEPT)
        options = ["--prompt-file", tmp_path / "prompt.txt", "--label", "kept"]
        ran = first.thaw("checkpoint", *options)
        assert ran.returncode == 2 and "thaw id MODEL" in ran.stderr
        ran = first.thaw("checkpoint", *options, "--model-id", model_id, "--json")
        assert ran.returncode == 0, ran.stderr
        report = json.loads(ran.stdout)
        assert (report["tokens"], report["blocks"], report["added"]) == (300, 2, 2) and "store" not in report
        (tmp_path / "ids.json").write_text(json.dumps([int(word[1:]) for word in KEPT_SALTED.split()]))
        options = ["--token-ids", tmp_path / "ids.json", "--label", "salted", "--parent", "kept", "--ttl", "7d"]
        ran = first.thaw("checkpoint", *options, "--cache-salt", "pepper", "--model-id", model_id)
        assert ran.returncode == 0 and "2 files of blocks" in ran.stdout and "expires in 7 days" in ran.stdout, ran
        status, branch = first.route("sessions/branch", {"session": "kept", "at": 140, "labels": ["early"]})
        assert status == 200 and (branch["tokens"], branch["parent"]) == (140, report["session"])
        status, told = first.route("sessions")
        found = {one["labels"][0]: one for one in told["sessions"]}
        assert status == 200 and found["kept"]["id"] == report["session"] and found["salted"]["salted"] is True
        assert (found["salted"]["parent"], found["salted"]["fork"]) == (report["session"], 1)
        assert str(sessions) not in json.dumps(told) and str(first.model) not in json.dumps(told)
        assert "pepper" not in json.dumps(told)

    def test_checkpoint_of_a_running_request(self, sessions: Path, running: tuple[list[int], Answer, int]):
        store = Store(sessions)
        head = store.read(store.find("running")).head
        assert (head.prompt, head.count, head.finished) == (140, len(running[0]), None)
        assert head.sampling is not None and head.sampling["max_tokens"] == 360

    def test_command_line_refused(self, first: Server):
        ran = first.thaw_kv("info", token="another token of 24 chars")
        assert ran.returncode == 2 and "THAW_ADMIN_TOKEN" in ran.stderr and ran.stderr.count("\n") == 1


class TestSecond:
    """Another process, its cache empty."""

    def test_restore(self, second: Server, asked: dict[str, Answer], model_id: str):
        ran = second.thaw_kv("restore", "none.thawkv", "--model-id", model_id)
        assert ran.returncode == 6 and "no file 'none.thawkv'" in ran.stderr
        ran = second.thaw_kv("restore", "a.thawkv", "--model-id", "tensors-blake3:" + "0" * 64)
        assert ran.returncode == 4, ran.stderr
        ran = second.thaw_kv("restore", "a.thawkv", "--model-id", model_id, "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout)["tokens"] == 256, ran.stderr
        assert second.ask(PROMPT) == (asked[PROMPT], 256)

    def test_a_salt_keeps_others_out(self, second: Server, asked: dict[str, Answer], model_id: str):
        status, report = second.call("restore", {"name": "salted.thawkv", "model_id": model_id})
        assert status == 200 and report["blocks"] >= 2
        assert second.ask(SALTED)[1] == 0
        assert second.ask(SALTED, "pepper") == (asked[SALTED], 256)

    def test_checkout(self, second: Server, asked: dict[str, Answer], sessions: Path, model_id: str):
        own = ["--model-id", model_id, "--show-tokens", "--json"]
        ran = second.thaw("checkout", "nobody", *own)
        assert ran.returncode == 2 and "no session 'nobody' in the server's store" in ran.stderr
        ran = second.thaw("checkout", "kept", "--model-id", "tensors-blake3:" + "0" * 64)
        assert ran.returncode == 4 and str(sessions) not in ran.stderr, ran.stderr
        ran = second.thaw("checkout", "kept", *own)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert (found["blocks"], found["cached"], found["lost"], found["salted"]) == (2, 256, 0, False)
        assert second.ask(found["token_ids"]) == (asked[KEPT], 256)
        ran = second.thaw("checkout", "early", "--model-id", model_id)
        assert ran.returncode == 0 and re.search("thawed +0 blocks", ran.stdout), ran.stdout + ran.stderr

    def test_checkout_of_a_salted_session(self, second: Server, asked: dict[str, Answer], model_id: str):
        body = {"session": "salted", "model_id": model_id, "token_ids": True}
        status, found = second.route("sessions/checkout", body)
        assert status == 200 and found["salted"] is True and found["blocks"] == 2
        assert second.ask(found["token_ids"])[1] == 0
        assert second.ask(found["token_ids"], "pepper") == (asked[KEPT_SALTED], 256)

    def test_checkout_of_what_was_running(self, running: tuple[list[int], Answer, int], second: Server, model_id: str):
        ids, said, cached = running
        body = {"session": "running", "model_id": model_id, "token_ids": True}
        status, found = second.route("sessions/checkout", body)
        assert status == 200 and found["token_ids"] == ids and found["cached"] == cached
        assert second.ask(ids) == (said, cached)

    def test_a_stop_string_that_began_in_what_was_generated(self, second: Server):
        def complete(prompt: str | list[int], **more: Any) -> Any:
            asked = {"max_tokens": 6, "temperature": 0} | more
            return second.client.completions.create(model=str(second.model), prompt=prompt, **asked).choices[0]

        whole = complete(PROMPT, extra_body={"return_token_ids": True})
        words, ids = whole.text.split(), whole.prompt_token_ids + whole.token_ids[:4]
        asked: dict[str, Any] = {"max_tokens": 1, "stop": [f"{words[3]} {words[4]}"]}
        plain = complete(ids, **asked)
        assert (plain.finish_reason, plain.text.split()) == ("length", words[4:5])
        rest = complete(ids, **asked, extra_body={"vllm_xargs": {"thaw_generated": [4, len(ids)]}})
        assert (rest.finish_reason, rest.text) == ("stop", "")

    def test_what_is_there_stays(self, second: Server, model_id: str):
        ran = second.thaw_kv("restore", "a.thawkv", "--model-id", model_id)
        assert ran.returncode == 0 and "thawed         0 blocks" in ran.stdout, ran.stdout + ran.stderr
