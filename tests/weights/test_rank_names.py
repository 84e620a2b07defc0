"""Sets whose ranks have more coordinates than a tensor-parallel one: named by them, told apart by them."""

import shutil

import pytest
from tests.attacks import parts
from tests.weights.test_ranks import NEW, OLD, is_tidy, names
from tests.weights.worlds import coordinates, failed, freeze_threads, loaded

from thaw_vllm.errors import CorruptionError, FormatError, MismatchError, StorageError
from thaw_vllm.format.identity import Parallel
from thaw_vllm.weights import rank_names
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.open import open_rank, open_snapshot
from thaw_vllm.weights.verify import SET, verify

pytestmark = pytest.mark.usefixtures("no_leaks")

KINDS = {
    "tp": {"tp": 3},
    "pp": {"pp": 2},
    "tp-pp": {"tp": 2, "pp": 2},
    "dp": {"dp": 2},
    "dp-tp": {"dp": 2, "tp": 2},
    "dp-pp-tp": {"dp": 2, "pp": 2, "tp": 2},
}
LABELS = {
    "tp": ["rank1", "rank2"],
    "pp": ["pp1-tp0"],
    "tp-pp": ["pp0-tp1", "pp1-tp0", "pp1-tp1"],
    "dp": ["dp1-pp0-tp0"],
    "dp-tp": ["dp0-pp0-tp1", "dp1-pp0-tp0", "dp1-pp0-tp1"],
}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "w.thaw"


def freeze(target, value, **sizes):
    places = coordinates(**sizes)
    return freeze_threads(target, value, len(places), places=places)


def members(target):
    with open_snapshot(target) as opened:
        return [target.with_name(member.name) for member in opened.snapshot.header.ranks.members]


@pytest.mark.parametrize("expert", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_a_rank(target, kind, expert):
    world = len(coordinates(**KINDS[kind]))
    for value in (OLD, NEW):
        assert not failed(freeze(target, value, **KINDS[kind], expert=expert))
        assert loaded(target, world) == value
        assert is_tidy(target, world)
    assert verify(target).verified[-1] == SET and len(verify(target).files) == world
    for rank, place in enumerate(coordinates(**KINDS[kind], expert=expert)):
        with open_rank(target, rank) as opened:
            found = opened.snapshot.header.identity.parallel
        assert found == Parallel(**place) == found.at(rank)


@pytest.mark.parametrize("kind", LABELS)
def test_names_are_those_that_people_expect(target, kind):
    assert not failed(freeze(target, OLD, **KINDS[kind]))
    with open_snapshot(target) as opened:
        own = opened.snapshot.header.ranks.id[:12]
    expected = {f"w.{label}.thaw" for label in LABELS[kind]} | {f"w.{own}.{label}.thaw" for label in LABELS[kind]}
    assert names(target) == expected | {"w.thaw"}


def test_a_set_that_was_named_by_number_is_read_and_replaced(target, monkeypatch):
    """As those of pipeline stages were."""
    with monkeypatch.context() as patch:
        patch.setattr(rank_names, "label", lambda parallel: f"rank{parallel.rank}")
        assert not failed(freeze(target, OLD, pp=2, tp=2))
        assert {path.name.split(".")[2] for path in members(target)} == {"rank1", "rank2", "rank3"}
    assert loaded(target, 4) == OLD
    assert verify(target).verified[-1] == SET
    assert not failed(freeze(target, NEW, pp=2, tp=2))
    assert loaded(target, 4) == NEW
    assert is_tidy(target, 4)


@pytest.mark.parametrize("after", ["tp", "pp", "dp-tp"])
@pytest.mark.parametrize("before", ["tp", "pp", "dp-tp"])
def test_a_set_replaces_one_of_another_kind(target, before, after):
    assert not failed(freeze(target, OLD, **KINDS[before]))
    assert not failed(freeze(target, NEW, **KINDS[after]))
    world = len(coordinates(**KINDS[after]))
    assert loaded(target, world) == NEW
    assert is_tidy(target, world)


def test_what_killed_ranks_left_is_removed(target):
    for label in ("rank1", "pp1-tp0", "dp1-pp0-tp1"):
        target.with_name(f"w.{'b' * 12}.{label}.thaw").write_bytes(b"left")
        target.with_name(f".w.{'b' * 12}.{label}.thaw.00000000.thaw-part").write_bytes(b"left")
        target.with_name(f".w.{label}.thaw.0000000a.thaw-part").symlink_to("w.thaw")
    others = ["w.pp1.thaw", f"w.{'b' * 12}.tp1.thaw", f"v.{'b' * 12}.pp1-tp0.thaw", "w.dp1-pp0-tp9.thaw"]
    for name in others:
        target.with_name(name).write_bytes(b"other")
    assert not failed(freeze(target, NEW, dp=2, tp=2))
    for name in others:
        assert target.with_name(name).read_bytes() == b"other"
        target.with_name(name).unlink()
    assert is_tidy(target, 4)


def test_compressing_keeps_the_coordinates(target, tmp_path):
    assert not failed(freeze(target, OLD, dp=2, pp=2, expert=True))
    other = tmp_path / "other" / "c.thaw"
    other.parent.mkdir()
    rewrite(target, other, workers=1)
    assert loaded(other, 4) == OLD
    assert is_tidy(other, 4)


# --- files that are not those of their set ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"dp": 2, "tp": 2}, {"dp": 2, "tp": 2, "expert": True}, {"pp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("how", ["missing", "swapped", "doubled", "of another freeze"])
def test_rank_files_in_disorder(target, tmp_path, sizes, how):
    assert not failed(freeze(target, OLD, **sizes))
    first, second, _ = members(target)
    if how == "missing":
        second.unlink()
    elif how == "swapped":
        spare = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(spare)
    elif how == "doubled":
        second.write_bytes(first.read_bytes())
    else:
        other = tmp_path / "other" / "w.thaw"
        other.parent.mkdir()
        assert not failed(freeze(other, OLD, **sizes))
        shutil.copy(members(other)[1], second)
    words = "rank 2 of .* is missing" if how == "missing" else "is not the file that .*w.thaw' names as its rank 2"
    with pytest.raises(CorruptionError, match=words), open_rank(target, 2):
        pass
    with pytest.raises(CorruptionError, match="copy"):
        verify(target)


def test_ranks_that_name_the_same_coordinates_freeze_nothing(target):
    places = coordinates(dp=2, tp=2)
    for wrong in ([*places[:3], places[2]], [places[0], *places[:0:-1]], [*places[:3], coordinates(pp=2, tp=2)[3]]):
        errors = failed(freeze_threads(target, NEW, 4, places=wrong))
        assert [type(error) for error in errors] == [StorageError] * 4
        assert "each once and in order; nothing was published" in str(errors[0])
        assert not list(target.parent.iterdir())


def test_a_manifest_names_a_file_for_each_replica(tmp_path):
    """And none that lacks one is opened: its engine would be filled in part."""
    header = parts.header(
        parallel={"dp_size": 2, "pp_size": 2}, set={"id": "0" * 32, "members": [parts.member(f"w{n}") for n in (1, 2)]}
    )
    path = tmp_path / "w.thaw"
    path.write_bytes(parts.Parts(header=header).bytes())
    with pytest.raises(FormatError, match="names 2 files, rank 0 must name 3"), open_snapshot(path):
        pass


def test_an_engine_of_more_ranks_is_told_what_the_set_is_for(target):
    assert not failed(freeze(target, OLD, dp=2, expert=True))
    words = r"rank 2; .*; this one is for data_parallel_size=2 and enable_expert_parallel=True$"
    with pytest.raises(MismatchError, match=words), open_rank(target, 2):
        pass
