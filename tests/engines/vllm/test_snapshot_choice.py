"""What ``--snapshot`` comes to, and where starts are left as vLLM has them."""

from __future__ import annotations

import pytest

from thaw_vllm.engines.vllm import snapshot_choice
from thaw_vllm.engines.vllm.snapshot_choice import AUTO, NONE, Choice, among_engines, choose
from thaw_vllm.errors import UsageError


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """Whether the plugin is found."""
    found = ["thaw"]
    monkeypatch.setattr(snapshot_choice.metadata, "entry_points", lambda **_: found)
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path))
    for name in ("VLLM_PLUGINS", "THAW_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    return found


def chosen(*words, snapshot=None, model="m"):
    return choose(snapshot, model, words, None, None)


def test_it_is_automatic(tmp_path):
    extra = {"mode": "auto", "cache": str(tmp_path / "snapshots")}
    assert chosen() == chosen(snapshot=AUTO) == chosen("--port", "1", "--nnodes", "1") == Choice(extra)
    assert chosen("--data-parallel-size", "2", "-ep") == chosen("-dp", "2") == Choice(extra)


def test_words_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert chosen(snapshot=NONE) == Choice() == chosen("--load-format", "x", snapshot=NONE)
    for file in ("./auto", "w.thaw", "./none"):
        path = str(tmp_path / file.removeprefix("./"))
        assert chosen(snapshot=file) == Choice({"snapshot": path}, path)
    with pytest.raises(UsageError, match="empty"):
        chosen(snapshot="")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load-format", "dummy"], "--load-format is given"),
        (["--load_format=dummy"], "--load-format is given"),
        (["--load-fo", "dummy"], "--load-format is given"),
        (["--model-loader-extra-config", "{}"], "--model-loader-extra-config is given"),
        (["--model-loader-extra-config.a", "1"], "--model-loader-extra-config is given"),
        (["--nnodes", "2"], "several machines"),
        (["-n", "2"], "several machines"),
        (["--distributed-executor-backend", "ray"], "several machines"),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "2"], "several machines"),
        (["-dp", "4", "-dpa", "10.0.0.1"], "several machines"),
        (["--data-parallel-start-rank=2", "--headless"], "several machines"),
    ],
)
def test_it_steps_back(words, said):
    found = chosen(*words)
    assert found.extra is None and said in found.said


def test_it_steps_back_from_a_file(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 3\nmax-model-len: 10\n")
    assert chosen("--config", str(file)).extra is not None
    file.write_text("port: 3\nload_format: dummy\n")
    assert "names load_format" in chosen("--config", str(file)).said
    assert chosen("--config", str(tmp_path / "none")).extra is not None  # vLLM's to say


def test_it_steps_back_from_what_would_not_start(installed, monkeypatch):
    assert "object stores" in chosen(model="s3://bucket/model").said
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "add thaw" in chosen().said
    monkeypatch.setenv("VLLM_PLUGINS", "other,thaw")
    assert chosen().said is None
    installed.clear()
    assert "not installed as a plugin" in chosen().said


def test_no_home(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("THAW_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)
    assert "--cache-dir names one" in chosen().said


def test_weights_of_other_engines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = chosen(snapshot="w.thaw")
    assert among_engines(choice, None, False) is choice
    assert among_engines(choice, "auto", True).extra == choice.extra | {"peer": "auto", "offer": True}
    assert among_engines(choice, "a.sock", False).extra == choice.extra | {"peer": str(tmp_path / "a.sock")}
    named = among_engines(choice, "tcp://[::1]:5", False)
    assert named.extra == choice.extra | {"peer": "tcp://[::1]:5"}
    with pytest.raises(UsageError, match="is no address of a peer"):
        among_engines(choice, "tcp://host", False)
    assert among_engines(chosen(), None, True).extra == chosen().extra | {"offer": True}
    with pytest.raises(UsageError, match="empty"):
        among_engines(choice, "", False)
    for other in (chosen(snapshot=NONE), chosen("--load-format", "x")):
        with pytest.raises(UsageError, match="for weights of a snapshot"):
            among_engines(other, None, True)
