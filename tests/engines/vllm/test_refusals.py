"""What the loader refuses, before it copies a byte, and with a cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engines.vllm import models

from thaw_vllm.errors import CorruptionError, MismatchError, StorageError, UnsupportedError, UsageError

pytestmark = pytest.mark.vllm


@pytest.fixture
def snapshot(checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path) -> Path:
    """The untied model, frozen."""
    path = tmp_path / "weights.thaw"
    load(checkpoints("untied"), **thaw_args(path, mode="freeze"))
    return path


@pytest.fixture
def copied(checkpoints: Callable, tmp_path: Path) -> Path:
    """A copy of the untied model's directory, to be changed."""
    return Path(shutil.copytree(checkpoints("untied"), tmp_path / "copied"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_config(snapshot: Path, copied: Path, load: Callable, thaw_args: Callable):
    edit_config(copied, rope_theta=123456.0)
    with pytest.raises(MismatchError, match="holds config"):
        load(copied, **thaw_args(snapshot))


def test_a_config_that_vllm_reads_elsewhere(
    snapshot: Path, checkpoints: Callable, copied: Path, load: Callable, thaw_args: Callable
):
    edit_config(copied, rms_norm_eps=0.5)
    with pytest.raises(MismatchError, match="config"):
        load(checkpoints("untied"), hf_config_path=str(copied), **thaw_args(snapshot))


def test_how_a_model_is_quantised_counts(snapshot: Path, copied: Path, load: Callable, thaw_args: Callable):
    (copied / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    with pytest.raises(MismatchError, match="config"):
        load(copied, **thaw_args(snapshot))


def test_the_format_of_mistral(copied: Path, load: Callable, thaw_args: Callable, tmp_path: Path):
    from vllm.config import ModelConfig

    from thaw_vllm.engines.vllm.identity import canonical_config

    config = ModelConfig(model=str(copied))
    assert canonical_config(config)
    (copied / "params.json").write_text("{}")
    shutil.copy(copied / "model.safetensors", copied / "consolidated.safetensors")
    with pytest.raises(UnsupportedError, match=r"Mistral's own format.*config_format='hf'"):
        canonical_config(config)
    (copied / "params.json").unlink()
    with pytest.raises(UnsupportedError, match="vLLM reads other files"):
        load(copied, **thaw_args(tmp_path / "w.thaw", mode="freeze"))
    with pytest.raises(UnsupportedError, match="vLLM reads other files"):
        load(copied, **thaw_args(tmp_path / "w.thaw", mode="freeze", source_format="npcache"))
    load(copied, **thaw_args(tmp_path / "w.thaw", mode="freeze", source_format="safetensors"))


def test_speculation_without_a_draft_model_is_no_draft(
    snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable
):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    load(checkpoints("untied"), speculative_config=ngram, **thaw_args(snapshot))


def test_another_architecture(snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable):
    with pytest.raises(MismatchError, match="holds architecture 'LlamaForCausalLM'"):
        load(checkpoints("moe"), **thaw_args(snapshot))


def test_another_dtype(snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable):
    with pytest.raises(MismatchError, match="holds dtype 'bfloat16', the engine has 'float32'"):
        load(checkpoints("untied"), dtype="float32", **thaw_args(snapshot))


def test_another_quantisation(snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable):
    with pytest.raises(MismatchError, match=r"holds (quantization|config)"):
        load(checkpoints("int8"), **thaw_args(snapshot))


def test_a_fine_tune_of_the_same_shape(snapshot: Path, tmp_path: Path, load: Callable, thaw_args: Callable):
    other = models.llama(tmp_path / "fine-tune", seed=1)
    with pytest.raises(MismatchError, match="is not the file that"):
        load(other, **thaw_args(snapshot))


def test_one_changed_tensor(snapshot: Path, copied: Path, load: Callable, thaw_args: Callable):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="is not the file that"):
        load(copied, **thaw_args(snapshot))


def test_the_weight_files_are_not_needed(
    snapshot: Path, copied: Path, checkpoints: Callable, load: Callable, thaw_args: Callable
):
    (copied / "model.safetensors").unlink()
    assert load(copied, **thaw_args(snapshot)).raw == load(checkpoints("untied")).raw


def test_untying_is_remembered_without_the_checkpoint(
    checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
):
    """vLLM 0.32 reads the checkpoint's header to learn that a 'tied' model has an lm_head of its own."""
    directory, path = checkpoints("tied-with-lm-head"), tmp_path / "w.thaw"
    expected = load(directory)
    if "lm_head.weight" not in expected.raw:
        pytest.skip("this vLLM trusts the config and drops the checkpoint's lm_head")
    load(directory, **thaw_args(path, mode="freeze"))
    bare = tmp_path / "bare"
    shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    thawed = load(bare, **thaw_args(path))
    assert thawed.raw == expected.raw
    assert thawed.processed() == expected.processed()


def test_a_damaged_chunk(snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable):
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(CorruptionError, match="does not agree"):
        load(checkpoints("untied"), **thaw_args(snapshot))


def test_a_missing_snapshot(checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path):
    with pytest.raises(StorageError, match="does not exist"):
        load(checkpoints("untied"), **thaw_args(tmp_path / "none.thaw"))


def test_an_existing_snapshot_stays(snapshot: Path, checkpoints: Callable, load: Callable, thaw_args: Callable):
    before = snapshot.read_bytes()
    with pytest.raises(StorageError, match="exists"):
        load(checkpoints("untied"), **thaw_args(snapshot, mode="freeze"))
    assert snapshot.read_bytes() == before


@pytest.mark.parametrize(
    "extra",
    [
        {"snapshot": ""},
        {"snapshot": 3},
        {"mode": "freeze"},
        {"mode": "melt"},
        {"snapshot": "w.thaw", "mode": "stream"},
        {"snapshot": "w.thaw", "mode": "melt"},
        {"snapshot": "w.thaw", "verfy": True},
        {"snapshot": "w.thaw", "verify": "yes"},
        {"snapshot": "w.thaw", "source_format": "thaw"},
        {"snapshot": "w.thaw", "workers": "4"},
    ],
)
def test_wrong_options(extra: dict[str, Any], checkpoints: Callable, load: Callable):
    with pytest.raises(UsageError, match="load_format='thaw'"):
        load(checkpoints("untied"), load_format="thaw", model_loader_extra_config=extra)


class TestLoadAudit:
    """Whatever loading leaves behind beside parameters is stored or refused."""

    @pytest.fixture
    def while_loading(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.nn.Module], None]], None]:
        """Let vLLM's own loader do something more to the model."""
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        original = DefaultModelLoader.load_weights

        def install(effect: Callable[[torch.nn.Module], None]) -> None:
            def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
                original(self, model, model_config)
                effect(model)

            monkeypatch.setattr(DefaultModelLoader, "load_weights", load_weights)

        return install

    def test_a_filled_buffer_is_stored(
        self, while_loading: Callable, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
    ):
        path = tmp_path / "w.thaw"

        def fill(model: torch.nn.Module) -> None:
            next(b for n, b in model.named_buffers() if n.endswith("cos_sin_cache")).mul_(0.5)

        while_loading(fill)
        frozen = load(checkpoints("untied"), **thaw_args(path, mode="freeze"))
        assert load(checkpoints("untied"), **thaw_args(path)).raw == frozen.raw

    def test_a_set_attribute_is_stored(
        self, while_loading: Callable, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
    ):
        path = tmp_path / "w.thaw"

        def mark(model: torch.nn.Module) -> None:
            model.model.norm.variance_epsilon = 0.125

        while_loading(mark)
        load(checkpoints("untied"), **thaw_args(path, mode="freeze"))
        thawed = load(checkpoints("untied"), **thaw_args(path))
        assert thawed.model.model.norm.variance_epsilon == 0.125

    def test_an_attribute_the_model_lacks_is_refused_before_copying(
        self, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path, monkeypatch: Any
    ):
        from thaw_vllm.engines.vllm import audit, offering

        path = tmp_path / "w.thaw"
        monkeypatch.setattr(audit, "changed_attributes", lambda before, after: {"model.nowhere|scale": 2.0})
        load(checkpoints("untied"), **thaw_args(path, mode="freeze"))
        monkeypatch.setattr(offering, "restore", lambda *_: pytest.fail("copied before it refused"))
        with pytest.raises(UnsupportedError, match=r"model\.nowhere\.scale"):
            load(checkpoints("untied"), **thaw_args(path))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("|lm_head", None),
            ("model.norm|weight", None),
            ("|forward", "x"),
            ("model.norm|weight", 5),
            ("|__class__", 1),
        ],
    )
    def test_an_attribute_cannot_replace_what_is_no_plain_value(
        self, key: str, value: Any, checkpoints: Callable, load: Callable
    ):
        from thaw_vllm.engines.vllm import audit

        with pytest.raises(UnsupportedError, match="which this model does not have"):
            audit.attribute_owners(load(checkpoints("untied")).model, {key: value})

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_an_attribute_that_cannot_be_stored_is_refused(
        self,
        value: float,
        while_loading: Callable,
        checkpoints: Callable,
        load: Callable,
        thaw_args: Callable,
        tmp_path: Path,
    ):
        def mark(model: torch.nn.Module) -> None:
            model.model.norm.variance_epsilon = value

        while_loading(mark)
        with pytest.raises(UnsupportedError, match="cannot store"):
            load(checkpoints("untied"), **thaw_args(tmp_path / "w.thaw", mode="freeze"))

    def test_state_hung_on_a_parameter_is_refused(
        self, while_loading: Callable, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
    ):
        def hang(model: torch.nn.Module) -> None:
            model.model.norm.weight.quant_state = {"scale": torch.ones(1)}

        while_loading(hang)
        with pytest.raises(
            UnsupportedError, match=r"hung dict\(.*\) on the parameter 'model\.norm\.weight\.quant_state'"
        ):
            load(checkpoints("untied"), **thaw_args(tmp_path / "w.thaw", mode="freeze"))

    @pytest.mark.parametrize(
        "effect",
        [
            lambda model: model.model.norm._loaded.add("bias"),
            lambda model: setattr(model.model.norm, "_names", ["a"]),
            lambda model: setattr(model.model.norm.weight, "is_loaded", True),
            lambda model: setattr(model.model.norm, "_plain", 2),
            lambda model: model.register_parameter("score_bias", torch.nn.Parameter(torch.ones(2))),
            lambda model: model.register_buffer("score", torch.ones(2)),
            lambda model: delattr(model.model.norm, "weight"),
            lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(model.model.norm.weight[:2])),
        ],
        ids=["set", "list", "on-a-parameter", "was-no-value", "parameter", "buffer", "removed", "reshaped"],
    )
    def test_what_a_fresh_model_would_not_have_is_refused(
        self,
        effect: Callable[[torch.nn.Module], None],
        while_loading: Callable,
        checkpoints: Callable,
        load: Callable,
        thaw_args: Callable,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        from thaw_vllm.engines.vllm import audit

        original, first = audit.take, []

        def take(model: torch.nn.Module) -> audit.State:
            if not first:  # as a model's own initialisation would have left them
                model.model.norm._loaded, model.model.norm._plain = set(), object()
            first.append(model)
            return original(model)

        monkeypatch.setattr(audit, "take", take)
        while_loading(effect)
        with pytest.raises(UnsupportedError, match=r"loading (changed|hung|set|turned) "):
            load(checkpoints("untied"), **thaw_args(tmp_path / "w.thaw", mode="freeze"))
        assert list(tmp_path.iterdir()) == []

    def test_an_attribute_over_a_plain_default_of_the_class_is_stored(
        self,
        while_loading: Callable,
        checkpoints: Callable,
        load: Callable,
        thaw_args: Callable,
        tmp_path: Path,
        monkeypatch: Any,
    ):
        from vllm.model_executor.layers.layernorm import RMSNorm

        monkeypatch.setattr(RMSNorm, "is_scaled", False, raising=False)
        path = tmp_path / "w.thaw"
        while_loading(lambda model: setattr(model.model.norm, "is_scaled", True))
        load(checkpoints("untied"), **thaw_args(path, mode="freeze"))
        assert load(checkpoints("untied"), **thaw_args(path)).model.model.norm.is_scaled is True

    def test_random_weights_get_no_model_id(
        self, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
    ):
        from thaw_vllm.weights.open import open_snapshot

        path = tmp_path / "w.thaw"
        load(checkpoints("untied"), **thaw_args(path, mode="freeze", source_format="dummy"))
        with open_snapshot(path) as opened:
            header = opened.snapshot.header
        assert header.identity.model is None and "files" not in header.source

    def test_a_hidden_tensor_is_refused(
        self, while_loading: Callable, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
    ):
        def hide(model: torch.nn.Module) -> None:
            object.__setattr__(model.model.norm, "derived", torch.ones(3))

        while_loading(hide)
        with pytest.raises(UnsupportedError, match=r"model\.norm\.derived"):
            load(checkpoints("untied"), **thaw_args(tmp_path / "w.thaw", mode="freeze"))
        assert list(tmp_path.iterdir()) == []

    def test_online_quantisation_is_refused(
        self, checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path, monkeypatch: Any
    ):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        monkeypatch.setattr(UnquantizedLinearMethod, "uses_meta_device", True, raising=False)
        with pytest.raises(UnsupportedError, match="quantised while loading"):
            load(checkpoints("untied"), **thaw_args(tmp_path / "w.thaw", mode="freeze"))
