"""What installing thaw does to vLLM: one load format, two worker methods, nothing else."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import thaw_vllm.engines.vllm as package
from thaw_vllm.engines.vllm import plugin, versions, worker
from thaw_vllm.errors import MissingDependencyError, UnsupportedError

pytestmark = pytest.mark.vllm

ACCESSORS: dict[str, tuple[Any, ...]] = {
    "loader_registered": ("thaw",),
    "worker_base": (),
    "executor_class": (None,),
    "parallel_groups": (),
    "cpu_group": (),
    "identity_processing": (None,),
}
"""Functions of versions.py that reach into vLLM by name, with arguments to call them."""


def test_registering_twice_changes_nothing_more():
    from vllm.model_executor import model_loader
    from vllm.v1.worker.worker_base import WorkerBase

    plugin.register()
    environment, formats = dict(os.environ), dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    methods = {name: getattr(WorkerBase, name) for name in ("thaw_freeze", "thaw_report")}
    plugin.register()
    assert dict(os.environ) == environment
    assert formats == model_loader._LOAD_FORMAT_TO_MODEL_LOADER and "thaw" in formats
    assert all(getattr(WorkerBase, name) is method for name, method in methods.items())


def test_a_vllm_that_lost_a_name_starts_without_thaw(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def lost() -> Any:
        raise UnsupportedError("vLLM has no such name")

    monkeypatch.setattr(versions, "worker_base", lost)
    plugin.register()
    assert "load_format='thaw' is not available: vLLM has no such name" in caplog.text


def test_no_security_setting_is_named_in_the_source():
    for path in Path(package.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "ALLOW_INSECURE" not in source and "trust_remote_code=True" not in source, path.name


@pytest.mark.parametrize("accessor", sorted(ACCESSORS))
def test_a_name_that_vllm_lost_is_said_with_the_window(accessor: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions.importlib, "import_module", lambda name: object())
    with pytest.raises(UnsupportedError, match=r"has no vllm\..*0\.24 to 0\.32"):
        getattr(versions, accessor)(*ACCESSORS[accessor])


def test_an_old_vllm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "0.23.9")
    with pytest.raises(UnsupportedError, match=r"older than 0\.24"):
        versions.vllm_version()


def test_a_missing_vllm_gives_the_install_line(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise versions.metadata.PackageNotFoundError(name)

    def no_module(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(versions.metadata, "version", missing)
    monkeypatch.setattr(versions.importlib, "import_module", no_module)
    with pytest.raises(MissingDependencyError, match="pip install vllm"):
        versions.vllm_version()


def private(path: Path) -> list[str]:
    """Underscored names that a file imports from vLLM or reaches through a vLLM module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    return found


def test_private_names_live_in_versions_alone():
    for path in Path(package.__file__).parent.glob("*.py"):
        if path.name != "versions.py":
            assert not private(path), path.name


def test_every_private_name_is_documented():
    documented = Path("docs/architecture.md").read_text()
    tree = ast.parse(Path(versions.__file__).read_text())
    names = [
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "_get"
        and isinstance(call.args[1], ast.Constant)
    ]
    assert len(names) >= 5
    for name in names:
        assert re.search(rf"`[\w.]*\b{name}\b[\w.()]*`", documented), name


def test_lora_adapters_keep_a_running_engine_from_being_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The worker is a stand-in: a real one whose post-processing changes nothing needs a GPU."""
    monkeypatch.setattr(versions, "identity_processing", lambda model: None)
    config = SimpleNamespace(lora_config=object(), model_config=SimpleNamespace())
    standin = SimpleNamespace(get_model=lambda: None, vllm_config=config)
    answer = worker.thaw_freeze(standin, str(tmp_path / "w.thaw"))
    assert answer["error"] == "UnsupportedError" and "LoRA adapters" in answer["message"]
    assert not list(tmp_path.iterdir())
