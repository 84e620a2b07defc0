"""What the preset chooses, what it leaves to whoever has chosen, and where what is compiled is kept."""

import os
from types import SimpleNamespace

import pytest

from thaw_vllm.engines.vllm import api
from thaw_vllm.engines.vllm import fast_start as module
from thaw_vllm.engines.vllm.command_line import given
from thaw_vllm.engines.vllm.fast_start import BUNDLE, CACHES, PLAN, SIZES, cache_variables, fast_start, set_meanwhile
from thaw_vllm.errors import StorageError, UsageError

GRAPHS = {"cudagraph_capture_sizes": list(SIZES)}
ONE_FILE = {BUNDLE: "1"}


def chosen(words, environment=None):
    return fast_start(given(words), environment or {}, gpu=True)


def test_on_a_gpu():
    preset = chosen([])
    assert preset.engine_args == GRAPHS and preset.environment == {PLAN: "1"} | ONE_FILE
    graphs, compiled, memory = preset.said
    assert "1, 2, 4, 8 tokens only" in graphs and "more than 8 requests" in graphs
    assert "--cudagraph-capture-sizes" in graphs and "not measured again" in memory
    assert "as one file" in compiled and "compiled once more" in compiled and f"{BUNDLE}=0" in compiled


@pytest.mark.parametrize(
    "words",
    [
        *(["--cudagraph-capture-sizes", "1"], ["--max_cudagraph_capture_size=8"], ["--max-cudagraph=8"]),
        *(["-cc.cudagraph_mode=NONE"], ["-cc", "{}"], ["--compilation-config.mode=3"], ["-O0"], ["-O", "0"], ["-O=1"]),
        *(["--optimization-level", "1"], ["--performance-mode", "interactivity"]),
        *(["--speculative-config", "{}"], ["-sc.method=ngram"], ["--spec-method", "ngram"], ["--spec-tokens=8"]),
    ],
    ids=" ".join,
)
def test_graphs_that_were_chosen(words):
    preset = chosen(["--port", "1", *words])
    assert preset.engine_args == {} and preset.environment == {PLAN: "1"} | ONE_FILE
    assert preset.said[0] == "CUDA graphs as you chose"


@pytest.mark.parametrize(
    "words",
    [
        *(["--port"], ["--otlp-traces-endpoint"], ["--no-enforce-eager"], ["--ccc"], ["--Other"], ["-tp", "2"]),
        *(["--ssl-certfile", "config.pem"], ["--served-model-name", "O3", "sc"], ["--specialize-active-lora"]),
    ],
    ids=" ".join,
)
def test_other_arguments(words):
    preset = chosen(words)
    assert preset.engine_args == GRAPHS and preset.environment == {PLAN: "1"} | ONE_FILE


@pytest.mark.parametrize("word", ["--enforce-eager", "--enforce_eager", "--enforce"])
def test_no_graphs(word):
    preset = chosen([word])
    assert preset.engine_args == {} and preset.said[0].startswith("no CUDA graphs")
    assert preset.environment == {PLAN: "1"}, "nothing is compiled"


@pytest.mark.parametrize(
    "environment",
    [
        {BUNDLE: "0"},
        {BUNDLE: ""},
        {"VLLM_USE_AOT_COMPILE": "0"},
        {"VLLM_USE_AOT_COMPILE": "false"},
        {"VLLM_USE_STANDALONE_COMPILE": "no"},
        {"VLLM_DISABLE_COMPILE_CACHE": "1"},
        {"VLLM_DISABLE_COMPILE_CACHE": "01"},
        {"VLLM_BATCH_INVARIANT": "1"},
    ],
    ids=lambda variables: "=".join(next(iter(variables.items()))),
)
def test_compiled_code_as_was_chosen(environment):
    preset = chosen([], environment)
    assert preset.environment == {PLAN: "1"} and not any("one file" in line for line in preset.said)


def test_variables_that_say_what_vllm_does_anyway():
    given = {"VLLM_USE_AOT_COMPILE": "1", "VLLM_DISABLE_COMPILE_CACHE": "0", "VLLM_BATCH_INVARIANT": "0"}
    assert chosen([], given).environment == {PLAN: "1"} | ONE_FILE


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--kv-cache-memory-bytes", "1"], {}),
        (["--kv-cache-memory=1"], {}),
        (["--gpu-memory-utilization", "0.4"], {}),
        ([], {PLAN: "0"}),
    ],
)
def test_memory_that_was_chosen(words, environment):
    """vLLM applies a plan whatever gpu_memory_utilization says: then the KV cache would be that of another start."""
    preset = chosen(words, environment)
    assert preset.environment == ONE_FILE and preset.engine_args == GRAPHS
    assert preset.said[-1] == "memory for the KV cache as you chose"


def test_a_file_may_choose_both():
    preset = chosen(["--config", "vllm.yaml"])
    assert (preset.engine_args, preset.environment) == ({}, ONE_FILE)
    assert all("as you chose" in line for line in (preset.said[0], preset.said[-1]))


def test_arguments_in_python():
    not_given = {"enforce_eager": False, "compilation_config": None, "max_model_len": 64}
    assert fast_start(not_given, {}, gpu=True).engine_args == GRAPHS
    assert fast_start({"enforce_eager": True}, {}, gpu=True).engine_args == {}
    assert fast_start({"compilation_config": {}}, {}, gpu=True).engine_args == {}


@pytest.mark.parametrize(
    ("environment", "there"),
    [({}, False), ({"CUDA_VISIBLE_DEVICES": ""}, True), ({"CUDA_VISIBLE_DEVICES": "-1"}, True)],
)
def test_without_a_gpu(environment, there, monkeypatch):
    def load(name):
        if not there:
            raise OSError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    preset = fast_start({}, environment)
    assert (preset.engine_args, preset.environment) == ({}, {}) and "no GPU" in preset.said[0]


def test_variables_that_are_set_meanwhile(monkeypatch):
    monkeypatch.setenv("THAW_TEST_A", "before")
    monkeypatch.delenv("THAW_TEST_B", raising=False)
    with pytest.raises(KeyError), set_meanwhile({"THAW_TEST_A": "1", "THAW_TEST_B": "2"}):
        assert (os.environ["THAW_TEST_A"], os.environ["THAW_TEST_B"]) == ("1", "2")
        raise KeyError
    assert os.environ["THAW_TEST_A"] == "before" and "THAW_TEST_B" not in os.environ


@pytest.mark.parametrize("fast", [True, False])
def test_load(fast, monkeypatch):
    """Of a vLLM that is not there."""
    monkeypatch.setenv(PLAN, "")
    seen = []
    vllm = SimpleNamespace(LLM=lambda **options: seen.append((options, os.environ[PLAN])))
    monkeypatch.setattr(module, "has_gpu", lambda environment: True)
    monkeypatch.setattr(api, "require_vllm", lambda: vllm)
    for name, value in (("vllm_version", "0.26.0"), ("check_sizes", None), ("_check_options", None)):
        owner = api.versions if name == "vllm_version" else api
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    api.load("m", "W.thaw", fast_start=fast, max_model_len=64)
    ((options, plan),) = seen
    assert options["max_model_len"] == 64 and options["load_format"] == "thaw"
    assert options.get("cudagraph_capture_sizes") == (list(SIZES) if fast else None)
    assert plan == ("1" if fast else "") and os.environ[PLAN] == ""


def test_directories_of_caches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cache_variables("new/caches")
    assert found.keys() == CACHES.keys() and len({*found.values()}) == len(found)
    assert all(os.path.dirname(path) == str(tmp_path / "new" / "caches") for path in found.values())
    assert os.listdir(tmp_path / "new" / "caches") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_variables("~/new/caches") == found
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert cache_variables("link/../new/caches") == cache_variables(tmp_path / "link" / "caches") == found


def test_no_name_for_caches():
    with pytest.raises(UsageError, match="--cache-dir is empty"):
        cache_variables("")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_no_directory_for_caches(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"no caches can be kept in .*give another"):
        cache_variables(place)
