"""Compressed ranges on their way to devices that only torch knows, of which the host stands for one."""

import random

import pytest
import torch
from tests.codecs.data import DATA
from tests.codecs.test_planes import BAD, bad
from tests.transport.test_coded_link import KINDS, Work
from tests.weights.modules import state
from tests.weights.test_compress import CHUNK, model

import thaw_vllm
from thaw_vllm.codecs import planes
from thaw_vllm.errors import CorruptionError, FormatError
from thaw_vllm.transport import coded_torch, parallel
from thaw_vllm.transport.coded_torch import CodedTorchLink, decode
from thaw_vllm.transport.links import Place
from thaw_vllm.transport.pipeline import deliver
from thaw_vllm.transport.readers import Cached
from thaw_vllm.transport.source import MemorySource
from thaw_vllm.weights import restore

pytestmark = pytest.mark.usefixtures("no_leaks")


def of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [kind for kind in DATA if planes.encode(memoryview(DATA[kind][0]), DATA[kind][1])])
def test_the_same_bytes(kind):
    data, width, _ = DATA[kind]
    out = torch.full((len(data) + 2,), 0xEE, dtype=torch.uint8)
    decode(of(planes.encode(memoryview(data), width)), out[1:-1])
    assert out[0] == out[-1] == 0xEE and out[1:-1].numpy().tobytes() == data


@pytest.mark.parametrize("change", BAD)
def test_hostile_frame(change):
    frame, length = bad(BAD[change])
    with pytest.raises(FormatError):
        decode(of(frame), torch.empty(length, dtype=torch.uint8))


def sent(work, **options):
    runs, base = work.runs, work.room.data_ptr()
    places = [Place(work.room, address - base, length) for address, length in runs]
    source = MemorySource(bytes(work.file))
    link = CodedTorchLink(places, "cpu", work.stored, work.damage)
    deliver(Cached(source, "memory", "a test"), "it", work.ranges, link, workers=3, **options)
    source.close()
    assert not link._taken


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("scratch", [1, 1 << 20])
def test_ranges_of_every_kind(shift, scratch, monkeypatch):
    monkeypatch.setattr(parallel, "POLL", 0.001)
    monkeypatch.setattr(coded_torch, "SCRATCH", scratch)
    work = Work(20, 40 * planes.ROW, KINDS, shift=shift)
    sent(work)
    assert work.arrived()


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bit(seed):
    work, rng = Work(5, 40 * planes.ROW, tail=0), random.Random(seed)
    work.sent_with_a_flipped_bit(sent, rng)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_a_model(verify, numba, tmp_path, monkeypatch):
    """The host's tensors as those of a device are taken: copied to, and verified where they are. Processors with numba
    decode faster."""
    monkeypatch.setattr(restore, "quick", lambda: numba)
    path = tmp_path / "w.thaw"
    thaw_vllm.freeze_model(model(), path, compress=True, chunk_size=CHUNK)
    own = restore._direct
    monkeypatch.setattr(restore, "_direct", lambda *given: (found := own(*given)) and (found[0], None))
    other = model(3.0)
    report = thaw_vllm.restore_model(other, path, verify=verify)
    assert state(other) == state(model())
    assert report.route.endswith("torch copies to cpu") and report.stored < report.bytes
    if verify:
        assert ("xxh3" in report.verified) == numba
        data = bytearray(path.read_bytes())
        data[-(1 << 20)] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptionError):
            thaw_vllm.restore_model(other, path)
