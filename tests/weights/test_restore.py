"""A snapshot that does not fit is refused by name, before the first byte of the model changes."""

import os
import time

import pytest
import torch
from tests.weights.modules import state
from tests.weights.test_layout import UNSTORABLE

from thaw_vllm import freeze_model, restore_model, restore_model_from_ram
from thaw_vllm.errors import (
    CorruptionError,
    MismatchError,
    ReplacedError,
    StorageError,
    ThawError,
    UnsupportedError,
    UsageError,
)
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.restore import restore

pytestmark = pytest.mark.usefixtures("no_leaks")


def module(**tensors):
    found = torch.nn.Module()
    for name, tensor in tensors.items():
        found._buffers[name] = tensor
    return found


def base():
    """What is frozen: a matrix, its tie, a repeated row and a vector."""
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    return {
        "first": torch.ones(5),
        "weight": weight,
        "tied": weight,
        "rope": torch.arange(4.0).expand(3, 4),
        "last": torch.full((5,), 2.0),
    }


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "w.thaw"
    freeze_model(module(**base()), found)
    return found


def other(**changes):
    """A target of the same form, all zeros, with changes; None leaves a name out."""
    weight = torch.zeros(3, 4)
    tensors = {
        "first": torch.zeros(5),
        "weight": weight,
        "tied": weight,
        "rope": torch.zeros(4).expand(3, 4),
        "last": torch.zeros(5),
    }
    return {name: t for name, t in (tensors | changes).items() if t is not None}


def refused(path, target, error, words, unstorable=()):
    before = {name: tensor.clone() for name, tensor in target.items() if name not in unstorable}
    with pytest.raises(error, match=words) as raised:
        restore_model(module(**target), path)
    assert str(path) in str(raised.value) or error is UnsupportedError
    assert all(torch.equal(target[name], tensor) for name, tensor in before.items())


def test_target_of_the_same_form_is_filled(path):
    target = module(**other())
    restore_model(target, path)
    assert state(target) == state(module(**base()))


REFUSALS = {
    "missing": ({"extra": torch.zeros(2)}, "lacks 'extra'; thaw it into the model it was frozen from"),
    "extra": ({"first": None}, "holds 'first', which the model does not have"),
    "missing and extra": ({"last": None, "z": torch.zeros(2)}, "lacks 'z' and holds 'last', which the model"),
    "missing many": ({f"m{i}": torch.zeros(1) for i in range(9)}, "lacks 'm0', 'm1', .* and 4 more"),
    "renamed": ({"last": None, "Last": torch.zeros(5)}, "lacks 'Last' and holds 'last'"),
    "shape": ({"last": torch.zeros(6)}, r"holds 'last' as float32 \[5\], the model has it as float32 \[6\]"),
    "shape of the same size": ({"last": torch.zeros(5, 1)}, r"float32 \[5, 1\]"),
    "turned shape": (dict.fromkeys(("weight", "tied"), torch.zeros(4, 3)), r"float32 \[3, 4\], the model .* \[4, 3\]"),
    "scalar": ({"last": torch.zeros(())}, r"float32 \[\]"),
    "dtype": ({"last": torch.zeros(5, dtype=torch.float64)}, r"the model has it as float64 \[5\]"),
    "dtype of the same size": ({"last": torch.zeros(5, dtype=torch.int32)}, r"the model has it as int32 \[5\]"),
    "untied": ({"tied": torch.zeros(3, 4)}, r"ties 'tied' to 'weight' in one storage, the model holds them apart; tie"),
    "dense for repeated": (
        {"rope": torch.zeros(3, 4)},
        r"strides \[0, 1\], the model has it with \[4, 1\]: one of",
    ),
    "repeated for dense": ({"last": torch.zeros(1).expand(5)}, r"strides \[1\], the model has it with \[0\]: one of"),
    "other repeated": ({"rope": torch.zeros(3, 1).expand(3, 4)}, r"strides \[0, 1\], the model has it with \[1, 0\]"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_another_model_is_refused_before_a_byte_is_copied(kind, path):
    changes, words = REFUSALS[kind]
    refused(path, other(**changes), MismatchError, words)


@pytest.mark.parametrize("kind", ["same", "part", "gaps", "inside"])
def test_model_that_ties_more_is_refused(kind, path):
    """What the file holds apart would be written over one another."""
    shared = torch.zeros(10)
    pairs = {
        "same": (shared[:5], shared[:5]),
        "part": (shared[:5], shared[4:9]),
        "gaps": (shared[::2], shared[1::2]),
        "inside": (shared[:5], shared[1:2].expand(5)),
    }
    first, last = pairs[kind]
    words = "the model ties '(first|last)' to '(first|last)'" if kind != "inside" else "one of them repeats"
    refused(path, other(first=first, last=last), MismatchError, words)


def test_model_whose_tie_has_other_strides_is_refused(path):
    """A view of the same memory that is not the same view."""
    square = torch.zeros(16).as_strided((3, 4), (4, 1))
    refused(
        path, other(weight=square, tied=square.as_strided((3, 4), (1, 4))), MismatchError, "ties 'tied' to 'weight'"
    )
    refused(path, other(weight=square, tied=square.as_strided((3, 4), (4, 1), 4)), MismatchError, "ties 'tied'")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "sparse", "quantised", "subclass", "lazy", "freed", "conjugate"])
def test_target_without_memory_of_its_own_is_refused(kind, path):
    make, words = UNSTORABLE[kind]
    refused(path, other(last=make()), UnsupportedError, words, unstorable=("last",))


def test_engines_stages_are_refused(tmp_path):
    path = tmp_path / "w.thaw"
    for stage in ("raw", "processed"):
        header = Header(Identity(stage, engine="vllm"))
        write_snapshot(path, header, capture([("w", "parameter", torch.ones(3))]), FreezeOptions(force=True))
        refused(path, {"w": torch.zeros(3)}, MismatchError, f"holds the '{stage}' stage of vllm; only that engine")


def test_views_with_their_own_offsets_and_dtypes_must_lie_alike(tmp_path):
    path = tmp_path / "w.thaw"
    flat = torch.arange(16, dtype=torch.float32)
    freeze_model(module(flat=flat, tail=flat[4:], bits=flat.view(torch.int32)[2:4]), path)

    def target(at=4, base=None, bits_at=2):
        base = torch.zeros(20) if base is None else base
        return {"flat": base[:16], "tail": base[at : at + 12], "bits": base.view(torch.int32)[bits_at : bits_at + 2]}

    restored = target()
    restore_model(module(**restored), path)
    assert state(module(**restored)) == state(module(flat=flat, tail=flat[4:], bits=flat.view(torch.int32)[2:4]))
    for wrong in (target(at=3), target(bits_at=3), target() | {"tail": torch.zeros(12)}):
        refused(path, wrong, MismatchError, "in one storage, the model holds them apart")


def test_snapshot_opened_without_its_chunks_is_not_taken_for_an_empty_one(path):
    with open_snapshot(path, with_chunks=False) as opened, pytest.raises(UsageError, match="without its chunk table"):
        restore(opened.source, opened.snapshot, other(), (), RestoreOptions())


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -1}])
def test_options_are_checked(options, path):
    with pytest.raises(UsageError, match="workers must be at least 1"):
        restore_model(module(**other()), path, **options)
    with pytest.raises(UsageError, match="workers must be at least 1"):
        freeze_model(module(**other()), path, **options)
    with pytest.raises(TypeError, match="fast"):
        restore_model(module(**other()), path, fast=True)


@pytest.mark.parametrize("size", [0, -1, 1, 4 << 20 | 1, 68 << 20, 5 << 20])
def test_chunk_size_is_checked(size, tmp_path):
    with pytest.raises(UsageError, match="chunk_size must be a multiple of 4194304 up to 67108864"):
        freeze_model(module(**other()), tmp_path / "w.thaw", chunk_size=size)
    assert not list(tmp_path.iterdir())


def test_memory_is_the_callers_again(path):
    data = bytearray(path.read_bytes())
    restore_model_from_ram(module(**other()), data)
    data.append(0)
    with pytest.raises(CorruptionError, match="'snapshot in memory': too long"):
        restore_model_from_ram(module(**other()), data)
    data.append(0)


def test_path_is_taken_where_memory_is(path):
    target = module(**other())
    restore_model_from_ram(target, path)
    restore_model_from_ram(target, str(path))
    assert state(target) == state(module(**base()))


# --- damage and change on the way -------------------------------------------------------------------------------------


def payload_of(path):
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
        return [(snapshot.preamble.payload_at + c.stored_at, c.length) for c in snapshot.chunks]


def test_damage_is_named_with_tensor_and_place(path):
    at, length = payload_of(path)[1]
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    words = rf"'{path}' is damaged: the checksum of 'weight' \(bytes {at} to {at + length}\) does not agree; copy the"
    with pytest.raises(CorruptionError, match=words):
        restore_model(module(**other()), path)
    target = module(**other())
    assert restore_model(target, path, verify=False).verified == "none"
    assert state(target) != state(module(**base()))


def test_damage_never_reaches_memory_that_is_filled_by_elements(path):
    """Where bytes cannot be read in place, they are checked before they are copied."""
    at, _ = payload_of(path)[1]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    weight = torch.zeros(4, 3).t()
    with pytest.raises(CorruptionError):
        restore_model(module(**other(weight=weight, tied=weight)), path)
    assert not weight.any()


class Changing:
    """A source that does something to its file before the nth read of the payload."""

    def __init__(self, source, number, change):
        self.__dict__.update(source=source, number=number, change=change, reads=0)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read_into(self, offset, view):
        if self.reads == self.number:
            self.change()
        self.__dict__["reads"] += 1
        self.source.read_into(offset, view)


def restored_while(path, number, change):
    target = module(**other())
    with open_snapshot(path) as opened:
        source = Changing(opened.source, number, change)
        targets = dict(target.named_buffers(remove_duplicate=False))
        report = restore(source, opened.snapshot, targets, set(targets), RestoreOptions(workers=1))
    return target, opened.source, report


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["renamed over", "removed", "frozen again"])
def test_replaced_while_it_is_read(kind, number, path, tmp_path):
    """The earlier one is read to its end, whole."""

    def change():
        if kind == "removed":
            path.unlink()
        elif kind == "frozen again":
            freeze_model(module(**other()), path, force=True)
        else:
            (tmp_path / "other").write_bytes(b"x" * path.stat().st_size)
            os.replace(tmp_path / "other", path)

    target, _, _ = restored_while(path, number, change)
    assert state(target) == state(module(**base()))


def test_replacement_is_reported(path):
    with open_snapshot(path) as opened:
        freeze_model(module(**other()), path, force=True)
        target = other()
        report = restore(opened.source, opened.snapshot, target, set(target), RestoreOptions())
    assert report.replaced
    assert state(module(**target)) == state(module(**base()))
    assert not restore_model(module(**target), path).replaced


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("how", ["byte", "same bytes", "whole", "cut", "grown"])
def test_written_to_while_it_is_read(how, number, path):
    """In place, against all advice: an error, whatever was written when."""
    data = path.read_bytes()
    places = payload_of(path)

    def change():
        time.sleep(0.02)  # more than the file system's clock tick
        with path.open("r+b") as file:
            if how == "byte":
                file.seek(places[3][0])
                file.write(b"\xff")
            elif how == "same bytes":
                file.write(data)
            elif how == "whole":
                file.write(os.urandom(len(data)))
            else:
                file.truncate(places[2][0] + 1 if how == "cut" else len(data) + 1)

    with pytest.raises((ReplacedError, CorruptionError)):
        restored_while(path, number, change)


def test_file_that_only_may_be_read(path):
    path.chmod(0o400)
    target = module(**other())
    restore_model(target, path)
    assert state(target) == state(module(**base()))


@pytest.mark.parametrize("where", ["absent.thaw", ".", "w.thaw/x"])
def test_path_that_is_no_file(where, path):
    with pytest.raises(StorageError, match=r"does not exist|is not a file|cannot open"):
        restore_model(module(**other()), path.parent / where)


def test_any_other_file_is_refused_as_what_it_is(tmp_path):
    for number, data in enumerate((b"", b"PK\3\4" + bytes(1000), b"\x89THAW\r\n\x1a", b"{}", bytes(5000))):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data)
        with pytest.raises(ThawError) as raised:
            restore_model(module(**other()), path)
        assert str(raised.value).startswith(f"'{path}': ")


def test_default_device_of_the_caller_does_not_matter(tmp_path):
    frozen, thawed = torch.nn.Module(), torch.nn.Module()
    frozen.register_buffer("b", torch.arange(16.0).view(4, 4))
    thawed.register_buffer("b", torch.zeros(4, 4).t())
    freeze_model(frozen, tmp_path / "m.thaw")
    with torch.device("meta"):
        restore_model(thawed, tmp_path / "m.thaw", workers=1)
    assert torch.equal(thawed.b, frozen.b)
