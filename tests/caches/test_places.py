"""Where what is compiled is kept, as vLLM and each compiler choose it; and what of it another machine can use."""

import getpass
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from thaw_vllm.caches.places import UNSET, Place, carried, empty, files, places

NAMES = {"vllm", "triton", "inductor", "flashinfer", "deep-gemm", "cuda"}
HOME = {"HOME": "/h"}


def found(**variables):
    return {name: str(place.directory) for name, place in places(HOME | variables).items()}


def test_where_nobody_has_chosen(monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/t")
    monkeypatch.setattr(getpass, "getuser", lambda: "a/b:c")
    assert found() == {
        "vllm": "/h/.cache/vllm",
        "triton": "/h/.triton/cache",
        "inductor": "/t/torchinductor_a_b_c",
        "flashinfer": "/h/.cache/flashinfer",
        "deep-gemm": "/h/.cache/vllm/deep_gemm",
        "cuda": "/h/.nv/ComputeCache",
    }
    assert all(place.name == name for name, place in places(HOME).items())


def test_a_user_of_no_name(monkeypatch):
    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert Path(found()["inductor"]).name == f"torchinductor_{os.getuid()}"


@pytest.mark.parametrize(
    ("variable", "changed"),
    [
        ("XDG_CACHE_HOME", {"vllm": "/x/vllm", "deep-gemm": "/x/vllm/deep_gemm"}),
        ("VLLM_CACHE_ROOT", {"vllm": "/x", "deep-gemm": "/x/deep_gemm"}),
        ("TRITON_HOME", {"triton": "/x/.triton/cache"}),
        ("TRITON_CACHE_DIR", {"triton": "/x"}),
        ("TORCHINDUCTOR_CACHE_DIR", {"inductor": "/x"}),
        ("FLASHINFER_WORKSPACE_BASE", {"flashinfer": "/x/.cache/flashinfer"}),
        ("DG_JIT_CACHE_DIR", {"deep-gemm": "/x"}),
        ("CUDA_CACHE_PATH", {"cuda": "/x"}),
    ],
)
def test_each_variable(variable, changed):
    assert found(**{variable: "/x"}) == found() | changed
    assert found(**{variable: ""}) == found(), "an empty one chooses nothing"


def test_which_variable_comes_first():
    assert found(XDG_CACHE_HOME="/x", VLLM_CACHE_ROOT="/v")["vllm"] == "/v"
    assert found(VLLM_CACHE_ROOT="/v", DG_JIT_CACHE_DIR="/d")["deep-gemm"] == "/d"
    assert found(TRITON_HOME="/x", TRITON_CACHE_DIR="/t")["triton"] == "/t"


def test_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    assert found(TRITON_CACHE_DIR="t", CUDA_CACHE_PATH="a/../c")["triton"] == str(tmp_path / "t")
    assert found(CUDA_CACHE_PATH="a/../c")["cuda"] == str(tmp_path / "c")
    assert found(VLLM_CACHE_ROOT="~/v")["vllm"] == "/h/v"


def test_without_a_home(monkeypatch):
    with pytest.raises(RuntimeError, match="no home directory"):
        places({"HOME": "relative"})
    monkeypatch.setenv("HOME", "/of/this/process")
    assert str(places({})["cuda"].directory) == "/of/this/process/.nv/ComputeCache"


@pytest.mark.skipif(not all(map(find_spec, ("torch", "triton"))), reason="PyTorch or Triton is not installed")
def test_as_the_libraries_themselves_choose(tmp_path):
    chosen = [{}, empty(tmp_path / "e"), {"TRITON_CACHE_DIR": "/t", "TRITON_HOME": "/x"}]
    chosen = [{"HOME": str(tmp_path), "PATH": os.environ["PATH"], **variables} for variables in chosen]
    code = """
import json, os, sys
import triton.knobs
from torch._inductor.runtime.cache_dir_utils import cache_dir
for variables in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(variables)
    print(triton.knobs.cache.dir, cache_dir())
"""
    command = [sys.executable, "-c", code, json.dumps(chosen)]
    ran = subprocess.run(command, env=chosen[0], capture_output=True, text=True, check=True)
    ours = [places(variables) for variables in chosen]
    assert ran.stdout.splitlines() == [f"{p['triton'].directory} {p['inductor'].directory}" for p in ours]


def test_a_start_with_nothing_in_them(tmp_path):
    environment = HOME | empty(tmp_path / "e")
    there = places(environment)
    assert there.keys() == NAMES and not environment.keys() & set(UNSET)
    directories = [place.directory for place in there.values()]
    assert all(directory.is_relative_to(tmp_path / "e") for directory in directories)
    assert len(set(directories)) == len(directories) and not (tmp_path / "e").exists()


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "DG_JIT_CACHE_DIR"])
def test_why_some_must_not_be_set(tmp_path, variable):
    assert variable in UNSET
    there = places(HOME | empty(tmp_path) | {variable: "/elsewhere"})
    assert sum(place.directory == Path("/elsewhere") for place in there.values()) == 1


AOT = "vllm/torch_compile_cache/torch_aot_compile"
CARRIED = [
    f"{AOT}/thaw-{'a' * 64}/rank_0_0/model",
    f"{AOT}/thaw-{'0' * 64}/inductor_cache/triton/0/K/__grp__k.json",
    "vllm/modelinfos/vllm-model_executor-models-llama.json",
    f"vllm/startup_plan/startup_plan_thaw-{'a' * 64}.json",
    "vllm/flashinfer_autotune_cache/0.5/90a/x/autotune_configs.json",
    "vllm/assets2/x",
    "triton/K/k.cubin",
    "triton/K/k.lock.json",
    "triton/K/locker",
    "triton/K/tmp",
    "inductor/ab/cab.py",
    "inductor/aotautograd/x",
    "flashinfer/0.5/90a/cached_ops/x/x.so",
    "deep-gemm/cache/kernel.x/kernel.cubin",
    "deep-gemm/thaw/x",
    "cuda/a/b/c",
    "triton/assets/x",
]
LEFT = [
    "vllm/gpu_p2p_access_cache_for_0,1,2,3.json",
    "vllm/startup_plan/startup_plan_0123456789.json",
    "vllm/startup_plan/thaw-0123.name",
    "vllm/torch_compile_cache/0123456789/rank_0_0/backbone/x",
    "vllm/torch_compile_cache/torch_aot_compile",
    f"{AOT}/{'a' * 64}/rank_0_0/model",
    f"{AOT}/thaw-{'a' * 63}/rank_0_0/model",
    f"{AOT}/thaw-{'A' * 64}/rank_0_0/model",
    f"{AOT}/thaw-{'a' * 64}x/rank_0_0/model",
    "vllm/deep_gemm/cache/kernel.x/kernel.cubin",
    "vllm/assets/a.jpg",
    "vllm/dummy_cache/x",
    "vllm/xla_cache/x",
    "vllm/thaw/snapshots/x.thaw",
    "vllm/usage_stats.json",
    "triton/K/k.lock",
    "triton/K/.lock",
    "triton/lock/x",
    "inductor/locks/x.lock",
    "inductor/.locks/x",
    "flashinfer/0.5/90a/x.tmp/x",
    "triton/K/tmp.pid_1_2/k.cubin",
    "inductor/ab/__pycache__/cab.pyc",
    "inductor/.x.123.tmp",
]


@pytest.mark.parametrize("path", CARRIED)
def test_what_travels(path):
    assert carried(path)


@pytest.mark.parametrize("path", LEFT)
def test_what_does_not(path):
    assert not carried(path)


def test_files_of_a_place(tmp_path):
    """In order, those that travel; links are left out, and not followed."""
    for name in [*CARRIED, *LEFT]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name).is_dir():
            (tmp_path / name).touch()
    (tmp_path / "triton/K/link").symlink_to("k.cubin")
    (tmp_path / "triton/folder").symlink_to(tmp_path / "inductor")
    os.mkfifo(tmp_path / "triton/K/pipe")
    told = {name: list(files(Place(name, tmp_path / name))) for name in ("vllm", "triton", "inductor")}
    for name, items in told.items():
        expected = {path for path in CARRIED if path.startswith(f"{name}/")}
        assert {path for path, _ in items} == expected and len(items) == len(expected)
        assert all(where == tmp_path / path for path, where in items)
        assert items == list(files(Place(name, tmp_path / name)))
    (tmp_path / "linked").symlink_to("triton")
    assert [path for path, _ in files(Place("triton", tmp_path / "linked"))] == [path for path, _ in told["triton"]]
    assert list(files(Place("none", tmp_path / "none"))) == []


def test_the_order_of_files_is_that_of_their_names(tmp_path):
    for name in ("c", "a", "b/d", "b/a", "A/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path for path, _ in files(Place("x", tmp_path))] == ["x/a", "x/c", "x/A/z", "x/b/a", "x/b/d"]
