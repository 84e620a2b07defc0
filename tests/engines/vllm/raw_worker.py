"""A method for a worker of vLLM: its model made twice, filled by two loaders and compared before post-processing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.layout import integers


class RawWorker:
    """``worker_extension_cls``; plain values are returned."""

    def compare_raw(self, snapshot: str) -> dict[str, Any]:
        """Names of parameters and buffers that a snapshot fills with other bytes than the checkpoint does."""
        from thaw_vllm.engines.vllm import loader

        try:
            theirs, _ = fillable(self._filled({}))
            ours, _ = fillable(
                self._filled({"load_format": "thaw", "model_loader_extra_config": {"snapshot": snapshot}})
            )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        differing = sorted(name for name in theirs.keys() | ours.keys() if not _same(theirs.get(name), ours.get(name)))
        return {"compared": len(theirs), "differing": differing, "report": dataclasses.asdict(loader.last_report)}

    def _filled(self, changes: dict[str, Any]) -> torch.nn.Module:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self.vllm_config  # type: ignore[attr-defined]
        number = RawWorker.made = getattr(RawWorker, "made", 0) + 1
        device = next(self.get_model().parameters()).device  # type: ignore[attr-defined]
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), device:
            model = initialize_model(vllm_config=config, prefix=f"again{number}")
            for parameter in model.parameters():  # what is not filled is seen
                integers(parameter.data).fill_(number)
            get_model_loader(dataclasses.replace(config.load_config, **changes)).load_weights(
                model, config.model_config
            )
        return model


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.equal(integers(first.detach()), integers(second.detach())))
