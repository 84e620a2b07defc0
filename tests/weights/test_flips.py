"""One flipped bit anywhere in a file is an error, or lies where nothing is stored; it is never a different tensor."""

import random

import pytest
import torch
from tests.weights.modules import bits, elements

from thaw_vllm.errors import ThawError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.transport.source import read_bytes
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_memory
from thaw_vllm.weights.read_storage import filled
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore

pytestmark = pytest.mark.usefixtures("no_leaks")

SHAPES = {
    "matrix": ("bfloat16", (57, 91)),
    "bias": ("float32", (91,)),
    "scale": ("float8_e4m3fn", (4097,)),
    "n": ("int64", ()),
}


def tensors(rng=None):
    """The tensors of the file, of random bits or zero, with a tie and one without elements."""
    made = {}
    for name, (dtype, shape) in SHAPES.items():
        flat = (
            elements(torch.Size(shape).numel(), dtype, rng) if rng else torch.zeros(shape, dtype=getattr(torch, dtype))
        )
        made[name] = flat.reshape(shape)
    return made | {"tied": made["matrix"], "turned": made["matrix"].t(), "nothing": torch.empty(0, 3)}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """The file's bytes, its tensors and its paddings."""
    path = tmp_path_factory.mktemp("flips") / "w.thaw"
    source = tensors(random.Random(5))
    named = [(name, "tensor", tensor) for name, tensor in source.items()]
    captured = capture(named, [("config.json", b'{"model_type": "llama"}')])
    write_snapshot(path, Header(Identity("checkpoint"), metadata={"a": "b"}), captured, FreezeOptions())
    data = path.read_bytes()
    with open_memory(data) as opened:
        paddings = opened.snapshot.paddings()
    return data, {name: bits(t) for name, t in source.items()}, paddings


def read_all(data):
    """Everything a file gives: its tensors' bytes, its carried file, and whether its paddings are zero."""
    with open_memory(data) as opened:
        target = tensors()
        restore(opened.source, opened.snapshot, target, set(target), RestoreOptions(workers=1))
        (file,) = opened.snapshot.index.files
        config = filled(opened.snapshot, opened.source, file.storage)
        clean = not any(any(read_bytes(opened.source, at, length)) for at, length in opened.snapshot.paddings())
    return {name: bits(t) for name, t in target.items()}, config, clean


def test_unharmed_file_gives_everything(snapshot):
    data, expected, paddings = snapshot
    assert read_all(data) == (expected, b'{"model_type": "llama"}', True)
    assert len(paddings) >= 4
    assert sum(length for _, length in paddings) > 2000


def flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check(snapshot, bit):
    data, expected, paddings = snapshot
    padding = any(at <= bit // 8 < at + length for at, length in paddings)
    try:
        found, config, clean = read_all(flip(data, bit))
    except ThawError:
        assert not padding, bit
    else:
        assert padding, bit
        assert not clean, bit
        assert (found, config) == (expected, b'{"model_type": "llama"}'), bit


@pytest.mark.soak
def test_random_flips(soak, snapshot):
    for case in soak(small=500, full=20_000):
        check(snapshot, case.random.randrange(8 * len(snapshot[0])))


@pytest.mark.soak
def test_random_flips_of_what_is_stored(soak, snapshot):
    """As many again outside the paddings, which fill much of so small a file."""
    data, _, paddings = snapshot
    padded = {place for at, length in paddings for place in range(at, at + length)}
    stored = [place for place in range(len(data)) if place not in padded]
    for case in soak(small=500, full=20_000):
        check(snapshot, 8 * case.random.choice(stored) + case.random.randrange(8))


@pytest.mark.soak
def test_random_damage(soak, snapshot):
    """Bytes overwritten, moved, repeated, left out or added."""
    data, expected, _ = snapshot
    for case in soak(small=200, full=5000):
        rng, length = case.random, case.random.randint(1, 9000)
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        changed = rng.choice(
            [
                data[:at] + rng.randbytes(length) + data[at + length :],
                data[:at] + bytes(length) + data[at + length :],
                data[:at] + data[other : other + length] + data[at + length :],
                data[:at] + data[at + length :],
                data[:at] + rng.randbytes(length) + data[at:],
                data[:at],
            ]
        )
        try:
            found, config, clean = read_all(changed)
        except ThawError:
            continue
        assert (found, config) == (expected, b'{"model_type": "llama"}'), case
        assert (changed == data) == clean, case


def test_truncated_and_grown(snapshot):
    """At every kind of boundary, and around it."""
    data, _, paddings = snapshot
    edges = {0, 8, 12, 16, 64, 160, 224, 256, len(data)} | {edge for at, n in paddings for edge in (at, at + n)}
    for length in sorted({edge + step for edge in edges for step in (-1, 0, 1)} - {len(data), -1}):
        changed = data[:length] + bytes(max(length - len(data), 0))
        with pytest.raises(ThawError):
            read_all(changed)


@pytest.mark.soak
def test_truncated_anywhere(soak, snapshot):
    data = snapshot[0]
    for case in soak(small=40, full=200):
        with pytest.raises(ThawError):
            read_all(data[: case.random.randrange(len(data))])
