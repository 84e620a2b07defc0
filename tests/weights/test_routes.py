"""Each way of reading gives the same model, and the report says which it was."""

import pytest
import torch
from tests.weights.modules import state

from thaw_vllm import freeze_model, restore_model, restore_model_from_ram, restore_model_pipelined
from thaw_vllm.errors import CorruptionError, UsageError
from thaw_vllm.transport import readers
from thaw_vllm.transport.medium import in_memory
from thaw_vllm.transport.readers import ROUTES
from thaw_vllm.transport.source import FileSource
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.reading import RestoreOptions

pytestmark = pytest.mark.usefixtures("no_leaks")


def made(seed):
    """Tensors of many sizes and layouts, thousands of them tiny."""
    generator, found = torch.Generator().manual_seed(seed), torch.nn.Module()

    def random(*shape):
        return torch.randn(shape, generator=generator)

    found.register_buffer("large", random(1500, 1501))
    found.register_buffer("turned", random(300, 70).t())
    found.register_buffer("gaps", random(40, 100)[:, ::3])
    found.register_buffer("scalar", random())
    found.register_buffer("empty", random(0, 3))
    for number in range(3000):
        found.register_buffer(f"t{number}", random(1 + number % 37))
    return found


def elsewhere(seed):
    """The same model with other strides, so that some of it is scattered by element."""
    found = made(seed)
    found.turned = found.turned.contiguous()
    found.large = found.large.t().contiguous().t()
    found.gaps = found.gaps.contiguous()
    return found


FROZEN = made(1)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """The file's bytes; freezing it takes a second."""
    path = tmp_path_factory.mktemp("frozen") / "w.thaw"
    freeze_model(FROZEN, path)
    return path.read_bytes()


@pytest.fixture(params=["memory", "disk"])
def path(request, snapshot, tmp_path, memory_path):
    found = (memory_path if request.param == "memory" else tmp_path) / "w.thaw"
    found.write_bytes(snapshot)
    return found


def lies_in_memory(path):
    with FileSource(path) as source:
        return in_memory(source.descriptor)


def has_direct_io(path):
    with FileSource(path) as source:
        try:
            readers.Direct(source, "a test", peek=False).close()
        except OSError:
            return False
        return True


@pytest.mark.parametrize("workers", [None, 1, 5])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("target", [made, elsewhere])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_model(route, target, verify, workers, path):
    thawed, seen = target(2), []
    report = restore_model(
        thawed, path, route=route, workers=workers, verify=verify, progress=lambda *done: seen.append(done)
    )
    assert state(thawed) == state(FROZEN)
    assert report.verified == ("xxh3" if verify else "none")
    assert seen[-1] == (report.bytes, report.bytes)
    assert report.why
    if lies_in_memory(path):
        assert (report.route, report.sources) == ("tmpfs → into host memory", {})
    elif route == "direct" and has_direct_io(path):
        assert report.route == "direct → into host memory"
        assert "direct reads were asked for" in report.why
        assert sum(report.sources.values()) == report.bytes
        assert report.sources["direct"] > 0
    else:
        assert (report.route, report.sources) == ("page cache → into host memory", {})


def test_pipelined_is_direct(path):
    thawed = made(2)
    report = restore_model_pipelined(thawed, path)
    assert state(thawed) == state(FROZEN)
    asked = restore_model(made(2), path, route="direct")
    assert (report.route, report.why, report.sources) == (asked.route, asked.why, asked.sources)
    assert restore_model_pipelined(made(2), path, route="cached").sources == {}


def test_no_direct_io(path, monkeypatch):
    class Refused:
        def __init__(self, *_, **__):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(readers, "Direct", Refused)
    monkeypatch.setattr(readers, "file_system", lambda _: "nofs")
    thawed = made(2)
    report = restore_model_pipelined(thawed, path)
    assert state(thawed) == state(FROZEN)
    assert report.route == "page cache → into host memory"
    assert report.why == "nofs refuses direct reads: Invalid argument"


def test_from_memory(path):
    thawed = made(2)
    report = restore_model_from_ram(thawed, path.read_bytes(), route="direct")
    assert state(thawed) == state(FROZEN)
    assert (report.route, report.why) == ("memory → into host memory", "the bytes are in memory already")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["large", "turned", "t1234"])
def test_damage_is_found_on_every_route(route, name, path):
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
        storage = next(t.storage for t in snapshot.index.tensors if t.name == name)
        chunk = [c for c in snapshot.chunks if c.storage == storage][-1]
        at = snapshot.preamble.payload_at + chunk.stored_at + chunk.length - 1
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))
    with pytest.raises(CorruptionError, match=f"'{path}' is damaged: the checksum of '{name}' "):
        restore_model(made(2), path, route=route)


@pytest.mark.parametrize("route", ["", "Direct", "mmap", None, 1])
def test_route_that_is_not_known(route, path):
    target = made(2)
    with pytest.raises(UsageError, match="route must be one of auto, cached, direct, not"):
        restore_model(target, path, route=route)
    with pytest.raises(UsageError, match="route must be one of"):
        RestoreOptions(route=route)
    assert state(target) == state(made(2))
