"""``thaw serve`` with several models: what it hands to the pool, and what it refuses."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would be run; vLLM counts as installed."""
    from thaw_vllm.engines.vllm import api
    from thaw_vllm.serve import run

    found = []
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))  # no token is left for other tests
    for name in ("THAW_ADMIN_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(run, "run", lambda *given: found.append(given))
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    return found


def test_registered_models(thaw, started):
    words = ["--register", "a=m/a", "--register", "b=m/b", "--port=8001", "--host", "0.0.0.0", "--api-key", "k", "l"]
    words += ["--model-dir", "/srv"]
    ran = thaw("serve", *words, "--allowed-host", "box", "--max-model-len", "512", "--zygote", "z", "--fast-start")
    assert ran.code == 0, ran.err
    ((settings, where, options, _),) = started
    assert {name: model.path for name, model in settings.models.items()} == {"a": "m/a", "b": "m/b"}
    assert (where.host, where.port, where.api_keys, where.hosts) == ("0.0.0.0", 8001, ("k", "l"), ("box",))
    assert where.directories == ("/srv",)
    assert options == ["--zygote", "z", "--fast-start", "--max-model-len", "512"]
    assert where.token and where.token_file.read_text().strip() == where.token


def test_directories_of_every_server(thaw, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    assert thaw("serve", "--register", "a=m", "--kv-dir", ".", "--sessions-dir", "s").code == 0
    ((_, where, options, _),) = started
    expected = ["--zygote", "default", "--kv-dir", str(tmp_path), "--sessions-dir", str(tmp_path / "s")]
    assert options == expected and where.kv_directory == str(tmp_path)
    assert where.sessions_directory == str(tmp_path / "s")


def test_directories_that_variables_name(thaw, started, monkeypatch):
    """Every server has them from its environment; the router reads them itself."""
    for kept in ("/srv/sessions", ""):
        monkeypatch.setenv("THAW_SESSIONS_DIR", kept)
        monkeypatch.setenv("THAW_KV_DIR", kept)
        assert thaw("serve", "--register", "a=m").code == 0
        _, where, options, _ = started.pop()
        assert (where.sessions_directory, where.kv_directory) == (kept or None, kept or None)
        assert options == ["--zygote", "default"]


def test_weights_among_engines(thaw, started, monkeypatch, tmp_path):
    """Of several models each server is told; of one, its loader."""
    from thaw_vllm.cli import serve

    assert thaw("serve", "--register", "a=m", "--peer", "auto", "--offer-weights").code == 0
    assert started[0][2] == ["--zygote", "default", "--offer-weights", "--peer", "auto"]
    ran = thaw("serve", "--register", "a=m", "--peer", "/an/offer.sock")
    assert ran.code == 2 and "weights of one model" in ran.err and len(started) == 1
    assert thaw("serve", "--register", "a=m", "--peer", "tcp://host:1").code == 0
    assert started[1][2] == ["--zygote", "default", "--peer", "tcp://host:1"]
    for models in (["--register", "a=m"], ["--model", "m", "--snapshot", "w.thaw"]):
        ran = thaw("serve", *models, "--peer", "tcp://host")
        assert ran.code == 2 and "'tcp://host' is no address of a peer" in ran.err and len(started) == 2
    found = []
    monkeypatch.setattr(serve, "_single", lambda *given: found.append(given[2].extra))
    monkeypatch.chdir(tmp_path)
    assert thaw("serve", "--model", "m", "--snapshot", "w.thaw", "--peer", "auto", "--offer-weights").code == 0
    assert found == [{"snapshot": str(tmp_path / "w.thaw"), "peer": "auto", "offer": True}]
    ran = thaw("serve", "--model", "m", "--snapshot", "w.thaw", "--peer", "nonsense")
    assert ran.code == 2 and "no engine offers its weights at 'nonsense'" in ran.err and len(found) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as offer:
        offer.bind("offer.sock")
        assert thaw("serve", "--model", "m", "--snapshot", "w.thaw", "--peer", "offer.sock").code == 0
    ran = thaw("serve", "--model", "m", "--snapshot", "none", "--offer-weights")
    assert ran.code == 2 and "weights of a snapshot" in ran.err


def test_a_file(thaw, started, tmp_path, monkeypatch):
    (tmp_path / "models.toml").write_text("drain = 3\n[models.a]\npath = 'm'")
    monkeypatch.setenv("THAW_ADMIN_TOKEN", "a token of 24 characters")
    monkeypatch.setenv("VLLM_API_KEY", "key")
    assert thaw("serve", "--models", tmp_path / "models.toml", "--register", "b=n").code == 0
    ((settings, where, options, _),) = started
    assert settings.drain == 3 and list(settings.models) == ["a", "b"]
    assert (where.host, where.port, where.api_keys) == ("127.0.0.1", 8000, ("key",))
    assert (where.token, where.token_file, options) == ("a token of 24 characters", None, ["--zygote", "default"])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "give --model for one model, or --models FILE"),
        (["--model", "m", "--register", "a=m"], 2, "give --model for one model"),
        (["--register", "a"], 2, "it is NAME=PATH"),
        (["--register", "a=m", "--snapshot", "w.thaw"], 2, "in --models FILE"),
        (["--register", "a=m", "--port", "x"], 2, "--port 'x' is no number"),
        (["--register", "a=m", "--port"], 2, "--port needs a value"),
        (["--register", "a=m", "--uds", "x"], 2, "--uds cannot be given"),
        (["--register", "a=m", "--served_model_name=x"], 2, "--served-model-name cannot be given"),
        (["--register", "a=m", "--load-format=thaw"], 2, "--load-format cannot be given"),
        (["--register", "a=m", "--ssl-keyfile", "k"], 2, "--ssl-keyfile cannot be given"),
        (["--register", "a=m", "--snapshot-dir", "d"], 2, "leave --snapshot-dir out"),
        (["--models", "none.toml"], 6, "none.toml"),
        (["--register", "a=./none"], 6, "there is no model directory './none'"),
        (["--register", "a=m", "--kv-dir", "none"], 6, "there is no directory 'none'"),
        (["--register", "a=m", "--sessions-dir", "none"], 6, "there is no directory 'none'"),
        (["--model", "m", "--models", "f"], 2, "not both"),
    ],
)
def test_what_is_refused(thaw, started, words, code, said):
    ran = thaw("serve", *words)
    assert ran.code == code and said in ran.err and started == []


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("args = ['--uds', 'x']", 2, "--uds cannot be given"),
        ("args = ['--port', '9']", 2, "where to listen is the router's"),
        ("snapshot = 'none.thaw'", 6, "none.thaw"),
        ("snapshot = 'broken.thaw'", 3, "broken.thaw"),
    ],
)
def test_what_a_model_may_not_say(thaw, started, tmp_path, line, code, said):
    (tmp_path / "broken.thaw").write_bytes(b"none")
    (tmp_path / "models.toml").write_text(f"[models.a]\npath = 'm'\n{line}")
    ran = thaw("serve", "--models", tmp_path / "models.toml")
    assert ran.code == code and said in ran.err and started == []


def test_a_token_that_is_too_short(thaw, started, monkeypatch):
    monkeypatch.setenv("THAW_ADMIN_TOKEN", "short")
    ran = thaw("serve", "--register", "a=m")
    assert ran.code == 2 and "16 or more printable ASCII" in ran.err and started == []


def test_a_file_without_models(thaw, started, tmp_path):
    (tmp_path / "models.toml").write_text("drain = 3")
    ran = thaw("serve", "--models", tmp_path / "models.toml")
    assert ran.code == 2 and "names no model" in ran.err and started == []
