"""``kv_engine`` over vLLM's Ray executor, with a Ray of its own: ray_engine.py STEPS.json ANSWERS.json.

The engine runs in this process and its workers in Ray's. On a CPU there is one thing that is not vLLM's: its platform
names no resource of Ray's, for which its executor refuses it, so it gets one here.
"""

from __future__ import annotations

import os
import sys
import tempfile

SLOT = "slot"
"""Ray's resource of which a worker takes one."""
SLOTS = 2
"""For one engine, as of GPUs."""


def on_a_cpu() -> None:
    """Called in this process, and by Ray in each of its own before anything else runs there."""
    import ray
    from vllm.platforms import current_platform
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

    if current_platform.is_cpu():
        type(current_platform).ray_device_key = SLOT
        RayWorkerProc.get_node_and_physical_gpu_ids = lambda self: (
            ray.get_runtime_context().get_node_id(),
            [self._init_kwargs["rank"]],
        )


def main(steps: str, answers: str) -> None:
    import ray
    from tests.engines.vllm import kv_engine

    on_a_cpu()
    with tempfile.TemporaryDirectory(prefix="thaw-ray-", dir="/tmp") as place:  # paths of sockets are short
        ray.init(
            num_cpus=2,
            resources={SLOT: SLOTS},
            include_dashboard=False,
            object_store_memory=100 << 20,
            runtime_env={"worker_process_setup_hook": "tests.engines.vllm.ray_engine.on_a_cpu"},
            _temp_dir=place,
        )
        try:
            kv_engine.main(steps, answers)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
