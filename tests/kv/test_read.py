"""The table out of a file: as it was written, and refused where tensors are not what the layout says."""

import dataclasses

import pytest
import torch
from tests.kv.files import LAYOUT, blocks, tensors, write, write_set

from thaw_vllm import freeze_model
from thaw_vllm.errors import CorruptionError, FormatError, MismatchError
from thaw_vllm.format.identity import Identity, require
from thaw_vllm.kv.read import count_slots, read_table
from thaw_vllm.kv.table import Table
from thaw_vllm.kv.verify import verify
from thaw_vllm.weights.open import open_snapshot

pytestmark = pytest.mark.usefixtures("no_leaks")
FIRST, SECOND = (f"pages.{region.name}" for region in LAYOUT.regions)


def table_of(path):
    with open_snapshot(path) as opened:
        return read_table(opened)


def test_as_it_was_written(tmp_path):
    assert table_of(write(tmp_path / "kv.thawkv", tensors())) == blocks()


def test_no_blocks(tmp_path):
    """Nobody freezes nothing, but it is sound."""
    path = write(tmp_path / "kv.thawkv", tensors(Table(4, 2)))
    assert table_of(path) == Table(4, 2)
    assert verify(path).verified[-1] == "table"


def test_pages_that_no_block_has(tmp_path):
    named = tensors()
    named |= {name: torch.cat([named[name], named[name]]) for name in (FIRST, SECOND)}
    assert table_of(write(tmp_path / "kv.thawkv", named)) == blocks()


def without(name):
    return {n: t for n, t in tensors().items() if n != name}


def having(name, change):
    return {n: change(t) if n == name else t for n, t in tensors().items()}


def pages_alone():
    """As in the file of a rank above 0."""
    return {n: t for n, t in tensors().items() if n.startswith("pages.")}


def shared(named):
    """Parents that are a view of the tokens."""
    return named | {"blocks.parents": named["blocks.tokens"][0]}


UNSOUND = {
    "tokens_missing": (without("blocks.tokens"), "blocks.tokens is missing"),
    "parents_missing": (without("blocks.parents"), "blocks.parents is missing"),
    "slots_missing": (without("blocks.slots"), "blocks.slots is missing"),
    "tokens_of_64_bits": (having("blocks.tokens", lambda t: t.long()), "blocks.tokens must be .* int32"),
    "slots_unsigned": (having("blocks.slots", lambda t: t.view(torch.uint32)), "blocks.slots must be .* int32"),
    "extra_signed": (having("blocks.extra", lambda t: t.view(torch.int8)), "blocks.extra must be .* uint8"),
    "pages_of_numbers": (having(FIRST, lambda t: t.view(torch.bfloat16)), "layers.0.attn#0 must be .* uint8"),
    "pages_turned": (having(FIRST, lambda t: t.t().contiguous().t()), "layers.0.attn#0 must be a row-major"),
    "pages_repeated": (having(FIRST, lambda t: t[:1].expand(7, 32)), "layers.0.attn#0 must be a row-major"),
    "tokens_repeated": (having("blocks.tokens", lambda t: t[:1, :1].expand(4, 4)), "tokens must be a row-major"),
    "parents_shared": (shared(tensors()), "shares its memory"),
    "too_few_pages": (having(FIRST, lambda t: t[:-1].clone()), "differ in length"),
    "slot_without_a_page": (
        {n: t[:-1].clone() if n in (FIRST, SECOND) else t for n, t in tensors().items()},
        "slot 6 is not below 6",
    ),
    "shorter_pages": (having(SECOND, lambda t: t[:, 1:].clone()), "attn#1 must have 16 bytes"),
    "flat_pages": (having(SECOND, lambda t: t.reshape(-1)), "attn#1 must have 16 bytes"),
    "region_missing": (without(SECOND), "pages.layers.0.attn#1 is missing or too much"),
    "other_region": (tensors() | {"pages.other": torch.zeros(7, 4, dtype=torch.uint8)}, "pages.other is missing or"),
    "other_tensor": (tensors() | {"w": torch.zeros(3)}, "w is missing or too much"),
    "other_group": (having("blocks.slots", lambda t: t[:, :1].clone()), "blocks.slots: its shape must be"),
    "other_block_size": (having("blocks.tokens", lambda t: t[:, :2].clone()), "blocks.tokens: its shape must be"),
    "cycle": (having("blocks.parents", lambda t: t + 1), "its parent 0 does not come before it"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_refused(case, tmp_path):
    named, words = UNSOUND[case]
    path = write(tmp_path / "kv.thawkv", named)
    with pytest.raises(FormatError, match=words) as told:
        table_of(path)
    assert repr(str(path)) in str(told.value)
    with pytest.raises(FormatError, match=words):
        verify(path)


def test_a_parameter_is_no_page(tmp_path):
    path = write(tmp_path / "kv.thawkv", tensors(), kinds={FIRST: "parameter"})
    with pytest.raises(FormatError, match="must be a row-major tensor"):
        table_of(path)


def test_flipped(tmp_path):
    """In the table: never read as something else. In the pages: for the verifier."""
    path = write(tmp_path / "kv.thawkv", tensors())
    sound = path.read_bytes()
    with open_snapshot(path) as opened:
        snapshot = opened.snapshot
    base = snapshot.preamble.payload_at
    names = {t.storage: t.name for t in snapshot.index.tensors}
    assert len(snapshot.chunks) == 7
    for chunk in snapshot.chunks:
        data = bytearray(sound)
        data[base + chunk.stored_at + chunk.length // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=names[chunk.storage]):
            verify(path)
        if names[chunk.storage].startswith("pages."):
            assert table_of(path) == blocks()
        else:
            with pytest.raises(CorruptionError):
                table_of(path)


def test_weights(tmp_path):
    freeze_model(torch.nn.Linear(2, 2), tmp_path / "w.thaw")
    with pytest.raises(MismatchError, match="holds weights, not KV blocks"):
        table_of(tmp_path / "w.thaw")
    assert "table" not in verify(tmp_path / "w.thaw").verified


def test_another_rank(tmp_path):
    """Pages and nothing else; the table is the manifest's."""
    path = write(tmp_path / "kv.thawkv", pages_alone(), rank=1, size=2)
    with open_snapshot(path) as opened:
        assert count_slots(opened) == 7
        with pytest.raises(MismatchError, match=r"rank 1 of 2 and no table .* manifest's path"):
            read_table(opened)
    assert verify(path).verified[-1] == "pages"
    path = write(tmp_path / "kv.thawkv", tensors(), rank=1, size=2)
    with pytest.raises(FormatError, match=r"blocks\.\w+ is missing or too much"):
        verify(path)


def test_set(tmp_path):
    """Every rank's pages, of its own regions, in the same number and layout."""
    path = write_set(tmp_path / "kv.thawkv", pages_alone())
    report = verify(path)
    assert report.verified == ("sections", "chunks", "padding", "set", "pages", "table") and len(report.files) == 2
    assert table_of(path) == blocks()


@pytest.mark.parametrize(
    ("change", "layout"),
    [(lambda t: t[:-1].clone(), LAYOUT), (torch.clone, dataclasses.replace(LAYOUT, cache_dtype="fp8"))],
)
def test_sets_that_do_not_belong_together(change, layout, tmp_path):
    pages = {name: change(tensor) for name, tensor in pages_alone().items()}
    with pytest.raises(FormatError, match="differ in the number or layout of their pages"):
        verify(write_set(tmp_path / "kv.thawkv", pages, layout))


def test_neither_is_taken_for_the_other():
    kv, raw = Identity("kv", engine="vllm"), Identity("raw", engine="vllm")
    with pytest.raises(MismatchError, match="'a' holds KV blocks, where weights are needed"):
        require(kv, raw, "a")
    with pytest.raises(MismatchError, match="'a' holds weights, where KV blocks are needed"):
        require(raw, kv, "a")


def test_layouts_that_are_refused(tmp_path):
    region = LAYOUT.regions[0]
    for change, words in [
        ({"regions": ()}, "regions is empty"),
        ({"groups": ()}, "groups is empty"),
        ({"regions": (region, region)}, "names a region twice"),
        ({"block_size": 0}, "block_size must be an integer from 1"),
        ({"cache_dtype": "a\x1b[31m"}, "cache_dtype must be a string"),
        ({"none_hash": "XY"}, "none_hash must be hexadecimal"),
        ({"regions": (dataclasses.replace(region, page=0),)}, "page must be an integer from 1"),
        ({"regions": (dataclasses.replace(region, name="a\nb"),)}, "name must be a string"),
    ]:
        layout = dataclasses.replace(LAYOUT, **change)
        with pytest.raises(FormatError, match=words):
            write(tmp_path / "kv.thawkv", tensors(), layout)
    assert not list(tmp_path.iterdir())
