"""Methods for a worker of vLLM: its model made anew and filled by two loaders, compared before any post-processing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from thaw_vllm.engines.vllm.audit import digest


class RawWorker:
    """``worker_extension_cls``: each method returns plain values."""

    def compare_raw(self, snapshot: str) -> dict[str, Any]:
        """Names of parameters and buffers that a snapshot fills with other bytes than the checkpoint does."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config, name = self.vllm_config, type(self).__name__  # type: ignore[attr-defined]
        found: list[dict[str, bytes]] = []
        report = None
        for source in (None, snapshot):
            number = RawWorker.made = getattr(RawWorker, "made", 0) + 1
            changes = {"load_format": "thaw", "model_loader_extra_config": {"snapshot": source}}
            load_config = dataclasses.replace(config.load_config, **(changes if source else {}))
            loader = get_model_loader(load_config)
            try:
                with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
                    model = initialize_model(vllm_config=config, prefix=f"again{number}")
                    for parameter in model.parameters():  # what is not filled is seen
                        parameter.data.view(torch.uint8).fill_(number)
                    loader.load_weights(model, config.model_config)
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}
            tensors = dict(model.named_parameters(remove_duplicate=False))
            tensors |= dict(model.named_buffers(remove_duplicate=False))
            found.append({key: digest(tensor) for key, tensor in tensors.items()})
            if source:
                from thaw_vllm.engines.vllm import loader as ours

                report = dataclasses.asdict(ours.last_report)
        first, second = found
        differing = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        return {"worker": name, "compared": len(first), "differing": differing, "report": report}
