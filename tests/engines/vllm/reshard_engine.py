"""Workers of vLLM that hold snapshots against its own loader: ``reshard_engine.py ASKED.json ANSWER.json``.

Asked are ``model``, ``engine_args`` and ``snapshots``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(question: str, answer: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from thaw_vllm.engines.vllm import versions

    asked = json.loads(Path(question).read_text())
    worker = "tests.engines.vllm.raw_worker.RawWorker"
    args = {"gpu_memory_utilization": 0.1} | asked["engine_args"] | {"worker_extension_cls": worker}
    config = EngineArgs(model=asked["model"], **args).create_engine_config()
    executor = versions.executor_class(config)(config)
    try:
        found = {path: executor.collective_rpc("compare_raw", args=(path,)) for path in asked["snapshots"]}
    finally:
        executor.shutdown()
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
