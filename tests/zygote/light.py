"""What a zygote of these tests imports: numpy and what it is asked to; and it is less patient than vLLM's."""

from __future__ import annotations

import os
import time
from multiprocessing import process  # noqa: F401

from thaw_vllm.engines.vllm.preimport import _Work
from thaw_vllm.zygote import keeper, proof, server
from thaw_vllm.zygote.environment import Reads
from thaw_vllm.zygote.server import Imported

keeper.GRACE = 1.0
server._PATIENCE = 1.0


def import_all(imports: list[str], models: list[str]) -> Imported:
    started, reads, work = time.perf_counter(), Reads(), _Work()
    with reads.watching():
        work.import_one("numpy", required=True)
        work.pools = len(proof.native_threads())
        os.environ.get("READ_AT_IMPORT")
        os.environ.get("TZ")
        for name in imports:
            work.import_one(name, required=True)
    details = {"vllm": "none", "engines_forked": True}
    return Imported(work.modules, [], work.pools, time.perf_counter() - started, reads, details=details)
