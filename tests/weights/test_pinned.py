"""A snapshot held in memory fills any number of models, and is the file as it was."""

import os
import time

import pytest
import torch
from tests.weights.modules import state
from tests.weights.test_restore import base, module, other, payload_of

from thaw_vllm import freeze_model, pin
from thaw_vllm.errors import (
    CorruptionError,
    FormatError,
    MismatchError,
    ReplacedError,
    StorageError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(params=["memory", "disk"])
def path(request, tmp_path, memory_path):
    found = (memory_path if request.param == "memory" else tmp_path) / "w.thaw"
    freeze_model(module(**base()), found)
    return found


def damage(path, number=1):
    at, _ = payload_of(path)[number]
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_fills_one_model_after_another(path):
    with pin(path, "cpu") as pinned:
        assert pinned.path == str(path)
        assert pinned.bytes == path.stat().st_size
        assert pinned.seconds > 0
        for workers in (None, 1, 3):
            target = module(**other())
            report = pinned.restore(target, workers=workers)
            assert state(target) == state(module(**base()))
            assert (report.path, report.verified, report.why) == (str(path), "xxh3", pinned.why)
            assert report.bytes == sum(length for _, length in payload_of(path))
            assert report.route == "memory → into host memory"


def test_fills_models_of_another_layout(path):
    weight = torch.zeros(4, 3).t()
    with pin(path, "cpu") as pinned:
        target = module(**other(weight=weight, tied=weight))
        pinned.restore(target)
    assert state(target) == state(module(**base()))


def test_says_how_it_is_held(tmp_path, memory_path):
    freeze_model(module(**base()), tmp_path / "w.thaw")
    with pin(tmp_path / "w.thaw", "cpu", workers=2) as pinned:
        assert "memory of its own" in pinned.why or "mapped" in pinned.why


def test_closed(path):
    pinned = pin(path, "cpu")
    pinned.close()
    pinned.close()
    with pytest.raises(UsageError, match="is not held any more; pin it again"):
        pinned.restore(module(**other()))


def test_file_that_was_replaced_or_removed_meanwhile(path):
    with pin(path, "cpu") as pinned:
        freeze_model(module(**other()), path, force=True)
        target = module(**other())
        pinned.restore(target)
        assert state(target) == state(module(**base()))
        path.unlink()
        pinned.restore(target)
    assert state(target) == state(module(**base()))


@pytest.mark.parametrize("how", ["byte", "cut"])
def test_file_that_was_written_to_meanwhile(path, how):
    """The mapped one says so; memory of its own is what it was."""
    with pin(path, "cpu") as pinned:
        time.sleep(0.02)  # more than the file system's clock tick
        if how == "byte":
            damage(path)
        else:
            os.truncate(path, 4096)
        target = module(**other())
        if "mapped" in pinned.why:
            with pytest.raises(ReplacedError):
                pinned.restore(target)
        else:
            pinned.restore(target)
            assert state(target) == state(module(**base()))


def test_damage_is_found_at_every_restore_and_the_memory_serves_on(path):
    damage(path)
    with pin(path, "cpu") as pinned:
        for _ in range(2):
            with pytest.raises(CorruptionError, match="the checksum of 'weight'"):
                pinned.restore(module(**other()))
        target = module(**other())
        assert pinned.restore(target, verify=False).verified == "none"
        assert state(target) != state(module(**base()))


def test_another_model_is_refused_and_the_next_is_filled(path):
    with pin(path, "cpu") as pinned:
        wrong = other(last=torch.zeros(6))
        with pytest.raises(MismatchError, match=r"the model has it as float32 \[6\]"):
            pinned.restore(module(**wrong))
        assert not wrong["first"].any()
        with pytest.raises(TypeError, match="fast"):
            pinned.restore(module(**other()), fast=True)
        target = module(**other())
        pinned.restore(target)
    assert state(target) == state(module(**base()))


@pytest.mark.parametrize("device", ["meta", "mps", torch.device("meta")])
def test_device_that_is_neither(device, path):
    with pytest.raises(UsageError, match=r"pin\(\) knows CUDA GPUs and the host, not"):
        pin(path, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_the_host(path):
    with pin(path) as pinned:
        target = module(**other())
        pinned.restore(target)
    assert state(target) == state(module(**base()))


def test_gpu_of_amd_needs_no_nvidia_driver(path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pin(path, "cuda:0") as pinned:
        target = module(**other())
        pinned.restore(target)
    assert state(target) == state(module(**base()))


def test_path_that_is_no_snapshot(tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        pin(tmp_path / "absent", "cpu")
    (tmp_path / "x").write_bytes(b"x" * 10_000)
    with pytest.raises(FormatError, match=r"'.*x'"):
        pin(tmp_path / "x", "cpu")


def test_progress(path):
    seen = []
    with pin(path, "cpu") as pinned:
        report = pinned.restore(module(**other()), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
