"""What may be swapped in place, and what is refused with which reason; on a real model (swap_models.py)."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engines.vllm.swap_models import Running, changed_config, directory, engine, fine_tune, freeze, written
from torch._subclasses.fake_tensor import FakeTensorMode

from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.swap import check, filled, front, reach
from thaw_vllm.errors import CorruptionError, FormatError, MismatchError, StorageError, UnsupportedError

__all__ = ["directory", "engine", "fine_tune", "freeze"]  # fixtures

pytestmark = pytest.mark.vllm


class Slotted:
    __slots__ = ("__private", "held")

    def __init__(self, held: Any) -> None:
        self.held = held
        self.__private = [torch.zeros(1)]


class Apart:
    """An object that is no module."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def method(self) -> Any:
        return self.held


def enclosing(held: Any) -> Callable[[], Any]:
    return lambda: held


def defaulting(held: Any) -> Callable[..., Any]:
    def function(one: Any = held, *, two: Any = None) -> Any:
        return one, two

    return function


def kept(held: Any) -> Any:
    """A weak reference whose object something else keeps."""
    apart = Apart(held)
    keeping.append(apart)
    return weakref.ref(apart)


keeping: list[Any] = []
WRAPPERS: list[Callable[[Any], Any]] = [
    lambda held: [held],
    lambda held: (1, held),
    lambda held: {"key": held},
    lambda held: {held: "value"} if isinstance(held, torch.Tensor) else {"key": held},
    lambda held: {held} if isinstance(held, torch.Tensor) else [held],
    Apart,
    Slotted,
    lambda held: Apart(held).method,
    lambda held: functools.partial(print, held),
    lambda held: functools.partial(print, key=held),
    enclosing,
    defaulting,
    kept,
    lambda held: held.add_ if isinstance(held, torch.Tensor) else held.__init__ if isinstance(held, Apart) else [held],
    lambda held: torch.nn.ModuleList([module_with(held)]),
    lambda held: [module_with(held)],
    lambda held: SimpleNamespace(held=held),
]


def module_with(held: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    module.held = held
    return module


class TestReach:
    @pytest.mark.parametrize("number", range(len(WRAPPERS)))
    def test_wherever_it_hangs(self, number: int):
        hidden = torch.ones(3)
        model = torch.nn.Linear(2, 2)
        model.extra = WRAPPERS[number](hidden)
        assert any(tensor is hidden for _, tensor in reach.tensors(model))

    @pytest.mark.parametrize("seed", range(30))
    def test_however_deep(self, seed: int):
        draw, hidden = random.Random(seed), [torch.ones(2) for _ in range(5)]
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        for number, tensor in enumerate(hidden):
            value: Any = tensor
            for _ in range(draw.randrange(1, 8)):
                value = draw.choice(WRAPPERS)(value)
            setattr(draw.choice(list(model.modules())), f"extra{number}", value)
        found = {id(tensor) for _, tensor in reach.tensors(model)}
        assert found >= {id(tensor) for tensor in [*hidden, *model.parameters()]}

    def test_paths_are_the_models_names(self):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        model[0].scales = {"k": [torch.ones(1)]}
        model.on = model[0].weight
        found = {path: tensor for path, tensor in reach.tensors(model)}
        assert {"0.running_mean", "0.bias", "0.scales['k'][0]"} <= set(found)
        assert len(found) == len({id(tensor) for tensor in found.values()}), "each once"

    def test_what_is_attached_to_a_tensor(self):
        model, marked = torch.nn.Linear(2, 2), torch.ones(1)
        model.weight.marks = [marked]  # type: ignore[attr-defined]
        assert any(tensor is marked for _, tensor in reach.tensors(model))

    def test_what_goes_round_in_circles_ends(self):
        model = torch.nn.Linear(2, 2)
        model.me = [model]
        model.loop = model.me
        model.me.append(model.me)
        assert len(list(reach.tensors(model))) == 2

    def test_too_much_is_refused(self, monkeypatch: pytest.MonkeyPatch):
        model = torch.nn.Linear(2, 2)
        model.much = [[number] for number in range(100)]
        monkeypatch.setattr(reach, "MOST", 50)
        with pytest.raises(UnsupportedError, match="more than 50 objects"):
            list(reach.tensors(model))


class TestCovered:
    @pytest.mark.parametrize("seed", range(50))
    def test_against_bytes(self, seed: int):
        """Any parts of one memory, covered or not, against the numbers of their bytes."""
        draw, memory = random.Random(seed), torch.zeros(64, dtype=torch.uint8)

        def part() -> torch.Tensor:
            begin = draw.randrange(64)
            return memory[begin : begin + draw.randrange(1, 16)]

        def bytes_of(tensor: torch.Tensor) -> set[int]:
            return set(range(tensor.storage_offset(), tensor.storage_offset() + tensor.numel()))

        covered, parts = [part() for _ in range(draw.randrange(6))], [part() for _ in range(12)]
        filled_bytes = {number for tensor in covered for number in bytes_of(tensor)}
        model = torch.nn.Module()
        model.parts = parts
        left = {f"parts[{number}]" for number, one in enumerate(parts) if not bytes_of(one) <= filled_bytes}
        assert {path for path, _ in reach.uncovered(model, covered)} == left

    @pytest.mark.parametrize(
        "view",
        [
            lambda weight: weight.t(),
            lambda weight: weight[1:, 2:3],
            lambda weight: weight.reshape(-1)[3:],
            lambda weight: torch.ones(2, device="meta"),
            lambda weight: torch.ones(0),
            lambda weight: FakeTensorMode().from_tensor(torch.ones(2)),
        ],
    )
    def test_what_shares_memory_is_filled_with_it(self, view: Callable):
        model = torch.nn.Linear(4, 4)
        model.extra = view(model.weight.detach())
        assert reach.uncovered(model, list(model.parameters())) == []

    @pytest.mark.parametrize(
        "other",
        [
            lambda weight: weight.clone(),
            lambda weight: weight.t().contiguous(),
            lambda weight: torch.eye(2).to_sparse(),
            lambda weight: torch.ones(4)[::2],
        ],
    )
    def test_what_does_not(self, other: Callable):
        model = torch.nn.Linear(4, 4)
        model.extra = other(model.weight.detach())
        assert [path for path, _ in reach.uncovered(model, list(model.parameters()))] == ["extra"]

    def test_what_lies_in_the_gaps_of_a_covered_tensor(self):
        both = torch.ones(4, 6)
        model = torch.nn.Module()
        model.first, model.second = both[:, :3], both[:, 3:]
        ((path, tensor),) = reach.uncovered(model, [model.first])
        assert path == "second" and tensor is model.second
        assert reach.uncovered(model, [both]) == []

    def test_objects_that_are_not_looked_into(self):
        """Themselves, wherever they hang; what else holds the same tensor still shows it."""
        hidden = torch.ones(3)
        model = torch.nn.Linear(2, 2)
        model.extra = {"entries": [Apart(hidden)]}
        covered = list(model.parameters())
        assert len(reach.uncovered(model, covered)) == 1
        assert reach.uncovered(model, covered, (Apart,)) == []
        model.other = [hidden]
        assert [path for path, _ in reach.uncovered(model, covered, (Apart,))] == ["other[0]"]


# --- A real model, as vLLM loads it -----------------------------------------------------------------------------------


def test_a_fine_tune_may_be_swapped_in(directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable):
    running = engine(directory, freeze(directory))
    before = {name: tensor.clone() for name, tensor in running.model.named_parameters()}
    path = fine_tune()
    found = running.check(path)
    everything = dict(running.model.named_parameters()) | dict(running.model.named_buffers())
    names = filled.noted(running.model).names
    assert found["tensors"] == len(names) and names >= set(before)
    assert found["bytes"] == sum(everything[name].nbytes for name in names)
    assert found["model"].startswith("tensors-blake3:")
    assert found["content"] and found["content"] != filled.noted(running.model).content
    for name, tensor in running.model.named_parameters():
        assert torch.equal(tensor, before[name]), "nothing is changed"


def test_a_quick_check_leaves_the_walk_out(directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable):
    running = engine(directory, freeze(directory))
    next(running.model.modules()).kept = torch.ones(3)
    path = fine_tune()
    assert running.check(path, quick=True)["tensors"]
    with pytest.raises(UnsupportedError, match="'kept' is a tensor that is neither"):
        running.check(path)
    shutil.rmtree(path.parent / "tuned")
    path.unlink()
    with pytest.raises(MismatchError, match="holds config"):
        running.check(fine_tune(changed_config(rope_theta=123456.0)), quick=True)


def test_an_engine_that_was_freezing_while_it_loaded(
    directory: Path, fine_tune: Callable, engine: Callable, tmp_path: Path, thaw_args: Callable
):
    running = engine(directory, None, **thaw_args(tmp_path / "w.thaw", mode="freeze"))
    assert running.check(fine_tune())["tensors"]


@pytest.mark.parametrize(
    "change",
    [
        changed_config(rope_theta=123456.0),
        changed_config(rms_norm_eps=0.5),
        changed_config(eos_token_id=7),
        changed_config(max_position_embeddings=4096),
        changed_config(sliding_window=16),
    ],
    ids=["rope", "eps", "eos", "length", "window"],
)
def test_another_config_with_the_same_shapes(
    change: Callable, directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable
):
    running = engine(directory, freeze(directory))
    with pytest.raises(MismatchError, match="holds config"):
        running.check(fine_tune(change))


def test_overrides_are_part_of_the_config(directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable):
    overrides = {"rope_theta": 2.0}
    running = engine(directory, freeze(directory, hf_overrides=overrides), hf_overrides=overrides)
    with pytest.raises(MismatchError, match="holds config"):
        running.check(fine_tune())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chat_template.jinja", "{{ other }}", "holds another chat_template.jinja"),
        ("chat_template.jinja", None, "only the engine has a chat_template.jinja"),
        ("tokenizer.json", '{"version": "1.1"}', "holds another tokenizer.json"),
        ("generation_config.json", '{"eos_token_id": 2}', "holds another generation_config.json"),
        ("special_tokens_map.json", "{}", r"only '.*tuned\.thaw' has a special_tokens_map.json"),
    ],
)
def test_other_files_of_the_front_end(
    name: str, text: str | None, said: str, directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable
):
    running = engine(directory, freeze(directory))
    with pytest.raises(MismatchError, match=said):
        running.check(fine_tune(written(name, text)))


def test_a_tokenizer_from_elsewhere(
    directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable, tmp_path: Path
):
    """It is the engine's that counts, not that of its model's directory."""
    other = Path(shutil.copytree(directory, tmp_path / "tokenizer"))
    (other / "tokenizer.json").write_text("{}")
    running = engine(directory, freeze(directory), tokenizer=str(other))
    with pytest.raises(MismatchError, match=r"holds another tokenizer.json than the engine's"):
        running.check(fine_tune())
    filled.renote(running.model, files=None)
    with pytest.raises(MismatchError, match="cannot be compared: they were not noted"):
        running.check(tmp_path / "tuned.thaw")


def test_a_file_that_was_changed_between_the_starts_of_front_end_and_worker(
    directory: Path, freeze: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    """The front end may have read it before. A time of change that was set back does not hide it."""
    path, template = freeze(directory), directory / "chat_template.jinja"
    started = time.time()
    monkeypatch.setattr(front, "front_started", lambda: started)
    assert engine(directory, path).check(path)["tensors"]
    time.sleep(0.05)  # the clock of files is coarse
    status = template.stat()
    template.write_text(template.read_text())
    os.utime(template, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(MismatchError, match=r"chat_template.jinja' was changed after the engine was started"):
        engine(directory, path).check(path)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_a_config_that_was_changed_between_these_starts(
    name: str, directory: Path, freeze: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    """vLLM's own processes may have read another than that whose hash was noted."""
    (directory / "quantize_config.json").write_text("{}")
    path, started = freeze(directory), time.time()
    monkeypatch.setattr(front, "front_started", lambda: started)
    time.sleep(0.05)
    (directory / name).write_text((directory / name).read_text())
    with pytest.raises(MismatchError, match=f"{name}' was changed after the engine was started"):
        engine(directory, path).check(path)


def test_a_file_that_was_changed_after_loading(
    directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable
):
    """The front end goes on with what it has read, whatever is there now."""
    running = engine(directory, freeze(directory))
    path = fine_tune()
    (directory / "chat_template.jinja").write_text("{{ messagez }}")
    assert running.check(path)["tensors"]
    shutil.rmtree(path.parent / "tuned")
    path.unlink()
    with pytest.raises(MismatchError, match=r"holds another chat_template.jinja"):
        running.check(fine_tune())


@pytest.mark.parametrize("name", ["qwen.tiktoken", "spiece.model", "my_vocab.bin", "Tokenizer.bin", "tokenize.py"])
def test_a_tokenizer_with_files_that_no_snapshot_carries(
    name: str, directory: Path, freeze: Callable, engine: Callable
):
    (directory / name).write_text("x")
    path = freeze(directory)
    running = engine(directory, path)
    with pytest.raises(MismatchError, match=f"{name}' may be part of its tokenizer, and snapshots do not carry it"):
        running.check(path)


def test_a_tokenizer_that_may_be_code(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory, trust_remote_code=True)
    running = engine(directory, path, trust_remote_code=True)
    with pytest.raises(MismatchError, match=r"code of its own \(trust_remote_code\)"):
        running.check(path)


def test_what_cannot_be_noted_leaves_an_engine_that_starts(
    directory: Path,
    freeze: Callable,
    engine: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    path = freeze(directory)

    def fails(*_: Any) -> Any:
        raise OSError("no such device")

    with monkeypatch.context() as patch:
        patch.setattr(filled, "engine_files", fails)
        running = engine(directory, path)
    assert "weights will not be swappable: no such device" in caplog.text
    assert all(bool(torch.isfinite(tensor).all()) for tensor in running.model.parameters())
    with pytest.raises(UnsupportedError, match="nobody noted what loading filled"):
        running.check(path)


def test_an_engine_of_the_cpu_build(directory: Path, freeze: Callable, load: Callable, thaw_args: Callable):
    path = freeze(directory)
    loaded = load(directory, **thaw_args(path))
    assert filled.noted(loaded.model) is None
    with pytest.raises(
        UnsupportedError,
        match=r"repacks weights on this device after loading, .* NVIDIA GPUs; start another",
    ):
        Running(loaded.model, loaded.config).check(path)


def ordinary(**changes: Any) -> Any:
    """The configuration of an engine that nothing speaks against."""
    found = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate", is_multimodal_model=False, word_embeddings_untied_by_checkpoint=False
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False),
        parallel_config=SimpleNamespace(world_size=1, tensor_parallel_size=1),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
    )
    for key, value in changes.items():
        *path, name = key.split("__")
        owner = found
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return found


OBSTACLES = [
    ({"lora_config": object()}, "LoRA adapters are wrapped"),
    ({"speculative_config": SimpleNamespace(draft_model_config=object())}, "a draft model would keep"),
    ({"model_config__word_embeddings_untied_by_checkpoint": True}, "may have tied its embeddings"),
    ({"model_config__runner_type": "pooling"}, r"does not generate \(pooling\)"),
    ({"model_config__runner_type": "draft"}, r"does not generate \(draft\)"),
    ({"model_config__is_multimodal_model": True}, "takes images or sound"),
    ({"parallel_config__world_size": 2}, "2 ranks of which 1 share a layer"),
    ({"kv_transfer_config": object()}, "would outlive the weights"),
    ({"ec_transfer_config": object()}, "would outlive the weights"),
    ({"cache_config__cache_dtype": "fp8"}, r"its KV cache \(fp8\) has scales"),
    ({"cache_config__cache_dtype": "fp8_e5m2"}, r"its KV cache \(fp8_e5m2\) has scales"),
    ({"cache_config__calculate_kv_scales": True}, r"its KV cache \(auto\) has scales"),
]


@pytest.mark.parametrize(("changes", "said"), OBSTACLES, ids=[next(iter(changes)) for changes, _ in OBSTACLES])
def test_engines_that_hold_more_than_their_model(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        raise ValueError(versions.swap_obstacle(torch.nn.Linear(2, 2), ordinary(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_config__cache_dtype": "bfloat16"},
        {"speculative_config": SimpleNamespace(draft_model_config=None)},  # ngram
    ],
)
def test_engines_that_do_not(changes: dict[str, Any]):
    assert versions.swap_obstacle(torch.nn.Linear(2, 2), ordinary(**changes)) is None


def test_a_module_that_makes_something_of_its_weights():
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Derives(torch.nn.Module):
        def process_weights_after_loading(self, dtype: Any) -> None: ...

    class Attends(Derives, AttentionLayerBase):  # type: ignore[misc]
        get_attn_backend = get_kv_cache_spec = None
        __abstractmethods__ = frozenset()

    model = torch.nn.Module()
    model.attention = Attends()
    model.linear = Derives()
    model.linear.quant_method = object()  # identity_processing knows these
    assert versions.swap_obstacle(model, ordinary()) is None
    model.inner = torch.nn.Sequential(Derives())
    said = r"^'inner\.0' \(Derives\) makes something of its weights after loading"
    with pytest.raises(ValueError, match=said):
        raise ValueError(versions.swap_obstacle(model, ordinary()))
    with pytest.raises(ValueError, match=r"^'the model' \(Derives\) makes something"):
        raise ValueError(versions.swap_obstacle(Derives(), ordinary()))


@pytest.mark.parametrize(
    ("held", "said"),
    [("lora_config", "LoRA"), ("speculative_config", "draft model"), ("kv_transfer_config", "would outlive")],
)
def test_the_check_asks_for_these(held: str, said: str, directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    object.__setattr__(running.vllm_config, held, SimpleNamespace(draft_model_config=object()))
    with pytest.raises(UnsupportedError, match=rf"{said}.*; start another engine"):
        running.check(path)


def test_an_engine_that_was_left_broken(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    filled.renote(running.model, broken="CorruptionError: a checksum")
    with pytest.raises(UnsupportedError, match=r"an earlier swap left it broken \(CorruptionError: a checksum\)"):
        running.check(path)


def test_an_engine_that_vllm_loaded(directory: Path, freeze: Callable, engine: Callable):
    running = engine(directory, None)
    with pytest.raises(UnsupportedError, match="loading filled; start the engine with --load-format thaw"):
        running.check(freeze(directory))


def test_a_tensor_that_came_after_loading(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    layer = running.model.model.layers[1].self_attn
    layer.derived = [SimpleNamespace(transposed=layer.qkv_proj.weight.detach().t().contiguous())]
    with pytest.raises(
        UnsupportedError, match=r"'model.layers.1.self_attn.derived\[0\].transposed' is a tensor that is"
    ):
        running.check(path)
    layer.derived = [SimpleNamespace(transposed=layer.qkv_proj.weight.detach().t())]
    assert running.check(path)["tensors"]


def test_constants_of_attention_that_were_changed_or_came_after_loading(
    directory: Path, freeze: Callable, engine: Callable
):
    path = freeze(directory)
    running = engine(directory, path)
    attention = running.model.model.layers[0].self_attn.attn
    assert any(name.endswith("attn']._k_scale_cpu") for name in filled.noted(running.model).others)
    before = attention._k_scale_cpu
    attention._k_scale_cpu += 1
    with pytest.raises(UnsupportedError, match=r"_k_scale_cpu\S was changed after loading"):
        running.check(path)
    attention._k_scale_cpu -= 1
    assert running.check(path)["tensors"]
    attention._k_scale_cpu = before.clone()
    with pytest.raises(UnsupportedError, match=r" is a tensor that is neither a parameter nor a buffer"):
        running.check(path)


def test_another_tensor_that_was_there_when_loading_ended(
    directory: Path, freeze: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    """It may have been made of the weights."""
    path = freeze(directory)
    real = filled.note

    def late(model: torch.nn.Module, *config: Any) -> None:
        model.lm_head.derived = model.lm_head.weight.detach() * 2
        real(model, *config)

    monkeypatch.setattr("thaw_vllm.engines.vllm.loader.note", late)
    running = engine(directory, path)
    assert "lm_head.derived" in filled.noted(running.model).others
    with pytest.raises(UnsupportedError, match=r"lm_head.derived.* is a tensor that is neither"):
        running.check(path)


def test_names_of_what_was_there_when_loading_ended(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    kept = Apart(torch.ones(3))
    running.model.lm_head.derived = kept.held
    filled.renote(running.model, others=filled.unfilled(running.model, filled.noted(running.model).names))
    with pytest.raises(UnsupportedError) as refused:
        running.check(path)
    assert "'lm_head.derived' is a tensor" in str(refused.value)


@pytest.mark.parametrize("change", ["other", "new", "gone", "nan"])
def test_a_plain_number_that_was_changed_after_loading(
    change: str, directory: Path, freeze: Callable, engine: Callable
):
    path = freeze(directory)
    running = engine(directory, path)
    norm = running.model.model.layers[1].input_layernorm
    running.check(path)
    norm.count, norm.label = 5, "x"  # come and go while an engine runs
    assert running.check(path)["tensors"]
    if change in ("other", "nan"):
        assert isinstance(norm.variance_epsilon, float)
        norm.variance_epsilon = 0.5 if change == "other" else float("nan")
        said = rf"variance_epsilon' was changed after loading, from .* to {norm.variance_epsilon!r}"
    elif change == "new":
        norm.scale = 0.5
        said = r"'model.layers.1.input_layernorm.scale' was changed after loading, from nothing to 0\.5"
    else:
        del norm.variance_epsilon
        said = r"variance_epsilon' was changed after loading, from .* to nothing"
    with pytest.raises(UnsupportedError, match=said):
        running.check(path)


def test_a_buffer_that_came_after_loading(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    running.model.model.register_buffer("late", torch.ones(2))
    with pytest.raises(UnsupportedError, match=r"the buffer 'model.late' came after loading"):
        running.check(path)


def test_a_buffer_that_was_changed_after_loading(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    name, buffer = next(
        (name, one) for name, one in running.model.named_buffers() if name not in filled.noted(running.model).names
    )
    buffer.view(-1)[0] += 1
    with pytest.raises(UnsupportedError, match=f"{name}' was changed after loading, perhaps to what belongs"):
        running.check(path)


def test_what_graphs_write_is_no_weight(
    directory: Path, freeze: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    path = freeze(directory)
    running = engine(directory, path)
    module = ModuleType("vllm.compilation.cuda_graph")
    module.CUDAGraphEntry = Apart  # type: ignore[attr-defined]
    running.model.graphs = {8: Apart(torch.ones(3))}
    monkeypatch.delitem(sys.modules, module.__name__, raising=False)
    assert versions.graph_entries() == ()
    with pytest.raises(UnsupportedError, match=r"'graphs\[8\].held' is a tensor that is neither"):
        running.check(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert running.check(path)["tensors"]


@pytest.mark.parametrize("own", [False, True])
def test_what_a_compiled_function_was_called_with(own: bool, directory: Path, freeze: Callable, engine: Callable):
    """Token ids are written anew each time; a tensor of the function's own is not."""
    path = freeze(directory)
    running = engine(directory, path)
    held, kept = torch.ones(3), []

    def function(tokens: torch.Tensor) -> torch.Tensor:
        return tokens * held.sum() if own else tokens * 2

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        kept.append(SimpleNamespace(graph_module=graph, example_inputs=inputs))
        return graph.forward

    tokens = torch.ones(8)
    torch._dynamo.mark_dynamic(tokens, 0)
    torch.compile(function, backend=keep)(tokens)
    running.model.model.aot_compiled_fn = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=kept[0]))
    assert any(given is tokens for given in kept[0].example_inputs)
    if own:
        with pytest.raises(UnsupportedError, match=r"compiled_fn.example_inputs\[\d\]' is a tensor that is neither"):
            running.check(path)
    else:
        assert running.check(path)["tensors"]


def test_a_constant_of_a_traced_graph_is_found():
    class Scaled(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given * constant

    constant = torch.ones(2)
    traced = torch.fx.symbolic_trace(Scaled())
    assert [one for _, one in reach.uncovered(traced, [])] == [constant]


def test_what_a_graph_calls_is_looked_into():
    """It is among the globals of the code that is made of the graph, which are not."""
    held, other = torch.ones(2), torch.ones(3)
    graph = torch.fx.Graph()
    given = graph.placeholder("given")
    called = graph.call_function(lambda x, y: x + held + y, (given, 2))
    graph.call_function(torch.add, (called, [other]))
    graph.output(called)
    traced = torch.fx.GraphModule(torch.nn.Module(), graph)
    found = [one for _, one in reach.uncovered(traced, [])]
    assert any(one is held for one in found) and any(one is other for one in found)


def test_the_kv_cache_is_no_weight(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    for layer in running.vllm_config.compilation_config.static_forward_context.values():
        layer.kv_cache = torch.zeros(2, 4, 16)
    assert running.check(path)["tensors"]


def test_a_parameter_that_nothing_filled(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    running.model.late = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UnsupportedError, match="'late' was not filled when the engine was loaded"):
        running.check(path)


def test_other_tensors_and_values(directory: Path, freeze: Callable, engine: Callable):
    """Of a snapshot that fills another buffer, or sets another scale, than the one the engine was loaded from."""
    path = freeze(directory)
    running = engine(directory, path)
    found = filled.noted(running.model)
    assert found is not None
    name = min(found.names)
    filled.renote(running.model, names=found.names - {name} | {"some.buffer"})
    buffer = torch.nn.Module()
    buffer.register_buffer("buffer", torch.ones(1))
    running.model.some = buffer
    with pytest.raises(UnsupportedError, match=f"{name!r} was not filled"):
        running.check(path)
    filled.renote(running.model, names=found.names | {"some.buffer"})
    with pytest.raises(MismatchError, match=r"does not fill 'some\.buffer'"):
        running.check(path)
    del running.model.some
    filled.renote(running.model, names=found.names, attributes={"model|scale": 0.5})
    with pytest.raises(MismatchError, match=r"sets 'model\.scale' to nothing, the engine has 0\.5"):
        running.check(path)


@pytest.mark.parametrize("which", ["snapshot", "engine"])
def test_a_config_that_is_not_known(
    which: str, directory: Path, freeze: Callable, engine: Callable, monkeypatch: pytest.MonkeyPatch
):
    path = freeze(directory)
    running = engine(directory, path)
    if which == "engine":
        identity = dataclasses.replace(filled.noted(running.model).identity, config=None)
        filled.renote(running.model, identity=identity)
    else:
        require = check.require_known
        monkeypatch.setattr(check, "require_known", lambda opened, *args: require(without_config(opened), *args))
    with pytest.raises(MismatchError, match=r"configuration of .* is not known"):
        running.check(path)


def without_config(opened: Any) -> Any:
    header = opened.snapshot.header
    header = dataclasses.replace(header, identity=dataclasses.replace(header.identity, config=None))
    return SimpleNamespace(snapshot=SimpleNamespace(header=header))


@pytest.mark.parametrize(("version", "fine"), [("0.{next}.0", False), ("{patch}", True)])
def test_another_version_of_vllm(version: str, fine: bool, directory: Path, freeze: Callable, engine: Callable):
    """Which may load other tensors, or the same in another order."""
    path = freeze(directory)
    running = engine(directory, path)
    identity = filled.noted(running.model).identity
    major, minor = identity.engine_version.split(".")[:2]
    other = version.format(next=int(minor) + 1, patch=f"{major}.{minor}.99")
    filled.renote(running.model, identity=dataclasses.replace(identity, engine_version=other))
    if fine:
        assert running.check(path)["tensors"]
        return
    with pytest.raises(MismatchError, match=f"was frozen by vLLM {identity.engine_version}, this is {other}"):
        running.check(path)


def test_other_types_and_files(
    directory: Path, freeze: Callable, fine_tune: Callable, engine: Callable, tmp_path: Path
):
    path = freeze(directory)
    running = engine(directory, path)
    with pytest.raises(MismatchError, match="holds dtype 'float32'"):
        running.check(fine_tune(dtype="float32"))
    with pytest.raises(StorageError, match="nowhere"):
        running.check(tmp_path / "nowhere.thaw")
    damaged = tmp_path / "damaged.thaw"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((CorruptionError, FormatError), match=r"damaged\.thaw"):
        running.check(damaged)


# --- When the front end was started -----------------------------------------------------------------------------------

STARTED = "from thaw_vllm.engines.vllm.swap.front import front_started; print(repr(front_started()))"
CHILD = f"""
import multiprocessing, sys
def child():
    {STARTED.replace("; ", chr(10) + "    ")}
{STARTED}
sys.stdout.flush()
process = multiprocessing.get_context("fork").Process(target=child, name=sys.argv[1])
process.start()
process.join()
"""


def starts(name: str) -> tuple[float, float, float]:
    """When a process was started, and what it and its child, of that name, take for the front end's start."""
    before = time.time()
    found = subprocess.run([sys.executable, "-c", CHILD, name], capture_output=True, text=True, timeout=120, check=True)
    own, childs = (float(line) for line in found.stdout.split())
    return before, own, childs


@pytest.mark.parametrize("name", ["EngineCore", "EngineCore_DP0"])
def test_a_worker_in_the_front_ends_own_process_or_in_the_engine_core(name: str):
    before, own, childs = starts(name)
    assert abs(own - before) < 0.5 and abs(childs - own) < 0.05


def test_a_worker_that_is_a_child_of_the_engine_core():
    _, own, childs = starts("VllmWorker-0")
    assert multiprocessing.parent_process() is None
    assert abs(childs - front.front_started()) < 0.05 and own - childs > 0.1, "that which started the core: this one"


# --- What may come after loading, and what may not --------------------------------------------------------------------


def test_hooks_that_came_after_loading(directory: Path, freeze: Callable, engine: Callable):
    path = freeze(directory)
    running = engine(directory, path)
    handle = running.model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="hooks"):
        running.check(path)
    handle.remove()
    assert running.check(path)["tensors"]


def test_scales_that_attention_makes_when_it_is_first_run(directory: Path, freeze: Callable, engine: Callable):
    """FlashInfer's; any other float is refused."""
    path = freeze(directory)
    running = engine(directory, path)
    impl = running.model.model.layers[0].self_attn.attn.impl
    impl.bmm1_scale, impl.bmm2_scale = 0.25, 1.0
    assert running.check(path)["tensors"]
    impl.other_scale = 0.25
    with pytest.raises(UnsupportedError, match=r"impl\.other_scale' was changed after loading, from nothing to 0\.25"):
        running.check(path)


def test_a_directory_that_was_written_before_the_engine_was_asked_for(
    directory: Path, freeze: Callable, load: Callable, thaw_args: Callable, engine: Callable
):
    """By the front end itself, as where it lays out what a snapshot carries."""
    path = freeze(directory)
    began = time.time()
    time.sleep(0.05)
    for name in ("chat_template.jinja", "tokenizer.json"):
        (directory / name).write_text((directory / name).read_text())
    config = engine(directory, path).vllm_config.model_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "front_started", lambda: began)
        assert front.engine_files(config, time.time()).unknown is None
        assert "was changed after" in (front.engine_files(config).unknown or "")
        assert "was changed after" in (front.engine_files(config, began).unknown or "")
