"""Files of one number of ranks read by another: each element where it belongs, and no chunk read that is not needed."""

import contextlib
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thaw_vllm.errors import CorruptionError, MismatchError, UnsupportedError
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.weights import reshard
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.division import WHOLE, Division, Part, local_size, slices
from thaw_vllm.weights.freeze import FreezeOptions, write_snapshot
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.reading import RestoreOptions
from thaw_vllm.weights.reshard import Ranks, check, fill, plan

CHUNK = 4 << 20
SIZES = (1, 2, 4, 8)


def share(full, part, ranks, rank):
    """A rank's piece along dimension 0, as vLLM's layers cut it, without the code that is tested."""
    if part.units is None:
        return full.chunk(ranks)[rank]
    heads = full.view(part.units, -1, *full.shape[1:])
    heads = heads.chunk(ranks)[rank] if ranks <= part.units else heads.repeat_interleave(ranks // part.units, 0)[[rank]]
    return heads.reshape(-1, *full.shape[1:])


def cut(parts, division, ranks, rank):
    """A rank's tensor: of every part its piece."""
    if division.dim is None:
        return parts[0].clone()
    moved = [part.movedim(division.dim, 0) for part in parts]
    if division.padded is not None:
        padding = moved[0].new_zeros(division.padded - moved[0].shape[0], *moved[0].shape[1:])
        pieces = [torch.cat([moved[0], padding]).chunk(ranks)[rank]]
    else:
        pieces = [share(m, part, ranks, rank) for m, part in zip(moved, division.parts, strict=True)]
    return torch.cat(pieces).movedim(0, division.dim).contiguous()


@st.composite
def divided(draw):
    """A division that all of SIZES can be made of."""
    if draw(st.booleans()):
        rows = draw(st.integers(1, 200))
        return Division(0, (Part(rows),), -(-rows // 64) * 64)
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        units = draw(st.sampled_from([None, 1, 2, 4, 8, 16]))
        parts.append(Part((units or 8) * draw(st.integers(1, 5)), units))
    return Division(draw(st.integers(0, 2)), tuple(parts))


@pytest.mark.soak
@given(divided(), st.sampled_from(SIZES), st.sampled_from(SIZES))
def test_every_element_is_taken_from_where_it_is(division, old, new):
    shape = [3, 3, 3]
    whole = []
    for part in division.parts:
        shape[division.dim] = part.size
        first = sum(w.numel() for w in whole) + 1
        whole.append(torch.arange(first, first + torch.Size(shape).numel()).view(shape))
    files = [cut(whole, division, old, rank) for rank in range(old)]
    for rank in range(new):
        wanted = cut(whole, division, new, rank)
        taken, zeros = slices(division, old, new, rank)
        found = torch.full_like(wanted, -1)
        for piece in taken:
            into = found.narrow(division.dim, piece.at, piece.length)
            assert (into == -1).all()
            into.copy_(files[piece.rank].narrow(division.dim, piece.start, piece.length))
        found.narrow(division.dim, found.shape[division.dim] - zeros, zeros).zero_()
        assert torch.equal(found, wanted)
        assert wanted.shape[division.dim] == local_size(division, new, rank)


@pytest.mark.parametrize(
    ("division", "ranks"),
    [
        (Division(0, (Part(9),)), 2),
        (Division(0, (Part(12, 6),)), 4),
        (Division(0, (Part(12, 3),)), 2),
        (Division(0, (Part(8, 2),)), 3),
        (Division(0, (Part(60),), 64), 3),
    ],
)
def test_what_cannot_be_divided_so(division, ranks):
    with pytest.raises(UnsupportedError, match="cannot be divided among"):
        slices(division, 1, ranks, 0)
    with pytest.raises(UnsupportedError, match="cannot be divided among"):
        local_size(division, ranks, 0)


DIVISIONS = {
    "columns": Division(0, (Part(3200),)),
    "qkv": Division(0, (Part(1024), Part(512, 2), Part(512, 2))),
    "rows": Division(1, (Part(2048),)),
    "words": Division(0, (Part(1000),), 1024),
    "experts.up": Division(1, (Part(512), Part(512))),
    "experts.down": Division(2, (Part(512),)),
    "bias": Division(0, (Part(1024), Part(512, 2), Part(512, 2))),
    "norm": WHOLE,
    "scale": WHOLE,
}
SHAPES = {
    "columns": (3200, 1700),
    "qkv": (2048, 1100),
    "rows": (1500, 2048),
    "words": (1000, 700),
    "experts.up": (3, 1024, 200),
    "experts.down": (3, 200, 512),
    "bias": (2048,),
    "norm": (1500,),
    "scale": (),
}


@functools.cache
def parts(name):
    """The whole matrices of a parameter, seeded by its name."""
    division, shape = DIVISIONS[name], list(SHAPES[name])
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if division.dim is None:
        return [torch.randn(shape, generator=generator).to(torch.bfloat16)]
    found = []
    for part in division.parts:
        shape[division.dim] = part.size
        found.append(torch.randn(shape, generator=generator).to(torch.bfloat16))
    return found


def state(ranks, rank):
    """A rank's tensors; ``head`` is another name of ``words``."""
    tensors = {name: cut(parts(name), division, ranks, rank) for name, division in DIVISIONS.items()}
    return tensors | {"head": tensors["words"]}


def write(folder, ranks, changed=None, only=None, **options):
    """``changed`` by that function, all of them or ``only`` one rank's."""
    for rank in range(ranks):
        tensors = state(ranks, rank)
        tensors = changed(tensors) if changed and only in (None, rank) else tensors
        captured = capture([(name, "parameter", tensor) for name, tensor in tensors.items()])
        write_snapshot(
            folder / f"{ranks}.{rank}.thaw",
            Header(Identity("raw")),
            captured,
            FreezeOptions(chunk_size=CHUNK, force=True, **options),
        )


def empty(ranks, rank):
    """The same, filled with something else; ties kept."""
    tensors = {name: torch.full_like(tensor, 7) for name, tensor in state(ranks, rank).items() if name != "head"}
    return tensors | {"head": tensors["words"]}


@contextlib.contextmanager
def opened(folder, found):
    """All old ranks' files, by rank."""
    paths = [folder / f"{found.ranks.old}.{rank}.thaw" for rank in range(found.ranks.old)]
    with contextlib.ExitStack() as stack:
        yield {rank: stack.enter_context(open_snapshot(path)) for rank, path in enumerate(paths)}


def reshaped(folder, old, new, rank, **options):
    """A rank's tensors, thawed from files of ``old`` ranks, and the report."""
    found = plan(DIVISIONS | {"head": DIVISIONS["words"]}, Ranks(old, new, rank))
    targets = empty(new, rank)
    with opened(folder, found) as files:
        check(found, files, targets, set(targets))
        report = fill(found, {rank: files[rank] for rank in found.files}, targets, RestoreOptions(**options))
    return targets, report


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for ranks in (1, 2, 4):
        write(folder, ranks)
    return folder


@pytest.mark.parametrize("batch", [6 << 20, reshard.BATCH])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (1, 4), (4, 2), (2, 4), (4, 1), (2, 2)])
def test_every_tensor(files, old, new, batch, monkeypatch):
    monkeypatch.setattr(reshard, "BATCH", batch)
    for rank in range(new):
        targets, report = reshaped(files, old, new, rank)
        wanted = state(new, rank)
        assert [name for name in wanted if not torch.equal(targets[name], wanted[name])] == []
        assert report.tensors == len(wanted) and report.verified == "xxh3" and report.stored == report.bytes


def test_a_rank_of_nothing_but_padding(tmp_path):
    division = Division(0, (Part(60),), 128)
    captured = capture([("words", "parameter", torch.ones(128, 5))])
    write_snapshot(tmp_path / "1.0.thaw", Header(Identity("raw")), captured, FreezeOptions())
    found, targets = plan({"words": division}, Ranks(1, 2, 1)), {"words": torch.full((64, 5), 7.0)}
    with opened(tmp_path, found) as files:
        check(found, files, targets, set(targets))
        report = fill(found, {number: files[number] for number in found.files}, targets, RestoreOptions())
    assert not targets["words"].any() and (report.bytes, report.verified) == (0, "none")


def any_tensor(random):
    """A division, and the whole matrices of a tensor of some kilobytes to megabytes that all of SIZES can share."""
    large = random.random() < 0.2
    sides = [
        random.randint(1, 3),
        random.randint(1, 40) * (20 if large else 1),
        random.randint(1, 40) * (30 if large else 1),
    ]
    kind = random.choice(["whole", "words", "one", "several", "heads"])
    dim = random.randrange(3)
    if kind == "whole":
        division = WHOLE
    elif kind == "words":
        rows = random.randint(1, 400)
        division, dim = Division(0, (Part(rows),), -(-rows // 64) * 64), 0
    elif kind == "heads":
        units = [random.choice([1, 2, 4, 8]) for _ in range(2)]
        division = Division(dim, (Part(8 * random.randint(1, 9)), *(Part(n * random.randint(1, 9), n) for n in units)))
    else:
        division = Division(dim, tuple(Part(8 * random.randint(1, 9)) for _ in range(1 if kind == "one" else 3)))
    dtype = random.choice([torch.bfloat16, torch.float32, torch.uint8])
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    found = []
    for part in division.parts or (None,):
        shape = list(sides)
        if part is not None:
            shape[dim] = part.size
        found.append(torch.randint(0, 256, shape, generator=generator).to(dtype))
    return division, found


@pytest.mark.soak
def test_any_model(soak, memory_path, monkeypatch):
    """Of tensors divided in any way, by any number of ranks, for any other."""
    for case in soak(small=12, full=600):
        random = case.random
        monkeypatch.setattr(reshard, "BATCH", (1, 100_000, 6 << 20, 512 << 20)[case.number % 4])
        tensors = {f"t{number}": any_tensor(random) for number in range(random.randint(1, 12))}
        old, new = random.choice(SIZES), random.choice(SIZES)
        for rank in range(old):
            captured = capture([(name, "parameter", cut(parts, d, old, rank)) for name, (d, parts) in tensors.items()])
            options = FreezeOptions(chunk_size=CHUNK, force=True, compress=random.random() < 0.3)
            write_snapshot(memory_path / f"{old}.{rank}.thaw", Header(Identity("raw")), captured, options)
        for rank in range(new):
            wanted = {name: cut(parts, division, new, rank) for name, (division, parts) in tensors.items()}
            targets = {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}
            found = plan({name: division for name, (division, _) in tensors.items()}, Ranks(old, new, rank))
            with opened(memory_path, found) as files:
                check(found, files, targets, set(targets))
                fill(found, {number: files[number] for number in found.files}, targets, RestoreOptions(workers=2))
            assert [name for name in wanted if not torch.equal(targets[name], wanted[name])] == [], case


def test_compressed(tmp_path):
    write(tmp_path, 2, compress=True)
    targets, report = reshaped(tmp_path, 2, 1, 0)
    wanted = state(1, 0)
    assert all(torch.equal(targets[name], wanted[name]) for name in wanted)
    assert report.stored < report.bytes


def test_only_what_is_needed_is_read(files):
    """Rows of one file lie together; columns do not, so whole chunks are read for them."""
    everything = sum(t.numel() * 2 for t in {id(t): t for t in state(1, 0).values()}.values())
    scattered = sum(torch.Size(SHAPES[name]).numel() * 2 for name in ("rows", "experts.down", "experts.up"))
    _, report = reshaped(files, 1, 4, 3)
    assert report.bytes < scattered + (everything - scattered) / 4 + 2 * 4 * CHUNK
    _, report = reshaped(files, 4, 1, 0)
    assert report.bytes >= everything and report.path.count(".thaw") == 4
    _, report = reshaped(files, 2, 4, 3)
    assert report.path.endswith("2.1.thaw") and report.path.count(".thaw") == 1


def test_progress_goes_to_the_end_once(files):
    said = []
    _, report = reshaped(files, 4, 1, 0, progress=lambda done, whole: said.append((done, whole)))
    assert {whole for _, whole in said} == {report.stored} and said[-1][0] == report.stored
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_a_damaged_chunk(files, tmp_path):
    for path in files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "2.1.thaw"
    data = bytearray(damaged.read_bytes())
    with open_snapshot(damaged) as one:
        chunk = one.snapshot.chunks[0]
        data[one.snapshot.preamble.payload_at + chunk.stored_at] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"2\.1\.thaw"):
        reshaped(tmp_path, 2, 1, 0)
    reshaped(tmp_path, 2, 1, 0, verify=False)
    reshaped(tmp_path, 2, 4, 0)  # which needs nothing of it


def one_less(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "norm"}


def one_more(tensors):
    return tensors | {"other": torch.zeros(3)}


def another_shape(tensors):
    return tensors | {"rows": tensors["rows"][:, 1:].contiguous()}


def another_dtype(tensors):
    return tensors | {"norm": tensors["norm"].float()}


def untied(tensors):
    return tensors | {"head": tensors["words"].clone()}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (one_less, "lacks 'norm'"),
        (one_more, "holds 'other', which the model does not have"),
        (another_shape, "holds 'rows' as bfloat16"),
        (another_dtype, "holds 'norm' as float32"),
        (untied, "ties tensors to each other"),
    ],
)
def test_another_model(tmp_path, changed, said):
    write(tmp_path, 2, changed)
    found = plan(DIVISIONS | {"head": DIVISIONS["words"], "other": WHOLE}, Ranks(2, 1, 0))
    targets = empty(1, 0)
    with opened(tmp_path, found) as files, pytest.raises(MismatchError, match=said):
        check(found, files, targets, set(targets))


@pytest.mark.parametrize("new", [1, 2, 4])
def test_ranks_that_hold_different_bytes_of_what_each_should_have_all(tmp_path, new):
    """Whichever file a new rank would have read: a model's own loading may have given each rank its part."""
    write(tmp_path, 2, lambda tensors: tensors | {"norm": tensors["norm"] + 1}, only=1)
    for rank in range(new):
        found = plan(DIVISIONS | {"head": DIVISIONS["words"]}, Ranks(2, new, rank))
        targets = empty(new, rank)
        with opened(tmp_path, found) as files, pytest.raises(MismatchError, match="hold different bytes as 'norm'"):
            check(found, files, targets, set(targets))


def test_a_name_that_the_plan_does_not_know(files):
    found = plan({name: division for name, division in DIVISIONS.items()}, Ranks(2, 1, 0))
    targets = empty(1, 0)
    with opened(files, found) as opened_files, pytest.raises(MismatchError, match="holds 'head', which the model does"):
        check(found, opened_files, targets, set(targets))


def test_little_is_on_its_way_at_a_time(files, monkeypatch):
    """Of a tensor that is divided by another dimension than the first as well."""
    monkeypatch.setattr(reshard, "BATCH", 1 << 20)
    divisions = DIVISIONS | {"head": DIVISIONS["words"]}
    found = plan(divisions, Ranks(1, 2, 0))
    with opened(files, found) as opened_files:
        windows = list(reshard._windows(found, 0, opened_files[0].snapshot, empty(2, 0)))
    assert len(windows) > len(DIVISIONS) and max(window.bytes for window in windows) <= 2 * CHUNK


def test_a_model_that_is_not_tied(files):
    found = plan(DIVISIONS | {"head": DIVISIONS["words"]}, Ranks(2, 1, 0))
    targets = empty(1, 0)
    targets["head"] = targets["head"].clone()
    with opened(files, found) as opened_files, pytest.raises(MismatchError, match="the model does not"):
        check(found, opened_files, targets, set(targets))


def test_a_model_of_another_size(files):
    found = plan(DIVISIONS | {"head": DIVISIONS["words"]}, Ranks(2, 1, 0))
    targets = empty(2, 0)
    with opened(files, found) as opened_files, pytest.raises(MismatchError, match=r"the model has '\w+' as"):
        check(found, opened_files, targets, set(targets))


def test_files_that_hold_different_names(files, tmp_path):
    for rank in range(2):
        (tmp_path / f"2.{rank}.thaw").write_bytes((files / f"2.{rank}.thaw").read_bytes())
    write(tmp_path, 1, one_less)
    (tmp_path / "2.1.thaw").write_bytes((tmp_path / "1.0.thaw").read_bytes())
    found = plan(DIVISIONS | {"head": DIVISIONS["words"]}, Ranks(2, 1, 0))
    targets = empty(1, 0)
    with opened(tmp_path, found) as opened_files, pytest.raises(MismatchError, match="holds other tensors than"):
        check(found, opened_files, targets, set(targets))


def test_a_parameter_that_cannot_be_divided_is_named():
    divisions = {"odd": Division(0, (Part(9),))}
    with pytest.raises(UnsupportedError, match="'odd': 9 elements cannot be divided among 2 ranks"):
        plan(divisions, Ranks(1, 2, 0))


@pytest.mark.parametrize("old", SIZES)
@pytest.mark.parametrize("new", SIZES)
def test_ranks_begin_with_different_files(old, new):
    """So that their disks and page caches are read side by side."""
    first = [plan({"norm": WHOLE}, Ranks(old, new, rank)).whole_from for rank in range(new)]
    assert len(set(first)) == min(old, new)
