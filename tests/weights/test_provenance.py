"""The model id, what is remembered of it, and telling one fine-tune from another."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.weights.modules import Plans, plans

from thaw_vllm import freeze_model
from thaw_vllm.errors import MismatchError, ReplacedError
from thaw_vllm.format.limits import MIB
from thaw_vllm.weights import provenance
from thaw_vllm.weights.checkpoint import SAFETENSORS_DTYPES, open_checkpoint
from thaw_vllm.weights.provenance import cache_directory, cached_id, check_source, checkpoint_id, source_record

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache directory, for this test alone."""
    found = tmp_path_factory.mktemp("cache")
    monkeypatch.delenv("THAW_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(found))
    return found / "thaw"


@pytest.fixture
def model(tmp_path):
    """A checkpoint of two files."""
    found = tmp_path / "model"
    found.mkdir()
    generator = torch.Generator().manual_seed(1)
    save_file({"a": torch.randn(100, 200, generator=generator), "n": torch.empty(0)}, found / "m-1.safetensors")
    save_file({"b": torch.randn(3000, generator=generator), "c": torch.tensor(1.0)}, found / "m-2.safetensors")
    return found


def identify(directory, **options):
    return checkpoint_id(open_checkpoint(directory), **options)


def rewrite(path, at, data):
    """Change bytes in place, as an editor of files would."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


# --- the id -----------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans(ties=False), st.integers(1, 3), st.randoms(use_true_random=False))
def test_module_and_its_checkpoint_have_one_id(tmp_path_factory, plan, shards, rng):
    """Whatever the tensors' layout in memory, their order, and the files they are cut into."""
    plan = Plans(
        tuple(p for p in plan.tensors if p.dtype in SAFETENSORS_DTYPES.values() and p.dtype != "float8_e8m0fnu")
    )
    module, directory = plan.build(1), tmp_path_factory.mktemp("model")
    state = [(name, tensor.contiguous()) for name, tensor in module.state_dict().items()]
    rng.shuffle(state)
    for number in range(shards):
        save_file(dict(state[number::shards]), directory / f"m-{number}.safetensors")
    if state:
        assert freeze_model(module, directory / "w.thaw").model == identify(directory, cache=False)


def test_module_of_large_tensors(tmp_path):
    """Several blocks of 4 MiB, hashed in any order."""
    module = torch.nn.Module()
    module.register_buffer("a", torch.randint(0, 255, (9 * MIB + 5,), dtype=torch.uint8))
    module.register_buffer("b", torch.randn(1100, 2100).t())
    (tmp_path / "model").mkdir()
    save_file({name: t.contiguous() for name, t in module.state_dict().items()}, tmp_path / "model" / "m.safetensors")
    expected = freeze_model(module, tmp_path / "w.thaw").model
    seen, lock = [], threading.Lock()

    def progress(done, total):
        with lock:
            seen.append((done, total))

    assert identify(tmp_path / "model", cache=False, progress=progress) == expected
    total = sum(t.numel() * t.element_size() for t in module.buffers())
    assert max(seen) == (total, total)


def test_known_id(tmp_path):
    """docs/format.md, section 14: it never changes."""
    tensors = {"b": torch.ones(1, dtype=torch.bfloat16), "a.weight": torch.arange(4.0).view(2, 2)}
    save_file(tensors, tmp_path / "m.safetensors")
    expected = "tensors-blake3:3ec09cb34349c29ca858a9e916d2fd92663121678633b6dc968c32613c63f8b1"
    assert identify(tmp_path, cache=False) == expected


@pytest.mark.parametrize("what", ["name", "dtype", "shape", "bit", "one more", "one less"])
def test_any_difference_is_another_id(what, tmp_path):
    def write(tensors):
        save_file(tensors, tmp_path / "m.safetensors")
        return identify(tmp_path, cache=False)

    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    changed = {
        "name": {"A": tensors["a"], "b": tensors["b"]},
        "dtype": tensors | {"b": torch.zeros(2, dtype=torch.int32)},
        "shape": tensors | {"a": torch.arange(4.0).view(2, 2)},
        "bit": tensors | {"b": torch.tensor([0.0, -0.0])},
        "one more": tensors | {"c": torch.empty(0)},
        "one less": {"a": tensors["a"]},
    }
    assert write(tensors) != write(changed[what])
    assert write(tensors) == write(dict(reversed(tensors.items())))


def test_metadata_does_not_count(tmp_path):
    ids = set()
    for metadata in (None, {"format": "pt"}, {"x": "y" * 1000}):
        save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors", metadata=metadata)
        ids.add(identify(tmp_path, cache=False))
    assert len(ids) == 1


def test_other_formats_are_identified_by_their_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 10)
    first = identify(tmp_path, cache=False)
    (tmp_path / "b.bin").write_bytes(b"y" * (5 * MIB))
    second = identify(tmp_path, cache=False)
    rewrite(tmp_path / "b.bin", 4 * MIB + 1, b"z")
    ids = {first, second, identify(tmp_path, cache=False)}
    assert len(ids) == 3
    assert all(found.startswith("files-blake3:") for found in ids)


def test_file_that_changes_while_it_is_hashed(model, monkeypatch):
    real = provenance.read_bytes

    def slow(source, offset, length):
        time.sleep(0.02)
        rewrite(model / "m-2.safetensors", 4000, b"changed")
        return real(source, offset, length)

    monkeypatch.setattr(provenance, "read_bytes", slow)
    with pytest.raises(ReplacedError, match=r"m-2.safetensors"):
        identify(model)
    monkeypatch.undo()
    assert cached_id(open_checkpoint(model)) is None


def test_file_that_is_replaced_before_it_is_hashed(model):
    """Read by the offsets of the old header, the new file would be remembered under a wrong id."""
    opened = open_checkpoint(model)
    b, c = torch.randn(3000), torch.tensor(2.0)
    save_file({"x": b, "y": c}, model / "new")
    os.replace(model / "new", model / "m-2.safetensors")
    for read in (checkpoint_id, source_record):
        with pytest.raises(ReplacedError, match=r"m-2.safetensors' was replaced"):
            read(opened)
    assert cached_id(open_checkpoint(model)) is None


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def never_read(monkeypatch):
    """Makes reading the weights an error."""

    def forbid():
        monkeypatch.setattr(provenance, "_span_digests", lambda *_: pytest.fail("the weights were read"))

    return forbid


def test_weights_are_read_once(model, cache, never_read):
    first = identify(model)
    assert cached_id(open_checkpoint(model)) == first
    assert cache_directory() == cache
    (entry,) = (cache / "ids").iterdir()
    assert json.loads(entry.read_text())["id"] == first
    assert (cache / "ids").stat().st_mode & 0o077 == 0
    never_read()
    assert identify(model) == first
    assert identify(model / ".." / model.name) == first


def test_nothing_is_remembered_unasked(model, cache, never_read):
    first = identify(model, cache=False)
    assert not cache.exists()
    assert identify(model) == first
    assert cached_id(open_checkpoint(model)) == first


def restored_times(path, change):
    """``change()`` with the file's own times put back after it, as copying tools do."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "what", ["bytes", "bytes, times put back", "another file", "size", "added", "removed", "renamed"]
)
def test_what_changed_is_read_again(what, model):
    first = identify(model)
    path = model / "m-2.safetensors"
    data = path.read_bytes()
    time.sleep(0.02)
    if what == "bytes":
        rewrite(path, len(data) - 20, b"x")
    elif what == "bytes, times put back":
        restored_times(path, lambda: rewrite(path, len(data) - 20, b"x"))
    elif what == "another file":
        other = model / "other"
        other.write_bytes(data[:-20] + b"x" + data[-19:])
        restored_times(path, lambda: os.replace(other, path))
    elif what == "size":
        save_file({"b": torch.ones(7)}, path)
    elif what == "added":
        save_file({"z": torch.ones(7)}, model / "m-3.safetensors")
    elif what == "removed":
        path.unlink()
    else:
        save_file({"B": torch.ones(7)}, path)
    assert cached_id(open_checkpoint(model)) is None
    second = identify(model)
    assert second != first
    assert cached_id(open_checkpoint(model)) == second


def test_what_was_only_touched_keeps_its_id(model):
    first = identify(model)
    (model / "m-1.safetensors").touch()
    assert cached_id(open_checkpoint(model)) is None
    assert identify(model) == first


DIGEST = "tensors-blake3:" + "0" * 64


@pytest.mark.parametrize(
    "forge",
    [
        lambda entry: b"",
        lambda entry: b"{",
        lambda entry: b"[]",
        lambda entry: b"null",
        lambda entry: b"\xff",
        lambda entry: b"[" * 100_000,
        lambda entry: {"id": entry["id"]},
        lambda entry: entry | {"files": None},
        lambda entry: entry | {"files": [], "id": DIGEST},
        lambda entry: entry | {"files": entry["files"][:1], "id": DIGEST},
        lambda entry: entry | {"files": [[*file[:-1], 0] for file in entry["files"]], "id": DIGEST},
        lambda entry: entry | {"id": 7},
        lambda entry: entry | {"id": "x"},
        lambda entry: entry | {"id": "tensors-blake3:" + "g" * 64},
        lambda entry: entry | {"id": None},
    ],
)
def test_remembered_nonsense_is_not_believed(forge, model, cache):
    first = identify(model)
    (entry,) = (cache / "ids").iterdir()
    forged = forge(json.loads(entry.read_text()))
    entry.write_bytes(forged if isinstance(forged, bytes) else json.dumps(forged).encode())
    assert cached_id(open_checkpoint(model)) is None
    assert identify(model) == first
    assert cached_id(open_checkpoint(model)) == first


@pytest.mark.parametrize("place", ["/proc/thaw", "file"])
def test_cache_that_cannot_be_written_costs_speed_alone(place, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert identify(model) == identify(model)


# --- telling checkpoints apart ----------------------------------------------------------------------------------------


def check(record, directory, model=None):
    check_source(record, model, directory, "w.thaw")


@pytest.mark.parametrize("remembered", [True, False])
def test_same_checkpoint_passes(model, remembered, tmp_path):
    record, found = source_record(open_checkpoint(model)), identify(model, cache=remembered)
    check(record, model, found)
    check(record, model)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    check(record, copy, found)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize("what", ["header", "size", "a tensor", "one value", "more", "fewer", "another name", "order"])
def test_another_checkpoint_is_refused(what, model, remembered):
    """The same shapes, as fine-tunes have; with the id remembered it is compared, else what the record samples."""
    record, found = source_record(open_checkpoint(model)), identify(model, cache=False)
    path = model / "m-2.safetensors"
    (b,) = [t for t in open_checkpoint(model).tensors if t.name == "b"]
    if what == "header":
        save_file({"B": torch.randn(3000), "c": torch.tensor(1.0)}, path)
    elif what == "size":
        save_file({"b": torch.randn(3001), "c": torch.tensor(1.0)}, path)
    elif what == "a tensor":
        rewrite(path, b.begin, os.urandom(b.end - b.begin))
    elif what == "one value":
        rewrite(path, (b.begin + b.end) // 2, b"\1\2\3\4")
    elif what == "more":
        save_file({"z": torch.zeros(1)}, model / "m-3.safetensors")
    elif what == "fewer":
        path.unlink()
    elif what == "another name":
        path.rename(model / "m-3.safetensors")
    else:
        first = model / "m-1.safetensors"
        first.rename(model / "x")
        path.rename(first)
        (model / "x").rename(path)
    if remembered:
        identify(model)
    if remembered and what in ("another name", "order"):
        check(record, model, found)  # the same tensors in other files are the same model
        return
    with pytest.raises(MismatchError, match=r"'w.thaw' was frozen from|was frozen from other weights") as raised:
        check(record, model, found)
    assert str(model) in str(raised.value)


def test_one_bit_anywhere_is_told_by_the_remembered_id(model):
    """Samples see 4 KiB of each tensor; the id, once somebody ran ``thaw id``, sees everything."""
    record, found = source_record(open_checkpoint(model)), identify(model, cache=False)
    (a,) = [t for t in open_checkpoint(model).tensors if t.name == "a"]
    rewrite(model / "m-1.safetensors", a.begin, b"\1")
    check(record, model, found)
    identify(model)
    with pytest.raises(MismatchError, match="was frozen from other weights"):
        check(record, model, found)


def test_remembered_id_is_not_compared_across_schemes(model):
    identify(model)
    check(source_record(open_checkpoint(model)), model, "files-blake3:" + "0" * 64)


def test_weights_that_are_gone_are_not_needed(model, tmp_path):
    record, found = source_record(open_checkpoint(model)), identify(model)
    for path in model.iterdir():
        path.unlink()
    (model / "config.json").write_text("{}")
    check(record, model, found)
    check(record, tmp_path / "absent", found)


@pytest.mark.parametrize("record", [{}, {"files": None}, {"files": 7}, {"files": {"a": 1}}, {"revision": "x"}])
def test_snapshot_without_a_record_passes(record, model):
    check(record, model)


@pytest.mark.parametrize("files", [[], [None], [[]], ["x", "y"], [{}, {}], [{"name": "m-1.safetensors"}] * 2])
def test_hostile_record_is_a_mismatch(files, model):
    with pytest.raises(MismatchError):
        check({"files": files}, model)


def test_other_formats_are_sampled_throughout(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(os.urandom(3 * MIB))
    record = source_record(open_checkpoint(tmp_path))
    check(record, tmp_path)
    step = 3 * MIB // 256
    rewrite(path, 100 * step + step // 2, b"\0\0\0\0\0")
    with pytest.raises(MismatchError, match=r"'pytorch_model.bin' in"):
        check(record, tmp_path)


def test_hub_revision_is_recorded(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    directory = tmp_path / "snapshots" / commit
    directory.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, directory / "m.safetensors")
    assert source_record(open_checkpoint(directory))["revision"] == commit


def test_no_home_is_no_cache(tmp_path, monkeypatch):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    found = open_checkpoint(tmp_path)
    assert checkpoint_id(found) == checkpoint_id(found) and cached_id(found) is None


def test_checkpoint_that_changes_has_no_id(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ReplacedError):
        checkpoint_id(opened)
    assert cached_id(open_checkpoint(tmp_path)) is None
