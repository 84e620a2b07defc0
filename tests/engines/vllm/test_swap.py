"""Weights swapped in real engines of several processes, on the CPU: packing of weights is left out (swap_safe)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.engines.vllm.forks import COMPILES, PARALLEL
from tests.engines.vllm.kv_files import flipped
from tests.engines.vllm.test_engine import freeze
from tests.engines.vllm.test_kv import run_script

pytestmark = pytest.mark.vllm

SWAP_SAFE = Path(__file__).with_name("swap_safe")
ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
}


def config_changed(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OTHERS: dict[str, Callable[[Path], Any]] = {
    "template": lambda directory: (directory / "chat_template.jinja").write_text("{{ other }}"),
    "rope": lambda directory: config_changed(directory, rope_theta=123456.0),
    "eps": lambda directory: config_changed(directory, rms_norm_eps=0.5),
    "eos": lambda directory: (directory / "generation_config.json").write_text('{"eos_token_id": 2}'),
}


_made: dict[Path, dict[str, Any]] = {}


def snapshots(model: Path, folder: Path, load: Callable, thaw_args: Callable) -> dict[str, Any]:
    """Of a model, of a fine-tune of it, compressed, of others that differ in what they may not, and of one with a bad
    byte."""
    if model in _made:
        return _made[model]
    made = fine_tuned(model, folder)
    first, second = made["first"], made["second"]
    for name, change in OTHERS.items():
        made[name] = Path(shutil.copytree(second, folder / name))
        change(made[name])
    for directory in made.values():
        load(directory, **thaw_args(directory.with_suffix(".thaw"), mode="freeze", compress=directory == second))
    corrupt = flipped(made["second"].with_suffix(".thaw"), folder / "corrupt.thaw", "model.layers.1")
    _made[model] = {
        "model": str(first),
        "first": str(first.with_suffix(".thaw")),
        "second": str(second.with_suffix(".thaw")),
        "others": {name: str(made[name].with_suffix(".thaw")) for name in OTHERS},
        "corrupt": str(corrupt),
    }
    return _made[model]


def fine_tuned(model: Path, folder: Path) -> dict[str, Path]:
    """A copy of a model, and of it with other weights."""
    first = Path(shutil.copytree(model, folder / "first"))
    (first / "chat_template.jinja").write_text("{{ messages }}")
    (first / "generation_config.json").write_text('{"eos_token_id": 1}')
    second = Path(shutil.copytree(first, folder / "second"))
    for file in second.glob("*.safetensors"):
        changed = {name: tensor * 1.25 + 0.01 for name, tensor in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    return {"first": first, "second": second}


def environment() -> dict[str, str]:
    """The plugin that leaves packing out, in every process."""
    return {"PYTHONPATH": os.pathsep.join([str(SWAP_SAFE), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = run_script("swap_engine.py", folder, asked, environment())
    return found


def weights_of(digests: dict[str, list[Any]]) -> dict[str, str]:
    return {path: digest for path, (_, digest) in digests.items()}


def addresses_of(digests: dict[str, list[Any]]) -> dict[str, int]:
    return {path: address for path, (address, _) in digests.items()}


def judge(found: dict[str, Any], asked: dict[str, Any]) -> None:
    """What holds of the synchronous script's answer on every device."""
    assert found["again"]["cached"] > 0 and found["again"]["answers"] == found["first"]["answers"]
    said = {name: answer["error"] for name, answer in found["refused"].items()}
    assert said == {name: "MismatchError" for name in asked["others"]}
    for name, why in {"template": "chat_template.jinja", "eos": "generation_config.json", "rope": "config"}.items():
        assert name not in said or why in found["refused"][name]["message"]
    after, digests = found["after_refusals"]
    assert after["answers"] == found["first"]["answers"] and digests == found["digests"]
    seen: dict[str, Any] = {"first": (found["first"]["answers"], weights_of(found["digests"]))}
    models = {}
    for cycle in found["cycles"]:
        which = cycle["which"]
        assert cycle["cached"] == 0, "what the other weights made is forgotten"
        assert addresses_of(cycle["digests"]) == addresses_of(found["digests"]), "in place"
        state = (cycle["answers"], weights_of(cycle["digests"]))
        assert seen.setdefault(which, state) == state
        assert models.setdefault(which, cycle["model"]) == cycle["model"] == cycle["report"]["model"] is not None
        assert cycle["report"]["bytes"] == found["check"]["bytes"] > 0
    assert seen["first"][0] != seen["second"][0] and models["first"] != models["second"]
    assert found["broken"]["error"] == "BrokenEngineError" and "start another one" in found["broken"]["message"]
    assert "Error" in found["after"], found["after"]
    assert found["alive"] == [], "the engine's processes have ended"


@pytest.fixture
def prepared(
    checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return snapshots(checkpoints("untied"), tmp_path_factory.mktemp("swap"), load, thaw_args)


def test_weights_are_swapped_and_every_tensor_is_the_snapshots(prepared: dict[str, Any], tmp_path: Path):
    asked = prepared | {"engine_args": ARGS, "cycles": 4, "park": 0, "asynchronous": False}
    judge(run(tmp_path, asked), asked)


def test_an_engine_that_has_compiled_its_code_is_swapped(prepared: dict[str, Any], tmp_path: Path):
    """Such code keeps what it was traced with; what is loaded from vLLM's cache does not."""
    root = tmp_path / "cache"
    more = {"THAW_TEST_COMPILED": "1", "VLLM_USE_AOT_COMPILE": "1", "VLLM_CACHE_ROOT": str(root), **COMPILES}
    asked = prepared | {"engine_args": ARGS | {"enforce_eager": False}, "cycles": 1, "park": 0, "asynchronous": False}
    judge(run_script("swap_engine.py", tmp_path, asked, environment() | more), asked)
    assert any((root / "torch_compile_cache" / "torch_aot_compile").rglob("model")), "it was compiled here"


def judge_killed(found: dict[str, Any]) -> None:
    """Who waits is told, nobody hangs, and nothing stays."""
    assert found["told"].get("error") == "BrokenEngineError", found["told"]
    assert "Error" in found["asked again"] and found["processes"] and found["alive"] == []


def ranks(checkpoints: Callable, folder: Path, **engine_args: Any) -> dict[str, Any]:
    """Sets of two ranks' files: of a model, of a fine-tune, and of that with a bad byte in the second rank's."""
    asked: dict[str, Any] = {"others": {}, "model": folder / "first", "corrupt": folder / "corrupt" / "weights.thaw"}
    for name, directory in fine_tuned(checkpoints("untied"), folder).items():
        asked[name] = folder / f"{name}-set" / "weights.thaw"
        asked[name].parent.mkdir()
        freeze(directory, asked[name], tensor_parallel_size=2, **engine_args)
    shutil.copytree(folder / "second-set", folder / "corrupt")
    (other,) = folder.glob("corrupt/weights.*.rank1.thaw")
    flipped(other, other, "model.layers.1")
    return asked


def test_an_engine_of_two_ranks(checkpoints: Callable, tmp_path: Path):
    """Each takes its own file of the other set; a damaged file of either closes the engine."""
    asked = ranks(checkpoints, tmp_path) | {"cycles": 2, "park": 0, "asynchronous": False}
    asked["engine_args"] = ARGS | {"tensor_parallel_size": 2}
    found = run_script("swap_engine.py", tmp_path, asked, environment() | PARALLEL)
    judge(found, asked)
    assert any(path.startswith("rank 1: ") for path in found["digests"])


@pytest.mark.parametrize("core", [False, True], ids=["worker", "core"])
def test_an_engine_that_is_killed_while_it_is_filled(core: bool, prepared: dict[str, Any], tmp_path: Path):
    asked = prepared | {"engine_args": ARGS, "what": "swap", "folder": tmp_path, "core": core}
    found = run_script("swap_faults.py", tmp_path, asked, environment())
    judge_killed(found)


def judge_asynchronous(found: dict[str, Any], asked: dict[str, Any]) -> None:
    first, second = found["first"], found["second"]
    assert first != second
    assert [one[1] for one in found["running"]] == ["length", "length"], "they had time to end"
    assert all(one == found["alone"] for one in found["running"]), "with the weights that they began with"
    late = found["late"]
    assert late[1] == "abort" or late in (first[0], second[0]), "it has the one's tokens or the other's, or none"
    assert found["patient"]["aborted"] == (late[1] == "abort")
    assert [one[1] for one in found["ended"]] == ["abort", "abort"] and found["at once"]["aborted"] == 2
    length = len(found["ended"][0][0])
    assert length < asked["long"] and found["back"] == first
    assert found["refused"] == "MismatchError" and found["unharmed"] == found["alone"]
    assert found["after_cancel"] == second, "a swap that has begun goes to its end"
    assert (found["broken"], found["left waiting"]) == ("BrokenEngineError", 0)


def test_requests_never_see_two_weights(prepared: dict[str, Any], tmp_path: Path):
    more = {"cycles": 0, "park": 0, "asynchronous": True, "long": 150, "begun": 0.3, "settle": 10}
    asked = prepared | {"engine_args": ARGS} | more
    judge_asynchronous(run(tmp_path, asked), asked)
