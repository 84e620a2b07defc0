"""Contexts, records and blocks of no engine: a block's bytes follow from its address, so that any can be checked."""

from __future__ import annotations

import hashlib
import random

from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.format.kv import Group, Layout, Region
from thaw_vllm.sessions import blocks
from thaw_vllm.sessions.context import Context
from thaw_vllm.sessions.record import Head, Session, ids, new_nonce, now

MODEL = "tensors-blake3:" + "5" * 64
SIZE = 4
"""Tokens of a block."""


def context(*, page=96, groups=1, rank=0, world=1, model=MODEL, config="c" * 64, **layout):
    """Of one rank, with a region of ``page`` bytes and one of 32."""
    regions = (Region("a#0", "uint8", (page,), (1,), page), Region("b#0", "float16", (4, 4), (4, 1), 32))
    kinds = tuple(Group("FullAttentionSpec", 8 if n else None, (f"layer.{n}",)) for n in range(groups))
    identity = Identity(
        "kv",
        engine="vllm",
        engine_version="0.32.0",
        architecture="Tiny",
        config=config,
        dtype="bfloat16",
        model=model,
        parallel=Parallel(tp_rank=rank, tp_size=world),
    )
    return Context(identity, Layout(SIZE, "bfloat16", kinds, regions, **layout))


def payload(name, size):
    """What a block is to hold."""
    seed = hashlib.sha256(name.address + bytes([name.group])).digest()
    return random.Random(seed).randbytes(size)


def session(tokens, *, contexts=(), kept=(0,), blocks=None, **head):
    """A record; all whole blocks are kept unless ``blocks`` says how many."""
    whole = len(tokens) // SIZE if blocks is None else blocks
    values = {
        "count": len(tokens),
        "prompt": len(tokens),
        "model": MODEL,
        "block_size": SIZE,
        "blocks": whole,
        "kept": tuple(min(first, whole) for first in kept),
        "contexts": tuple(one.id for one in contexts or (context(),)),
        "created": now(),
        "writer": "a test",
        "nonce": new_nonce(),
    }
    return Session(Head(**values | head), ids(tokens))


def save(store, made, contexts=None):
    """A session with all of its blocks, as a checkpoint leaves it; its id, and how many blocks were new."""
    contexts = contexts or [context()]
    with store.use():
        added = 0
        for one, name in store.named(made, contexts):
            added += blocks.write(store.blocks, name, memoryview(payload(name, one.page)))
        return store.publish(made, contexts), added


def resumes(store, id_):
    """Whether every block of a session is what it is to be."""
    for one, name in store.names(store.read(id_)):
        found = memoryview(bytearray(one.page))
        blocks.read(store.blocks, name, found)
        if found != payload(name, one.page):
            return False
    return True
