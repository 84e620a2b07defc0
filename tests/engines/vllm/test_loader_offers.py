"""What the loader says, and when, about weights that others use or are to use; no engine, and a model of two layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
import torch
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.reload import inplace, layerwise

from thaw_vllm.engines.vllm import automatic, offering
from thaw_vllm.engines.vllm import loader as loading
from thaw_vllm.engines.vllm.loader import ThawModelLoader
from thaw_vllm.engines.vllm.swap import filled
from thaw_vllm.errors import ThawError, UnsupportedError

NEW = {"0.weight": torch.full((4, 4), 2.0), "1.weight": torch.full((4, 4), 3.0)}


class Net(torch.nn.Sequential):
    """Loads its weights as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, tensor in weights if self._load(self.get_parameter(name), tensor)}

    def _load(self, parameter: Any, tensor: torch.Tensor) -> bool:
        parameter.weight_loader(parameter, tensor)
        return True


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's ``reload_weights`` of a model, by a loader with these options, from a checkpoint that has ``NEW``."""
    checkpoint = SimpleNamespace(get_all_weights=lambda *_: iter(NEW.items()))
    monkeypatch.setattr(ThawModelLoader, "source", lambda _: checkpoint)

    def run(model: Net, **options: Any) -> None:
        config = LoadConfig(load_format="thaw", model_loader_extra_config={"snapshot": "w.thaw"} | options)
        monkeypatch.setattr(inplace, "get_model_loader", ThawModelLoader)
        given = SimpleNamespace(
            model_config=SimpleNamespace(quantization=None, dtype=torch.float32), load_config=config
        )
        given.lora_config = None
        inplace.reload_weights(given, model, None, None, is_checkpoint_format=True)  # type: ignore[arg-type]

    return run


class Offer:
    """Held by a borrower, at first."""

    busy = True

    def withdraw(self, *_: Any) -> None:
        if self.busy:
            raise UnsupportedError("still copying")


def test_a_refused_reload_changes_nothing(reload: Any):
    """vLLM puts parameters on the meta device once it has the iterator."""
    model, offer = Net(), Offer()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    setattr(model, offering._ATTRIBUTE, offer)
    setattr(model, filled._ATTRIBUTE, "noted")
    for options, why in (({}, "still copying"), ({"shared": "/run/x"}, "other engines use these weights")):
        with pytest.raises(ThawError, match=why):
            reload(model, **options)
        for name, tensor in model.named_parameters():
            assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert getattr(model, filled._ATTRIBUTE) == "noted"
    offer.busy = False
    reload(model)
    assert {name: tensor.tolist() for name, tensor in model.named_parameters()} == {
        name: tensor.tolist() for name, tensor in NEW.items()
    }
    assert getattr(model, filled._ATTRIBUTE) is None


@pytest.mark.parametrize("offer", [False, True])
def test_what_is_left_to_vllm_says_that_it_offers_nothing(offer: bool, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(loading, "logger", SimpleNamespace(warning=lambda text, *given: said.append(text % given)))
    monkeypatch.setattr(loading, "last_outcome", None)
    monkeypatch.setattr(loading, "parallel_groups", dict)
    monkeypatch.setattr(loading.compiled, "prepare", lambda _: None)
    monkeypatch.setattr(automatic, "left_to_vllm", lambda *_: "because")
    monkeypatch.setattr(automatic, "is_draft", lambda *_: False)
    model = torch.nn.Module()
    monkeypatch.setattr(ThawModelLoader, "source", lambda _: SimpleNamespace(load_model=lambda *_: model))
    extra = {"mode": "auto", "cache": "c", "offer": offer}
    made = ThawModelLoader(LoadConfig(load_format="thaw", model_loader_extra_config=extra))
    assert made.load_model(SimpleNamespace(), SimpleNamespace(model="m")) is model  # type: ignore[arg-type]
    assert said[0] == "vLLM loads m itself: because"
    assert said[1:] == offer * ["this engine's weights cannot be offered to others: vLLM loads them itself"]
