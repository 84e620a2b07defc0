import ast
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import thaw_vllm

HEAVY = ["torch", "numpy", "vllm", "transformers", "safetensors"]
NEEDS_ENGINE = {"ThawModelLoader"}


def loaded_after(code):
    """Which of HEAVY are loaded when a fresh interpreter has run ``code``, and what it printed."""
    report = f"import json, sys\nprint()\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said, _, names = ran.stdout.rstrip("\n").rpartition("\n")
    return json.loads(names), said


def test_import_is_light():
    assert loaded_after("import thaw_vllm; dir(thaw_vllm); thaw_vllm.__version__")[0] == []


@pytest.mark.parametrize("arguments", [["--help"], ["freeze", "--help"]], ids=" ".join)
def test_command_line_is_light(arguments):
    code = f"""
import sys
sys.argv = ["thaw", *{arguments}]
from thaw_vllm.cli.main import main
try:
    status = main()
except SystemExit as exit:
    status = exit.code
assert not status, status
"""
    loaded, said = loaded_after(code)
    assert loaded == []
    assert said.strip()


def test_errors_and_format_are_light():
    assert loaded_after("import thaw_vllm.errors, thaw_vllm.format")[0] == []


def test_plugin_is_light_until_it_is_called():
    """Every process of vLLM imports it, also those that never see a snapshot."""
    assert loaded_after("import thaw_vllm.engines.vllm.plugin")[0] == []


def test_all_is_exact():
    """What resolves at run time is what a type checker sees."""
    tree = ast.parse(Path(thaw_vllm.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    typed = [alias.asname or alias.name for node in imports for alias in node.names]
    assert sorted(thaw_vllm.__all__) == sorted([*typed, "__version__"])
    assert set(thaw_vllm.__all__) <= set(dir(thaw_vllm))


@pytest.mark.parametrize("name", thaw_vllm.__all__)
def test_every_name_resolves(name):
    if name in NEEDS_ENGINE and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    assert not isinstance(getattr(thaw_vllm, name), types.ModuleType)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="frost"):
        thaw_vllm.frost  # noqa: B018
