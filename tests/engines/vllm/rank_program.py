"""One rank of a world: vLLM's real groups and real model loading in a process of its own, without an engine around it.

Run as ``python -m tests.engines.vllm.rank_program REQUEST.json ANSWER.json``. The request holds the number of this
rank's ``replica``, its own number ``of`` that, its ``device`` on a machine with GPUs, the sizes ``tp`` and ``pp``, a
``rendezvous`` and ``loads``: engine arguments, one load after another. The answer has for each a digest of every tensor
before post-processing, which report there is, and this rank's coordinates; or the error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from tests.engines.vllm.conftest import tensors_of


def main(request_path: str, answer_path: str) -> None:
    """Read a request, write the answer."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader import base_loader, get_model

    from thaw_vllm.engines.vllm import loader
    from thaw_vllm.engines.vllm.identity import require_ranks
    from thaw_vllm.errors import ThawError

    request = json.loads(Path(request_path).read_text())
    backend, local = "gloo", request["of"]
    if torch.cuda.is_available():
        backend, local = "nccl", request["device"]
        torch.cuda.set_device(local)
    first = configuration(request, request["loads"][0])
    with set_current_vllm_config(first):
        init_distributed_environment(
            request["tp"] * request["pp"], request["of"], request["rendezvous"], local, backend
        )
        ensure_model_parallel_initialized(request["tp"], request["pp"])
    if not torch.cuda.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU runner does when it starts
    original, raw = base_loader.process_weights_after_loading, dict[str, str]()

    def recording(model: torch.nn.Module, *args: Any) -> None:
        raw.update({name: blake3(repr(found[:3]).encode() + found[3]).hexdigest() for name, found in own(model)})
        original(model, *args)

    base_loader.process_weights_after_loading = recording
    answers: list[Any] = []
    for number, arguments in enumerate(request["loads"]):
        raw.clear()
        config = configuration(request, arguments) if number else first
        try:
            with set_current_vllm_config(config):
                get_model(vllm_config=config)
            report = loader.last_report
            answers.append(
                {"tensors": dict(raw), "report": None if report is None else type(report).__name__}
                | dataclasses.asdict(require_ranks(config))
            )
        except ThawError as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answer_path).write_text(json.dumps(answers))


def own(model: torch.nn.Module) -> Any:
    """What is of this model alone, in a process where several were."""
    return tensors_of(model).items()


def configuration(request: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """vLLM's, as an engine's would be."""
    from vllm.engine.arg_utils import EngineArgs

    from thaw_vllm.engines.vllm.versions import run_apart

    sizes = {"tensor_parallel_size": request["tp"], "pipeline_parallel_size": request["pp"]}
    common = {"enforce_eager": True, "max_model_len": 256, "distributed_executor_backend": "mp"}
    config = EngineArgs(**common | sizes | arguments).create_engine_config()
    if not config.model_config.is_moe:  # as vLLM's engine core does, in each replica
        run_apart(config.parallel_config)
        config.parallel_config.data_parallel_index = request["replica"]
    return config


if __name__ == "__main__":
    main(*sys.argv[1:])
