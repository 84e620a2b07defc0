"""What the preset chooses, what it leaves to whoever has chosen, and where what is compiled is kept."""

import os

import pytest

from thaw_vllm.engines.vllm.fast_start import CACHES, PLAN, SIZES, cache_variables, fast_start
from thaw_vllm.errors import StorageError

GRAPHS = {"cudagraph_capture_sizes": list(SIZES)}


def test_on_a_gpu():
    preset = fast_start([], {}, gpu=True)
    assert preset.engine_args == GRAPHS and preset.environment == {PLAN: "1"}
    graphs, memory = preset.said
    assert "1, 2, 4, 8 only" in graphs and "more than 8 requests" in graphs and "--cudagraph-capture-sizes" in graphs
    assert "not measured again" in memory


@pytest.mark.parametrize(
    "name",
    [
        *("--cudagraph-capture-sizes", "cudagraph_capture_sizes", "--max_cudagraph_capture_size", "-cc", "-O", "-O1"),
        *("--compilation-config.mode", "-cc.mode", "--optimization-level", "--config"),
    ],
)
def test_graphs_that_were_chosen(name):
    preset = fast_start(["--port", name], {}, gpu=True)
    assert preset.engine_args == {} and preset.environment == {PLAN: "1"}
    assert preset.said[0] == "CUDA graphs as you chose"


@pytest.mark.parametrize("name", ["--port", "--otlp-traces-endpoint", "--no-enforce-eager", "--ccc", "--Other"])
def test_other_arguments(name):
    assert fast_start([name], {}, gpu=True).engine_args == GRAPHS


def test_no_graphs():
    preset = fast_start(["--enforce-eager"], {}, gpu=True)
    assert preset.engine_args == {} and preset.said[0].startswith("no CUDA graphs")


@pytest.mark.parametrize(("given", "environment"), [(["--kv-cache-memory-bytes"], {}), ([], {PLAN: "0"})])
def test_memory_that_was_chosen(given, environment):
    preset = fast_start(given, environment, gpu=True)
    assert preset.environment == {} and preset.engine_args == GRAPHS
    assert preset.said[1] == "memory for the KV cache as you chose"


def test_without_a_gpu():
    preset = fast_start([], {}, gpu=False)
    assert (preset.engine_args, preset.environment) == ({}, {}) and "no GPU" in preset.said[0]


def test_directories_of_caches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cache_variables("new/caches")
    assert found.keys() == CACHES.keys() and len({*found.values()}) == len(found)
    assert all(os.path.dirname(path) == str(tmp_path / "new" / "caches") for path in found.values())
    assert os.listdir(tmp_path / "new" / "caches") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_variables("~/new/caches") == found


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_no_directory_for_caches(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"no caches can be kept in .*give another"):
        cache_variables(place)
