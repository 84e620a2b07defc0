"""Weights in memory that several processes map: what was frozen, bit for bit, and nobody changes another's."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.weights.modules import bits, plans, state
from tests.weights.test_restore import base, module, payload_of

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, DeviceError, MismatchError, StorageError
from thaw_vllm.transport.shared import Made, mapped
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.shared import ALIGNED, Held, size, views

pytestmark = pytest.mark.usefixtures("no_leaks")
CPU = torch.device("cpu")
READER = """
import json, sys, torch
from tests.weights.modules import bits
from thaw_vllm.transport.shared import mapped
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.shared import views
path, told = sys.argv[1], json.loads(sys.argv[2])
with open_snapshot(path) as opened:
    found = views(mapped(told, torch.device("cpu")), opened.snapshot.index)
print(json.dumps({name: bits(tensor).hex() for name, tensor in found.items()}))
for tensor in found.values():
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0)
"""
"""Maps, tells what it finds, and writes over all of it."""


@pytest.fixture
def path(tmp_path):
    freeze_model(module(**base()), tmp_path / "w.thaw")
    return tmp_path / "w.thaw"


def index_of(path):
    with open_snapshot(path) as opened:
        return opened.snapshot.index


@pytest.mark.soak
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_any_module(tmp_path, plan):
    path, frozen = tmp_path / "w.thaw", plan.build(1)
    freeze_model(frozen, path, force=True)
    held, index = Held(path, CPU), index_of(path)
    found = views(mapped(held.made.told, CPU), index)
    assert {name: content for name, (_, _, content) in state(frozen).items()} == {
        name: bits(tensor) for name, tensor in found.items()
    }
    begins = {found[t.name].data_ptr() - t.offset for t in index.tensors if t.storage is not None}
    first = min(begins, default=0)
    assert all((begin - first) % ALIGNED == 0 for begin in begins)
    assert len(begins) == len({t.storage for t in index.tensors if t.storage is not None}), "no two overlap"
    assert held.made.tensor.numel() == size(index)
    held.made.close()


def test_another_process(path):
    held = Held(path, CPU)
    expected = {name: bits(tensor).hex() for name, tensor in views(held.made.tensor, index_of(path)).items()}
    for _ in range(2):  # the second would see what the first has written
        command = [sys.executable, "-c", READER, path, json.dumps(held.made.told)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected
    held.made.close()


def test_damage_is_found_before_anybody_maps_it(path):
    at, _ = payload_of(path)[1]
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptionError):
        Held(path, CPU)


def test_what_does_not_fit(path):
    made = Made(size(index_of(path)) + ALIGNED, CPU)
    with pytest.raises(MismatchError, match=r"have .* bytes, this snapshot's take"):
        views(made.tensor, index_of(path))
    with pytest.raises(MismatchError, match="in the host's memory"):
        mapped(made.told, torch.device("cuda", 0))
    with pytest.raises(DeviceError, match="cannot be shared"):
        Made(1, torch.device("meta"))
    told = made.told
    made.close()
    made.close()
    with pytest.raises(StorageError, match="cannot be mapped"):
        mapped(told, CPU)
