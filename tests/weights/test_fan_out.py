"""One rank reads, all have the bytes: over gloo, in processes of their own; what fails in one fails in all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from tests.weights.modules import bits, state
from tests.weights.test_restore import base, module, other, payload_of

import thaw_vllm
from thaw_vllm import freeze_model
from thaw_vllm.errors import UsageError
from thaw_vllm.weights import pieces as pieces_module
from thaw_vllm.weights.capture import fillable
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.pieces import Checks, Wire, pieces

pytestmark = pytest.mark.usefixtures("no_leaks")

RANK = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import thaw_vllm
from tests.weights.modules import bits
from tests.weights.test_fan_out import large
from tests.weights.test_restore import base, module, other
from thaw_vllm.errors import DeviceError
from thaw_vllm.weights import fan_out, pieces

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), world, rank)
fan_out.PIECE, pieces.SMALL = 5 << 20, 1 << 16
path, options, group, model = folder / "w.thaw", {}, None, large(None)

def answer():
    began = time.monotonic()
    try:
        report = thaw_vllm.restore_model_broadcast(model, path, group, **options)
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error), "took": time.monotonic() - began}
    state = {name: bits(tensor).hex()[:64] + str(hash(bits(tensor))) for name, tensor in
             [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]}
    return {"state": state, "route": report.route, "why": report.why, "verified": report.verified,
            "bytes": report.bytes, "seconds": report.seconds, "stored": report.stored}

found = []
exec((folder / "case.py").read_text())
(folder / f"answer-{rank}.json").write_text(json.dumps(found))
os._exit(0)  # the end of a process group that has lost one may abort
"""


def large(seed):
    """Tensors of several chunks and pieces, one in another order, ties and many small ones."""
    shapes = [(1 << 20, 3), (700, 900), (3,), (1,), (33, 5), (1 << 21,)]
    tensors = {f"t{n}": torch.empty(shape) for n, shape in enumerate(shapes)}
    tensors["half"] = torch.empty(12345, dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0)
    tensors |= {f"small{n}": torch.empty(n + 1, dtype=torch.int64) for n in range(20)}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            made = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(made if tensor.is_floating_point() else (made * 1e9).to(tensor.dtype))
    return module(**tensors, tied=tensors["t1"])


def run(folder, case, world=2, codes=(0,)):
    """The ranks' answers to a case, which each of them runs."""
    (folder / "case.py").write_text(textwrap.dedent(case))
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", RANK]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
                )
            )
            for rank in range(world)
        ]
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode in codes for rank in ranks), ([rank.returncode for rank in ranks], said)
    return [
        json.loads(answer.read_text()) if answer.exists() else None
        for answer in (folder / f"answer-{rank}.json" for rank in range(world))
    ]


@pytest.fixture
def folder(memory_path):
    freeze_model(large(1), memory_path / "w.thaw")
    freeze_model(large(1), memory_path / "small.thaw", compress=True)
    freeze_model(large(2), memory_path / "other.thaw")
    return memory_path


def test_every_rank_has_every_byte(folder):
    """Three ranks, one with a tensor in another order; also a compressed file, some of the ranks, and unverified."""
    ranks = run(
        folder,
        """
        if rank == 1:
            model = module(**(dict(model._buffers) | {"t0": torch.empty(3, 1 << 20).t()}))
        found.append(answer())
        path = folder / "small.thaw"
        told, options = [], {"progress": lambda *done: told.append(done), "workers": 2}
        found.append(answer() | {"progress": told[-1]})
        path, options = folder / "other.thaw", {"verify": False}
        found.append(answer())
        path, options = folder / "w.thaw", {}
        group = dist.new_group([1, 2])
        found.append(answer())
        with torch.inference_mode():
            group, model = None, large(None)
            found.append(answer())
        if rank == 2:  # rank 0 of a group is not rank 0 of all
            group = dist.new_group([2], use_local_synchronization=True)
            found.append(answer())
        """,
        world=3,
    )
    first = [[entry.get("state") for entry in found[:3]] for found in ranks]
    assert first[0] == first[1] == first[2] and None not in first[0]
    assert first[0][0] == first[0][1] != first[0][2]
    size = ranks[0][0]["bytes"]
    for rank, found in enumerate(ranks):
        assert [entry["verified"] for entry in found[:3]] == ["xxh3", "xxh3", "none"]
        assert all(entry["bytes"] == size for entry in found[:3])
        want = "and on to 2 ranks by gloo" if rank == 0 else "rank 0 by gloo → host memory"
        assert found[0]["route"].endswith(want)
        assert rank == 0 or found[0]["why"] == "rank 0 reads for 3 ranks"
        assert "broadcast" in found[0]["seconds"] if rank == 0 else "receive" in found[0]["seconds"]
        assert found[1]["progress"][0] == found[1]["progress"][1] == found[1]["stored"]
        assert (found[1]["stored"] < size) == (rank == 0), "compressed on the disk, not on the way"
    assert (ranks[0][3]["error"], "not in the group" in ranks[0][3]["message"]) == ("UsageError", True)
    assert ranks[1][3]["state"] == ranks[2][3]["state"] == first[0][0] == ranks[2][5]["state"]
    assert all(found[4]["state"] == first[0][0] for found in ranks), "tensors made in inference mode"
    assert ranks[1][3]["route"].endswith("and on to 1 ranks by gloo")


def test_what_is_told_before_anything_is_copied(folder):
    """Of the wrong files, models and options."""
    ranks = run(
        folder,
        """
        path = folder / ("w.thaw" if rank else "other.thaw")
        found.append(answer())
        path = folder / ("w.thaw" if rank else "small.thaw")
        found.append(answer())
        path = folder / ("w.thaw" if rank == 0 else "nowhere.thaw")
        found.append(answer())
        path, options = folder / "w.thaw", {"verify": bool(rank)}
        found.append(answer())
        options, whole, wrong = {}, model, module(**dict(model._buffers, t2=torch.empty(4)))
        model = wrong if rank else whole
        found.append(answer())
        model = whole if rank else wrong
        found.append(answer())
        model = whole
        found.append(answer())
        """,
    )
    kinds = ["MismatchError", "MismatchError", "StorageError", "MismatchError", "MismatchError", "MismatchError"]
    for rank, found in enumerate(ranks):
        assert [entry.get("error") for entry in found] == [*kinds, None], rank
        assert all("rank 1 has opened another snapshot" in found[n]["message"] for n in (0, 1, 3))
        assert ("rank 1 could not thaw: StorageError" in found[2]["message"]) == (rank == 0)
        assert ("rank 1 could not thaw: MismatchError" in found[4]["message"]) == (rank == 0)
        assert ("rank 0 could not thaw: MismatchError" in found[5]["message"]) == (rank == 1)
        assert found[2]["message"].endswith("nothing was copied") or rank == 1
    assert ranks[0][6]["state"] == ranks[1][6]["state"]


def test_damage_ends_all_and_they_go_on(folder):
    """In the file that is read, or on the way to one rank; each says where."""
    places = payload_of(folder / "w.thaw")
    data = bytearray((folder / "w.thaw").read_bytes())
    data[places[1][0] + 5] ^= 1
    (folder / "bad.thaw").write_bytes(data)
    ranks = run(
        folder,
        """
        path = folder / "bad.thaw"
        found.append(answer())
        path, real = folder / "w.thaw", fan_out._Ranks.receive
        def receive(self, view):
            real(self, view)
            if view.numel() > 1 << 20:
                view[77] ^= 1
            return view
        if rank == 2:
            fan_out._Ranks.receive = receive
        found.append(answer())
        options = {"verify": False}
        found.append(answer())
        options, fan_out._Ranks.receive = {}, real
        found.append(answer())
        """,
        world=3,
    )
    for rank, found in enumerate(ranks):
        assert [entry.get("error") for entry in found] == ["CorruptionError", "CorruptionError", None, None], found
        assert ("rank 0 could not thaw: CorruptionError: " in found[0]["message"]) == (rank != 0)
        assert "bad.thaw' is damaged: the checksum of" in found[0]["message"]
        assert ("rank 2 could not thaw: CorruptionError: " in found[1]["message"]) == (rank != 2)
        assert found[1]["message"].endswith("the models must not be used") == (rank != 2)
    assert ranks[0][3]["state"] == ranks[1][3]["state"] == ranks[2][3]["state"] == ranks[0][2]["state"]
    assert ranks[2][2]["state"] != ranks[0][2]["state"], "that is what verifying is for"


LIMIT = 30
"""Seconds that the ranks of the next test would wait for one that has left."""


def test_whatever_fails_in_one_ends_all_at_once_and_they_go_on(folder, interruptible):
    ranks = run(
        folder,
        f"""
        group = dist.new_group(timeout=timedelta(seconds={LIMIT}))
        def failing(error, after=0):
            calls = []
            def call(*given):
                calls.append(given)
                if len(calls) > after:
                    raise error
            return call
        def fails(who, place, name, change):
            if rank == who:
                real = getattr(place, name)
                setattr(place, name, change)
            found.append(answer())
            if rank == who:
                setattr(place, name, real)
        def interrupting(*_):
            if not interrupted:
                interrupted.append(True)
                os.kill(os.getpid(), signal.SIGINT)
        def gather(self, piece, real=fan_out.Wire.gather, fail=failing(torch.OutOfMemoryError("no room"), 1)):
            fail()
            real(self, piece)
        for who, wrong in [
            (1, {{"progress": failing(ValueError("no bar"), 1)}}),
            (0, {{"progress": failing(ValueError("no bar"), 1)}}),
            (1, {{"progress": failing(KeyboardInterrupt("stop"))}}),
            (1, {{"progress": interrupting}}),
            (0, {{"progress": interrupting}}),
            (1, {{"workers": 0}}),
            (0, {{"workers": 0}}),
            (1, {{"colour": "red"}}),
        ]:
            interrupted, options = [], wrong if rank == who else {{}}
            found.append(answer())
        options = {{}}
        fails(1, fan_out.Checks, "__enter__", failing(DeviceError("no memory")))
        fails(1, fan_out.Checks, "check", failing(RuntimeError("no launch"), 1))
        fails(1, fan_out.Wire, "scatter", failing(torch.OutOfMemoryError("no room"), 1))
        fails(0, fan_out.Wire, "gather", gather)
        fails(0, fan_out, "settle", failing(RuntimeError("sticky")))
        fails(0, fan_out, "ThreadPoolExecutor", failing(RuntimeError("can't start new thread")))
        fails(1, fan_out, "ThreadPoolExecutor", failing(RuntimeError("can't start new thread")))
        fails(1, fan_out, "FileSource", failing(ValueError(chr(1) * 2000)))
        found.append(answer())
        """,
        world=3,
    )
    expected = [
        (1, "ValueError", "no bar", True),
        (0, "ValueError", "no bar", True),
        (1, "KeyboardInterrupt", "stop", True),
        (1, "KeyboardInterrupt", "", True),
        (0, "KeyboardInterrupt", "", True),
        (1, "UsageError", "workers must be at least 1, not 0", False),
        (0, "UsageError", "workers must be at least 1, not 0", False),
        (1, "TypeError", "unexpected keyword argument 'colour'", False),
        (1, "DeviceError", "no memory", False),
        (1, "RuntimeError", "no launch", True),
        (1, "OutOfMemoryError", "no room", True),
        (0, "OutOfMemoryError", "no room", True),
        (0, "RuntimeError", "sticky", False),
        (0, "RuntimeError", "can't start new thread", False),
        (1, "RuntimeError", "can't start new thread", False),
        (1, "ValueError", chr(1) * 600, False),
    ]
    for rank, found in enumerate(ranks):
        assert len(found) == len(expected) + 1
        for said, (who, error, message, copied) in zip(found, expected, strict=False):
            ours = error if error in ("UsageError", "DeviceError") else "ThawError"
            assert said["error"] == (error if rank == who else ours), (rank, who, said)
            assert message in said["message"] and said["took"] < LIMIT / 3
            if rank != who:
                assert said["message"].startswith(f"rank {who} could not thaw: {error}: ")
                assert said["message"].endswith("the models must not be used" if copied else "nothing was copied")
    assert ranks[0][-1]["state"] == ranks[1][-1]["state"] == ranks[2][-1]["state"]


def test_groups_of_several_backends(folder):
    """Ranks on unlike devices are refused where their backends are unlike; the device is made up."""
    ranks = run(
        folder,
        """
        unlike = dist.new_group(backend="cpu:gloo,cuda:gloo")
        for group in (dist.new_group(backend="cpu:gloo"), unlike):
            found.append(answer())
        real, elsewhere = fan_out.Wire, {}
        class Wire(real):
            def __init__(self, *given):
                super().__init__(*given)
                self.device = torch.device("cuda", 0)
        if rank:
            fan_out.Wire = Wire
        group = dist.new_group(backend="cpu:gloo")
        found.append(answer())
        config = fan_out.dist.get_backend_config
        fan_out.dist.get_backend_config = lambda group: "cpu:gloo,cuda:nccl"
        found.append(answer())
        fan_out.Wire, fan_out.dist.get_backend_config = real, config
        found.append(answer())
        """,
    )
    for rank, found in enumerate(ranks):
        assert [said.get("error") for said in found] == [None, None, "UsageError", "UsageError", None], found
        assert found[0]["route"].endswith("by gloo" if rank == 0 else "rank 0 by gloo → host memory")
        assert found[1]["route"] == found[0]["route"]
        assert "the model is on cuda:0, for which the process group has no backend" in found[2]["message"]
        assert "rank 1's model is reached by nccl, rank 0's by gloo" in found[3]["message"]


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed(who, folder):
    ranks = run(
        folder,
        f"""
        real, sent = fan_out._Ranks.send, []
        def send(self, view):
            sent.append(view)
            if rank == {who} and len(sent) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, view)
        fan_out._Ranks.send = send
        found.append(answer())
        """,
        codes=(0, -signal.SIGKILL),
    )
    (found,) = ranks[1 - who]
    assert ranks[who] is None
    assert found["error"] == "ThawError" and "start all of them again" in found["message"]


def test_without_a_group(folder, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # an engine in this process has one
    with pytest.raises(UsageError, match="init_process_group"):
        thaw_vllm.restore_model_broadcast(large(None), folder / "w.thaw")


# --- pieces -----------------------------------------------------------------------------------------------------------


def sent(path, source, target, most, small, monkeypatch, kind=None):
    """From one model to another, through wires of their own."""
    monkeypatch.setattr(pieces_module, "SMALL", small)
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
    planned = pieces(snapshot, most)
    wires = [Wire(snapshot, fillable(model)[0], planned) for model in (source, target)]
    with Checks(str(path), torch.device("cpu"), snapshot.preamble.payload_at, len(snapshot.chunks)) as checks:
        checks.kind = kind or checks.kind
        for piece in planned:
            wires[0].gather(piece)
            ours, theirs = (wire.views(piece) for wire in wires)
            assert [view.numel() for view in ours] == [view.numel() for view in theirs]
            for one, other_ in zip(ours, theirs, strict=True):
                other_.copy_(one)
            checks.check(list(wires[1].chunks(piece)))
            wires[1].scatter(piece)
    return planned


@pytest.mark.parametrize("kind", ["xxh3", "wordsum"])
@pytest.mark.parametrize(
    ("most", "small"), [(1, 0), (1, 1 << 30), (5 << 20, 1 << 16), (1 << 40, 1 << 20), (1 << 40, 0)]
)
def test_pieces_of_any_size(most, small, kind, folder, monkeypatch):
    target = large(None)
    planned = sent(folder / "w.thaw", large(1), target, most, small, monkeypatch, kind)
    assert state(target) == state(large(1))
    assert len(planned) == 1 if most == 1 << 40 else len(planned) > 3
    with open_snapshot(folder / "w.thaw") as opened:
        assert sum(piece.bytes for piece in planned) == opened.snapshot.bytes


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_ties_repeats_and_other_orders(small, tmp_path, monkeypatch):
    freeze_model(module(**base()), tmp_path / "w.thaw")
    for turned in (False, True):
        target = module(**other())
        if turned:
            weight = torch.empty(4, 3).t()
            target = module(**(other() | {"weight": weight, "tied": weight}))
        sent(tmp_path / "w.thaw", module(**base()), target, 10, small, monkeypatch)
        assert state(target) == state(module(**base()))
        assert bits(target.weight) == bits(base()["weight"])


def test_nothing(tmp_path, monkeypatch):
    freeze_model(torch.nn.Module(), tmp_path / "w.thaw")
    assert sent(tmp_path / "w.thaw", torch.nn.Module(), torch.nn.Module(), 10, 0, monkeypatch) == []
