"""One read for several GPUs: ``restore_model_broadcast`` beside one ``restore_model``; prints one JSON object.

    python tests/gpu/fan_out.py [--gb 16] [--ranks 2] [--rounds 4]

A process a GPU, over NCCL. The file is on /dev/shm, as much host memory as ``--gb``. ``ratio`` is the slowest rank's
broadcast over one rank's read, each the best of its rounds, everything counted; every rank's bytes are compared with
what it reads itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thaw_vllm import expect_restore, freeze_model, restore_model, restore_model_broadcast
from thaw_vllm.weights.capture import fillable

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.gpu.peers import model


def run(folder: Path, rank: int, world: int, gigabytes: float, rounds: int) -> None:
    """One rank; rank 0 writes the file."""
    torch.cuda.set_device(rank)
    device, path = f"cuda:{rank}", folder / "w.thaw"
    dist.init_process_group("nccl", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    if rank == 0:
        freeze_model(model(gigabytes, device, seed=1), path)
    dist.barrier()
    own, other = model(gigabytes, device), model(gigabytes, device)
    reads, casts, report = [], [], None
    for _ in range(rounds):
        if rank == 0:
            expect_restore(device)
            time.sleep(1)
            reads.append(timed(lambda: restore_model(other, path)))
        dist.barrier()
        for tensor in fillable(own)[0].values():
            tensor.zero_()
        if rank == 0:
            expect_restore(device)
            time.sleep(1)
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        report = restore_model_broadcast(own, path)
        casts.append(time.perf_counter() - start)
    if rank:
        restore_model(other, path)
    pairs = zip(fillable(own)[0].values(), fillable(other)[0].values(), strict=True)
    equal = all(torch.equal(one.view(torch.int16), two.view(torch.int16)) for one, two in pairs)
    assert report is not None
    told = {"reads": reads, "broadcasts": casts, "equal": equal, "route": report.route, "bytes": report.bytes}
    told |= {"phases": report.seconds, "verified": report.verified}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(gigabytes: float, world: int, rounds: int) -> dict[str, Any]:
    """The object."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        command = [sys.executable, __file__, "--folder", name, "--gb", str(gigabytes), "--rounds", str(rounds)]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank), "--ranks", str(world)], stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [rank.communicate()[1] for rank in ranks]
        assert not any(rank.returncode for rank in ranks), "\n".join(said)[-6000:]
        told = [json.loads((Path(name) / f"told-{rank}.json").read_text()) for rank in range(world)]
    read = min(told[0]["reads"])
    slowest = [max(one["broadcasts"][number] for one in told) for number in range(rounds)]
    return {
        "bytes": told[0]["bytes"],
        "equal": all(one["equal"] for one in told),
        "read_seconds": told[0]["reads"],
        "broadcast_seconds": slowest,
        "ratio": min(slowest) / read,
        "routes": [one["route"] for one in told],
        "phases": [one["phases"] for one in told],
        "verified": [one["verified"] for one in told],
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.rank is not None:
        run(asked.folder, asked.rank, asked.ranks, asked.gb, asked.rounds)
        return
    found = measure(asked.gb, asked.ranks, asked.rounds)
    print(json.dumps(found, indent=1))
    if not found["equal"]:
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    main()
