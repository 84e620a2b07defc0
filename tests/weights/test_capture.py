import pytest
import torch
from tests.weights.modules import bits
from tests.weights.test_layout import UNSTORABLE

from thaw_vllm import freeze_model, restore_model
from thaw_vllm.errors import FormatError, UnsupportedError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.format.limits import MAX_FILE
from thaw_vllm.weights.capture import capture, module_tensors, persistent_buffers
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.read_storage import filled
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore

pytestmark = pytest.mark.usefixtures("no_leaks")


def captured(**tensors):
    return capture([(name, "tensor", tensor) for name, tensor in tensors.items()])


def thawed(tmp_path, **tensors):
    """Freeze tensors, thaw them into zeroed memory of the same sharing, and return what came back."""
    path = tmp_path / "w.thaw"
    bases = {}
    targets = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        base = bases.setdefault(storage.data_ptr(), torch.zeros(storage.nbytes(), dtype=torch.uint8).untyped_storage())
        view = torch.empty(0, dtype=tensor.dtype)
        targets[name] = view.set_(base, tensor.storage_offset(), tensor.shape, tensor.stride())
    write_snapshot(path, Header(Identity("checkpoint")), captured(**tensors), FreezeOptions(force=True))
    with open_snapshot(path) as opened:
        restore(opened.source, opened.snapshot, targets, set(targets), RestoreOptions())
    return targets


SHARED = torch.arange(24, dtype=torch.float32)
APART = {
    "overlap in part": (SHARED[:15], SHARED[10:]),
    "overlap in part, of two": (SHARED[:16].view(4, 4), SHARED[8:].view(4, 4)),
    "two inside nothing": (SHARED[0:10], SHARED[9:20]),
    "columns of one matrix": (SHARED.view(4, 6)[:, :3], SHARED.view(4, 6)[:, 3:]),
    "columns that touch": (SHARED.view(4, 6)[:, :4], SHARED.view(4, 6)[:, 3:]),
    "even and odd": (SHARED[::2], SHARED[1::2]),
    "same place, other gaps": (SHARED[::2], SHARED[::3]),
    "gaps inside gaps": (SHARED[::2], SHARED[::4]),
    "same bytes, other dtype, with gaps": (SHARED[::2], SHARED.view(torch.int32)[::2]),
}


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("turned", [False, True])
def test_tensors_that_share_in_part_are_refused(kind, turned, tmp_path):
    first, second = APART[kind][:: -1 if turned else 1]
    with pytest.raises(UnsupportedError, match=r"^'first', 'second' share memory .* clone\(\) them apart first"):
        captured(first=first, second=second)
    module = torch.nn.Module()
    module.register_buffer("first", first)
    module.register_buffer("second", second)
    with pytest.raises(UnsupportedError):
        freeze_model(module, tmp_path / "w.thaw")
    assert not list(tmp_path.iterdir())


TOGETHER = {
    "the same": (SHARED, SHARED),
    "the same gaps": (SHARED[::2], SHARED[::2]),
    "the same repeated": (SHARED[:3].expand(4, 3), SHARED[:3].expand(4, 3)),
    "transposed": (SHARED.view(4, 6), SHARED.view(4, 6).t()),
    "other shape": (SHARED, SHARED.view(2, 3, 4)),
    "other dtype": (SHARED, SHARED.view(torch.int16)),
    "complex and its parts": (SHARED.view(torch.complex64), SHARED[1::2]),
    "a head": (SHARED, SHARED[:5]),
    "a tail": (SHARED, SHARED[5:]),
    "a column": (SHARED.view(4, 6), SHARED.view(4, 6)[:, 2]),
    "a transposed owner and its row": (SHARED.view(4, 6).t(), SHARED.view(4, 6)[1]),
    "repeated inside": (SHARED, SHARED[3:4].expand(7)),
    "windows": (SHARED, SHARED.unfold(0, 4, 1)),
    "a scalar": (SHARED, SHARED[23]),
}


@pytest.mark.parametrize("kind", TOGETHER)
@pytest.mark.parametrize("turned", [False, True])
def test_tensors_inside_one_another_are_one_storage(kind, turned, tmp_path):
    first, second = TOGETHER[kind][:: -1 if turned else 1]
    found = captured(first=first, second=second)
    assert len(found.index.storages) == 1
    assert [found.tensors[i] is t for i, t in enumerate((first, second))] in ([True, True], [False, False])
    back = thawed(tmp_path, first=first, second=second)
    assert (bits(back["first"]), bits(back["second"])) == (bits(first), bits(second))


def test_neighbours_are_apart(tmp_path):
    tensors = {"a": SHARED[:5], "b": SHARED[5:6], "c": SHARED[6:24]}
    assert captured(**tensors).index.storages == (20, 4, 72)
    back = thawed(tmp_path, **tensors)
    assert {name: bits(t) for name, t in back.items()} == {name: bits(t) for name, t in tensors.items()}


def test_a_small_view_does_not_drag_its_storage_along():
    assert captured(small=torch.zeros(1_000_000)[10:20]).index.storages == (40,)


def test_repeated_elements_are_stored_once():
    found = captured(rope=torch.randn(1, 5).expand(1000, 5))
    assert found.index.storages == (20,)
    assert found.index.tensors[0].stride == (0, 1)


def test_gaps_are_not_stored():
    found = captured(t=torch.randn(4, 10)[:, ::3])
    assert found.index.storages == (64,)
    assert found.index.tensors[0].stride == (4, 1)


def test_tensors_without_elements_share_nothing():
    empty = torch.empty(0)
    found = captured(a=empty, b=empty, c=empty.view(0, 3), d=torch.empty(0).expand(5, 0))
    assert found.index.storages == ()
    assert found.index.ties == {}


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[31m", "w" * 1025, "é" * 513, "\ud800"])
def test_name_that_no_reader_would_take_is_refused_before_anything_is_written(name, tmp_path):
    module = torch.nn.Module()
    module._parameters[name] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match=r"a snapshot cannot hold this: .*name must"):
        freeze_model(module, tmp_path / "w.thaw")
    assert not list(tmp_path.iterdir())


def test_view_that_no_reader_would_take_is_refused(tmp_path):
    """Its address is a multiple of its element size, its offset in the owner is not."""
    data = torch.zeros(40, dtype=torch.uint8)
    module = torch.nn.Module()
    module.register_buffer("owner", data[2:])
    module.register_buffer("view", data[4:12].view(torch.float32))
    with pytest.raises(UnsupportedError, match="'view': offset 2 is not a multiple of its element size"):
        freeze_model(module, tmp_path / "w.thaw")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_header_that_no_reader_would_take_is_refused(value, tmp_path):
    header = Header(Identity("module"), attributes={"a|b": value})
    with pytest.raises(UnsupportedError, match="cannot be stored as JSON"):
        write_snapshot(tmp_path / "w.thaw", header, captured(a=SHARED), FreezeOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("identity", [{"stage": "melted"}, {"config": "x"}, {"model": "md5:0"}, {"engine": "a\nb"}])
def test_identity_that_no_reader_would_take_is_refused(identity, tmp_path):
    header = Header(Identity(**({"stage": "module"} | identity)))
    with pytest.raises(UnsupportedError, match="a snapshot cannot hold this"):
        write_snapshot(tmp_path / "w.thaw", header, captured(a=SHARED), FreezeOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("attributes", [{"__class__|a": 1}, {"a": 1}, {"a|b": [1]}])
def test_header_is_read_back_before_it_is_published(attributes, tmp_path):
    header = Header(Identity("module"), attributes=attributes)
    with pytest.raises(FormatError, match="attributes"):
        write_snapshot(tmp_path / "w.thaw", header, captured(), FreezeOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNSTORABLE)
def test_unstorable_tensors_are_refused_before_anything_is_written(kind, tmp_path):
    module = torch.nn.Module()
    module.register_buffer("good", torch.zeros(3))
    module._buffers["bad"] = UNSTORABLE[kind][0]()
    with pytest.raises(UnsupportedError, match=r"^'bad' "):
        freeze_model(module, tmp_path / "w.thaw")
    assert not list(tmp_path.iterdir())


def test_carried_files(tmp_path):
    files = [("config.json", b'{"a": 1}'), ("vocab.txt", b""), ("tokenizer.json", bytes(5_000_000))]
    found = capture([("w", "tensor", SHARED)], files)
    write_snapshot(tmp_path / "w.thaw", Header(Identity("checkpoint")), found, FreezeOptions(chunk_size=4 << 20))
    with open_snapshot(tmp_path / "w.thaw") as opened:
        entries = opened.snapshot.index.files
        assert [f.name for f in entries] == [name for name, _ in files]
        for entry, (_, data) in zip(entries, files, strict=True):
            assert (b"" if entry.storage is None else filled(opened.snapshot, opened.source, entry.storage)) == data
        target = torch.zeros(24)
        report = restore(opened.source, opened.snapshot, {"w": target}, {"w"}, RestoreOptions())
    assert report.bytes == 96
    assert bits(target) == bits(SHARED)


@pytest.mark.parametrize(
    ("name", "data"), [("../x.json", b"x"), ("model.py", b"x"), ("x.json", bytes(MAX_FILE + 1)), ("", b"x")]
)
def test_file_that_no_reader_would_take_is_refused(name, data, tmp_path):
    with pytest.raises(UnsupportedError, match="carried"):
        write_snapshot(tmp_path / "w.thaw", Header(Identity("module")), capture([], [(name, data)]), FreezeOptions())
    assert not list(tmp_path.iterdir())


def test_buffers_that_persist():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Module())
    module[1].register_buffer("cache", torch.zeros(1), persistent=False)
    module[1].register_buffer("none", None)
    assert persistent_buffers(module) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    names = [name for name, _, _ in module_tensors(module)]
    assert set(names) == set(module.state_dict())
    assert set(n for n, _, _ in module_tensors(module, also={"1.cache"})) == set(names) | {"1.cache"}


def test_restores_into_a_model_that_gained_a_cache(tmp_path):
    """Buffers that are not persistent belong to the module, whatever the snapshot was made of."""
    module = torch.nn.BatchNorm1d(3)
    freeze_model(module, tmp_path / "w.thaw")
    module.register_buffer("cache", torch.ones(1), persistent=False)
    restore_model(module, tmp_path / "w.thaw")
    assert module.cache == 1
