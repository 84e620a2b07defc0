"""Names under which compiled code is found, without an engine: vLLM's own names are made up."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from thaw_vllm.engines.vllm import compiled, versions
from thaw_vllm.engines.vllm.versions import CompiledName
from thaw_vllm.errors import UnsupportedError

FACTORS = {"variables": {"VLLM_X": 1}, "configuration": "c", "part": "p", "others": [{"a": "1"}, {"digest": "d"}]}
FILE = "rank_0_0/model"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Sets what vLLM calls the compiled code of the next start."""
    monkeypatch.setattr(versions, "cache_root", lambda: tmp_path / "vllm")
    monkeypatch.setattr(versions, "plan_name", lambda config, instead: None)
    monkeypatch.setattr(compiled, "_instead", lambda model_config: "")

    def named(own, anywhere="anywhere", factors=FACTORS):
        name = CompiledName(tmp_path / "vllm" / "aot", own, anywhere, factors)
        monkeypatch.setattr(versions, "compiled_name", lambda config, key, instead: name)
        return name.directory

    return named


def start(rank=0, parts=("part",)):
    """One start up to its compiling; what it found."""
    parallel = SimpleNamespace(rank=rank, data_parallel_index=0)
    config = SimpleNamespace(parallel_config=parallel, model_config=None)
    with pytest.MonkeyPatch.context() as patch:
        watching = []
        patch.setattr(versions, "watch_compiling", watching.append)
        compiled.prepare(config)
    assert compiled.report() is None, "vLLM's configuration is not complete before it compiles"
    for key in parts:
        watching[0](SimpleNamespace(vllm_config=config), key)
    found = compiled.report()["parts"]
    assert len(found) == len(parts)
    return compiled.Looked(**found[-1])


def compile_as_vllm(directory, own, text="code"):
    (directory / own / FILE).parent.mkdir(parents=True, exist_ok=True)
    (directory / own / FILE).write_text(text)


def test_found_under_another_name(vllm):
    directory = vllm("one")
    assert start() == compiled.Looked(
        "new", "this model is compiled: nothing that was compiled is in the cache", "anywhere"
    )
    compile_as_vllm(directory, "one")
    vllm("two")
    assert start() == compiled.Looked("found", "", "anywhere")
    assert (directory / "two" / FILE).read_text() == "code"
    assert not (directory / "thaw-anywhere").is_symlink()


def test_what_was_compiled_without_thaw_gets_the_second_name(vllm):
    directory = vllm("one")
    compile_as_vllm(directory, "one")
    assert start().state == "found"
    vllm("two")
    assert start().state == "found"
    assert (directory / "one").is_dir() and not (directory / "one").is_symlink()


def test_links_that_lead_nowhere_are_made_anew(vllm):
    directory = vllm("one")
    directory.mkdir(parents=True)
    (directory / "one").symlink_to("gone")
    assert start().state == "new"
    compile_as_vllm(directory, "one")
    assert start().state == "found"


def test_each_rank_has_its_own(vllm):
    directory = vllm("one")
    compile_as_vllm(directory, "one")
    assert start(rank=1).state == "new"
    assert start(rank=0).state == "found"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"variables": {"VLLM_X": 2}}, "VLLM_X (1, here 2)"),
        ({"variables": {"VLLM_Y": 2}}, "VLLM_X (1, here None); VLLM_Y (None, here 2)"),
        ({"configuration": "other"}, "the model's configuration or vLLM's arguments"),
        ({"part": "other"}, "vLLM's version, or the model's class"),
        ({"others": [{"a": "2"}, {"digest": "d"}]}, "a of PyTorch (1, here 2)"),
        ({"others": [{"a": "1"}]}, "digest of PyTorch (d, here None)"),
    ],
)
def test_why_nothing_was_found(vllm, change, told):
    directory = vllm("one")
    start()
    compile_as_vllm(directory, "one")
    vllm("two", "elsewhere", FACTORS | change)
    found = start()
    assert found.state == "new"
    assert found.why.endswith(f"compiled for another start, which differs in {told}")


def test_the_nearest_is_told(vllm):
    vllm("one", "far", FACTORS | {"variables": {"VLLM_X": 9, "VLLM_Y": 9}, "part": "q"})
    start()
    vllm("two", "near", FACTORS | {"part": "q"})
    start()
    vllm("three")
    assert start().why.endswith("differs in vLLM's version, or the model's class")


def test_factors_that_are_damaged_are_passed_over(vllm):
    directory = vllm("one")
    for number, text in enumerate(("", "{", "[]", '{"variables": 1}', '"text"')):
        (directory / f"thaw-{number}").mkdir(parents=True)
        (directory / f"thaw-{number}" / compiled.FACTORS).write_text(text)
    assert start().why == "this model is compiled: nothing that was compiled is in the cache"


@pytest.mark.parametrize(
    "error", [UnsupportedError("no such name"), OSError(30, "Read-only file system"), KeyError("moved")]
)
def test_no_start_fails_for_it(vllm, monkeypatch, error):
    def fail(*args):
        raise error

    vllm("one")
    monkeypatch.setattr(versions, "compiled_name", fail)
    monkeypatch.setattr(versions, "plan_name", fail)
    found = start()
    assert found.state == "refused" and "under vLLM's names only" in found.why


def test_a_vllm_that_cannot_be_watched(monkeypatch):
    def fail(look):
        raise UnsupportedError("no such name")

    monkeypatch.setattr(versions, "watch_compiling", fail)
    compiled.prepare(SimpleNamespace(model_config=None))
    (found,) = compiled.report()["parts"]
    assert found["state"] == "refused" and found["why"].endswith("under vLLM's names only: no such name")


def test_every_part_is_told(vllm):
    vllm("one")
    start(parts=("language", "vision"))


def test_ranks_that_do_so_at_once(vllm, monkeypatch):
    """The other one is always a step ahead."""
    directory = vllm("one")
    compile_as_vllm(directory, "thaw-anywhere")
    name, real, ahead = CompiledName(directory, "one", "anywhere", FACTORS), os.replace, []

    def replace(source, target):
        if not ahead:
            ahead.append(True)
            assert compiled._link(name, FILE)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert compiled._link(name, FILE)
    assert ahead and os.readlink(directory / "one") == "thaw-anywhere"
    assert sorted(path.name for path in directory.iterdir()) == ["one", "thaw-anywhere"]


def test_an_empty_directory_in_the_place_of_a_link(vllm):
    directory = vllm("one")
    compile_as_vllm(directory, "thaw-anywhere")
    (directory / "one" / "inductor_cache").mkdir(parents=True)
    assert start().state == "found"
    assert (directory / "one" / FILE).read_text() == "code"


class TestMeasuredMemory:
    """What VLLM_ENABLE_STARTUP_PLAN keeps, which holds its own name."""

    @pytest.fixture
    def plan(self, vllm, tmp_path, monkeypatch):
        vllm("one")

        def named(own, anywhere="anywhere"):
            name = CompiledName(tmp_path / "vllm" / "startup_plan", own, anywhere, {})
            monkeypatch.setattr(versions, "plan_name", lambda config, instead: name)
            return name.directory

        return named

    def test_taken_from_another_name(self, plan):
        directory = plan("two")
        directory.mkdir(parents=True)
        measured = {"fingerprint": "one", "kv_cache_memory_bytes": 7}
        (directory / "startup_plan_thaw-anywhere.json").write_text(json.dumps(measured))
        start()
        assert json.loads((directory / "startup_plan_two.json").read_text()) == measured | {"fingerprint": "two"}

    def test_its_own_stays(self, plan):
        directory = plan("two")
        directory.mkdir(parents=True)
        (directory / "startup_plan_thaw-anywhere.json").write_text("{}")
        (directory / "startup_plan_two.json").write_text("own")
        start()
        assert (directory / "startup_plan_two.json").read_text() == "own"

    def test_both_names_are_noted(self, plan):
        directory = plan("two")
        start()
        assert (directory / "thaw-anywhere.name").read_text() == "two"

    @pytest.mark.parametrize("text", ["", "[1]", "{"])
    def test_one_that_is_damaged_is_measured_again(self, plan, text):
        directory = plan("two")
        directory.mkdir(parents=True)
        (directory / "startup_plan_thaw-anywhere.json").write_text(text)
        start()
        assert not (directory / "startup_plan_two.json").exists()


def test_what_stands_for_a_path(tmp_path):
    """What vLLM reads beside the configuration, and does not hash."""
    (tmp_path / "config.json").write_text("{}")

    def instead():
        return compiled._instead(SimpleNamespace(model=str(tmp_path), hf_config_path=None, revision=None))

    plain = instead()
    assert str(tmp_path) not in plain
    (tmp_path / "hf_quant_config.json").write_text("{}")
    quantised = instead()
    (tmp_path / "hf_quant_config.json").write_text('{"a": 1}')
    assert len({plain, quantised, instead()}) == 3


def test_vllm_says_when_it_compiles():
    """vLLM's own function, through which every part goes."""
    from vllm.compilation import decorators

    class Part:
        def forward(self):
            """Nothing."""

    real, seen = decorators._model_hash_key, []
    try:
        expected = real(Part().forward)
        versions.watch_compiling(lambda part, key: seen.append("old"))
        versions.watch_compiling(lambda part, key: seen.append((part, key)))
        part = Part()
        assert decorators._model_hash_key(part.forward) == expected
        assert seen == [(part, expected)]
    finally:
        decorators._model_hash_key = real


def test_names_of_a_real_configuration(tmp_path, monkeypatch):
    """Both names change with what is compiled; the path is in vLLM's alone, and so is, up to 0.26, the home."""
    from tests.engines.vllm.models import BASE
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    def name(directory, **arguments):
        LlamaConfig(**BASE, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16).save_pretrained(directory)
        options = {"max_model_len": 128, "skip_tokenizer_init": True} | arguments
        config = EngineArgs(model=str(directory), **options).create_engine_config()
        return versions.compiled_name(config, "key", "instead")

    first, moved = name(tmp_path / "a"), name(tmp_path / "b" / "c")
    assert first.anywhere == moved.anywhere and first.own != moved.own
    assert name(tmp_path / "a").own == first.own
    other = name(tmp_path / "a", max_num_batched_tokens=256)
    assert other.anywhere != first.anywhere and other.own != first.own
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert name(tmp_path / "a").anywhere == first.anywhere
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,1")
    assert name(tmp_path / "a").anywhere != first.anywhere
    assert str(tmp_path) not in json.dumps(first.factors, default=str)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert "s3cret" not in json.dumps(name(tmp_path / "a").factors, default=str)


def test_triton_is_prepared_as_in_a_process_that_compiles(vllm, monkeypatch):
    """PyTorch's own functions, by the names that are called."""
    from torch._inductor.runtime import compile_tasks

    called = []
    for name in versions._CHOOSES:
        assert callable(getattr(compile_tasks, name))
        monkeypatch.setattr(compile_tasks, name, lambda name=name: called.append(name))
    vllm("one")
    start()
    assert called == list(versions._CHOOSES)
    monkeypatch.delattr(compile_tasks, versions._CHOOSES[0])
    monkeypatch.setattr(compile_tasks, versions._CHOOSES[1], lambda: 1 / 0)
    assert start().state == "new"
