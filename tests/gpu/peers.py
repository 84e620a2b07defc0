"""Weights from one GPU's process to another's, every byte compared; prints one JSON object.

    python tests/gpu/peers.py [--gb 16] [--from 0] [--to 1] [--rounds 4] [--tcp]

A process freezes tensors of an 8b shape to /dev/shm (as much host memory as ``--gb``) and offers them; this one takes
them as an engine does, and compares them with what it reads from the file. ``limit_gb_per_s`` is torch's plain copy
between the two GPUs in the same run, ``restore_gb_per_s`` the same bytes from the file. With ``--tcp`` they are taken
from a third process, which lends them over TCP.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from thaw_vllm import freeze_model, restore_model
from thaw_vllm.transport.peer_token import VARIABLE, lender_token
from thaw_vllm.transport.tcp_address import Address
from thaw_vllm.transport.tcp_lender import Lender
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.peers import AUTO, offer, take
from thaw_vllm.weights.reading import RestoreOptions

LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "norm": (4096,)}
LAYER_BYTES = sum(2 * torch.Size(shape).numel() for shape in LAYER.values())


def model(gigabytes: float, device: str, seed: int | None = None) -> torch.nn.Module:
    """Layers of bf16 tensors, together about so many bytes; random ones with a seed."""
    found = torch.nn.Module()
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    count = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    small = gigabytes * 1e9 < LAYER_BYTES
    for number in range(count):
        for name, shape in LAYER.items():
            size = (shape[0] // 64, *shape[1:]) if small else shape
            tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
            if generator is not None:
                tensor.normal_(generator=generator)
            found.register_buffer(f"layer{number}_{name}", tensor)
    return found


def lend(path: Path, place: Path, gigabytes: float, device: str) -> None:
    """What the lender's process does."""
    own = model(gigabytes, device, seed=1)
    freeze_model(own, path)
    with open_snapshot(path, with_chunks=False) as opened:
        made = offer(opened, *fillable(own), lambda: None, place)
    print("ready", flush=True)
    sys.stdin.read()
    made.withdraw()


def relay(place: Path, token: Path) -> None:
    """What ``thaw lend`` does."""
    with contextlib.closing(Lender(Address("127.0.0.1", 0), lender_token(token, os.environ)[0], place)) as lender:
        print(f"tcp://{lender.address}", flush=True)
        lender.serve()


@contextlib.contextmanager
def lending(folder: Path) -> Iterator[str]:
    """The address of a process that does it."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text("0123456789abcdef" * 2)
    os.environ[VARIABLE] = str(token)
    with subprocess.Popen([sys.executable, __file__, "--relay", str(folder)], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        try:
            yield one.stdout.readline().strip()
        finally:
            one.kill()


def measure(gigabytes: float, lender: int, taker: int, rounds: int, tcp: bool) -> dict[str, Any]:
    """The object."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, contextlib.ExitStack() as stack:
        path, place = Path(name) / "w.thaw", Path(name) / "state" / "offers"
        command = [sys.executable, __file__, "--lend", name, "--gb", str(gigabytes), "--from", str(lender)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        peer = stack.enter_context(lending(Path(name))) if tcp else AUTO
        torch.cuda.set_device(taker)
        device = f"cuda:{taker}"
        own = model(gigabytes, device)
        targets, required = fillable(own)
        taken = []
        for _ in range(rounds):
            for tensor in targets.values():
                tensor.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            with open_snapshot(path) as opened:
                report = take(opened, targets, required, RestoreOptions(), peer, place)
            taken.append(time.perf_counter() - start)
        foreign = lender != taker and torch._C._cuda_hasPrimaryContext(lender)
        other = model(gigabytes, device)
        restored = [restore_model(other, path) for _ in range(2)][-1]
        theirs = fillable(other)[0]
        equal = all(torch.equal(targets[key].view(torch.int16), theirs[key].view(torch.int16)) for key in targets)
        process.stdin.close()
        ended = process.wait(60)
        del other, theirs
        limit = plain(report.bytes, lender, taker)
    best = min(taken)
    return {
        "bytes": report.bytes,
        "route": report.route,
        "verified": report.verified,
        "equal": equal,
        "seconds": taken,
        "phases": report.seconds,
        "gb_per_s": report.bytes / 1e9 / best,
        "limit_gb_per_s": limit,
        "restore_gb_per_s": restored.gb_per_s,
        "context_on_the_lenders_gpu": foreign,
        "lender_ended": ended,
        "gpus": [torch.cuda.get_device_name(number) for number in (lender, taker)],
        "torch": torch.__version__,
    }


def plain(size: int, lender: int, taker: int) -> float:
    """Gigabytes a second of torch's own copy, the best of four."""
    size = min(size, 8 << 30)
    one = torch.ones(size, dtype=torch.uint8, device=f"cuda:{lender}")
    other = torch.empty(size, dtype=torch.uint8, device=f"cuda:{taker}")
    found = []
    for _ in range(4):
        torch.cuda.synchronize(lender)
        torch.cuda.synchronize(taker)
        start = time.perf_counter()
        other.copy_(one)
        torch.cuda.synchronize(lender)
        torch.cuda.synchronize(taker)
        found.append(size / 1e9 / (time.perf_counter() - start))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=16)
    parser.add_argument("--from", dest="lender", type=int, default=0)
    parser.add_argument("--to", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--lend", type=Path)
    parser.add_argument("--relay", type=Path)
    asked = parser.parse_args()
    if asked.lend is not None:
        torch.cuda.set_device(asked.lender)
        lend(asked.lend / "w.thaw", asked.lend / "state" / "offers", asked.gb, f"cuda:{asked.lender}")
        return
    if asked.relay is not None:
        relay(asked.relay / "state" / "offers", asked.relay / "token")
        return
    found = measure(asked.gb, asked.lender, asked.to, asked.rounds, asked.tcp)
    print(json.dumps(found, indent=1))
    if not found["equal"] or found["context_on_the_lenders_gpu"]:
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    main()
