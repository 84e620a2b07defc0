"""Ranks of a set without an engine: threads, or processes that can be killed, with an all-gather among them."""

import json
import os
import select
import socket
import threading

import torch
from tests.transport.calls import start_child

from thaw_vllm.errors import ThawError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions
from thaw_vllm.weights.open import open_rank
from thaw_vllm.weights.ranks import MAX_MESSAGE, freeze_rank
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore

MODEL = "tensors-blake3:" + "5" * 64


class Lost(Exception):
    """The ranks cannot reach each other any more."""


def freeze_one(target, value, rank, world, exchange, *, force=True, model_id=lambda: MODEL, **parallel):
    """One rank's share of a set whose every element is ``value``."""
    parallel = Parallel(**(parallel or {"tp_rank": rank, "tp_size": world}))
    header = Header(Identity("raw", engine="vllm", parallel=parallel), writer="a test")
    files = [("config.json", b"{}")] if rank == 0 else []
    captured = capture([("w", "parameter", torch.full((1000 + rank,), float(value)))], files)
    return freeze_rank(target, header, captured, FreezeOptions(force=force, workers=1), exchange, model_id)


def loaded(target, world):
    """The value that every rank of the set at ``target`` holds; None where there is nothing."""
    if not os.path.lexists(target):
        return None
    values = set()
    for rank in range(world):
        tensor = torch.full((1000 + rank,), -1.0)
        with open_rank(target, rank) as opened:
            assert opened.snapshot.header.identity.parallel.world == world
            assert opened.snapshot.header.identity.model == MODEL
            restore(opened.source, opened.snapshot, {"w": tensor}, {"w"}, RestoreOptions(workers=1))
        values |= set(tensor.tolist())
    (value,) = values
    return value


class Gather:
    """An all-gather among threads; a rank for which ``fails(rank, round)`` loses the others, and they it next."""

    def __init__(self, world, fails=lambda rank, number: False):
        self.barrier = threading.Barrier(world)
        self.messages = [b""] * world
        self.fails = fails

    def of(self, rank):
        """The exchange of one rank."""
        rounds = iter(range(100))

        def exchange(message):
            assert len(message) <= MAX_MESSAGE
            number = next(rounds)
            self.messages[rank] = message
            try:
                self.barrier.wait(30)
                answers = list(self.messages)
                self.barrier.wait(30)
            except threading.BrokenBarrierError:
                raise Lost(f"in round {number}") from None
            if self.fails(rank, number):
                self.barrier.abort()
                raise Lost(f"rank {rank} in round {number}")
            return answers

        return exchange


def coordinates(tp=1, pp=1, dp=1, *, expert=False):
    """Of every rank of an engine, as ``freeze_one`` takes them; ``expert`` divides experts among tp and dp."""
    sizes = {"tp_size": tp, "pp_size": pp, "dp_size": dp, "ep_size": tp * dp if expert else 1}
    return [
        sizes | {"tp_rank": t, "pp_rank": p, "dp_rank": d, "ep_rank": d * tp + t if expert else 0}
        for d in range(dp)
        for p in range(pp)
        for t in range(tp)
    ]


def freeze_threads(target, value, world, *, fails=lambda rank, number: False, places=None, **options):
    """Every rank in a thread named ``rank-N``; returns what each returned or raised.

    ``places`` are their coordinates, where it is not a tensor-parallel engine; ``target`` may be one a rank.
    """
    gather, outcomes = Gather(world, fails), [None] * world

    def run(rank):
        try:
            place = {} if places is None else places[rank]
            own = target[rank] if isinstance(target, list) else target
            outcomes[rank] = freeze_one(own, value, rank, world, gather.of(rank), **options, **place)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def failed(outcomes):
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]


def freeze_processes(target, value, world, prepare=lambda rank: None):
    """Every rank in a process of its own; ``prepare`` is called in it first. Returns their exit statuses.

    A rank exits with 0 when it froze, 3 when it raised an error of ours, 4 when it lost the others.
    """
    pairs = [socket.socketpair() for _ in range(world)]

    def run(rank):
        for number, (ours, theirs) in enumerate(pairs):
            ours.close()
            if number != rank:
                theirs.close()
        end = pairs[rank][1]

        def exchange(message):
            try:
                end.sendall(len(message).to_bytes(4, "little") + message)
                return [bytes.fromhex(answer) for answer in json.loads(_receive(end))]
            except OSError:
                raise Lost from None

        prepare(rank)
        try:
            freeze_one(target, value, rank, world, exchange)
        except ThawError:
            os._exit(3)
        except Lost:
            os._exit(4)

    children = [start_child(lambda rank=rank: run(rank)) for rank in range(world)]
    for _, theirs in pairs:
        theirs.close()
    _coordinate([ours for ours, _ in pairs])
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _coordinate(sockets):
    """Pass messages on, round by round, until the ranks are done; when one is gone, all lose each other."""
    try:
        while True:
            messages = []
            for end in sockets:
                select.select([end], [], [], 60)
                messages.append(_receive(end).hex())
            answer = json.dumps(messages).encode()
            for end in sockets:
                end.sendall(len(answer).to_bytes(4, "little") + answer)
    except OSError:
        pass
    finally:
        for end in sockets:
            end.close()


def _receive(end):
    def exactly(length):
        data = b""
        while len(data) < length:
            part = end.recv(length - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    return exactly(int.from_bytes(exactly(4), "little"))
