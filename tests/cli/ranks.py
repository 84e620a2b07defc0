"""A set of rank files, its ranks being threads."""

import threading

import torch

from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions
from thaw_vllm.weights.ranks import freeze_rank


def freeze_set(target, size, seed=0, *, like=None, experts=None):
    """Write ``target`` and the files of the other ranks beside it.

    Args:
        like: any rank of a set whose sizes are others than those of a tensor-parallel one.
        experts: each rank's record of them.
    """
    like = Parallel(tp_size=size) if like is None else like
    barrier, messages, failures = threading.Barrier(size), [b""] * size, []
    torch.manual_seed(seed)

    def freeze(rank):
        def exchange(message):
            messages[rank] = message
            barrier.wait(30)
            everyone = list(messages)
            barrier.wait(30)
            return everyone

        header = Header(identity=Identity(stage="raw", engine="vllm", parallel=like.at(rank), experts=experts))
        captured = capture([("w", "parameter", torch.randn(1000 + rank))])
        try:
            freeze_rank(target, header, captured, FreezeOptions(force=True), exchange, lambda: None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=freeze, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
