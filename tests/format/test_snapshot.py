"""Chunks laid out and checked, the sections put together, and files cut short or grown."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.attacks.parts import Parts, sound

from thaw_vllm.errors import CorruptionError, FormatError, ThawError, VersionError
from thaw_vllm.format import index as index_section
from thaw_vllm.format.chunks import KEPT, PLANES
from thaw_vllm.format.document import dump
from thaw_vllm.format.header import Header
from thaw_vllm.format.identity import Identity
from thaw_vllm.format.index import Index
from thaw_vllm.format.limits import HASH_BLOCK, MAX_CHUNK
from thaw_vllm.format.preamble import align
from thaw_vllm.format.snapshot import check_chunks, front, lay_out, read

lengths = st.integers(1, 10_000) | st.integers(1, 3 * MAX_CHUNK) | st.integers(0, 3).map(lambda n: n * HASH_BLOCK + 1)
storages = st.lists(lengths, max_size=5).map(tuple)
chunk_sizes = st.integers(1, MAX_CHUNK // HASH_BLOCK).map(lambda n: n * HASH_BLOCK)


def payload_of(chunks):
    return align(chunks[-1].stored_at + chunks[-1].stored) if chunks else 0


def reading(data):
    """A reader of ``data`` that never gives less than it was asked for."""

    def source(offset, length):
        if offset + length > len(data):
            raise CorruptionError(f"ends at {len(data)}, {offset + length} bytes were needed")
        return data[offset : offset + length]

    return source


@given(storages, chunk_sizes)
def test_chunks_cover_every_storage_once(lengths, size):
    chunks = lay_out(lengths, size)
    check_chunks(chunks, lengths, payload_of(chunks))
    for number, length in enumerate(lengths):
        mine = [c for c in chunks if c.storage == number]
        assert [c.at for c in mine] == list(range(0, length, size))
        assert sum(c.length for c in mine) == length
    assert all(c.stored_at % 4096 == 0 for c in chunks)
    ends = [0, *(c.stored_at + c.stored for c in chunks)]
    assert all(0 <= c.stored_at - end < 4096 for c, end in zip(chunks, ends, strict=False))


@given(storages.filter(bool), chunk_sizes, st.data())
def test_any_other_table_is_refused(lengths, size, data):
    """Every field of every chunk but its checksums is determined by its storages and the chunks' sizes."""
    chunks = list(lay_out(lengths, size))
    payload = payload_of(chunks)
    number = data.draw(st.integers(0, len(chunks) - 1))
    name = data.draw(st.sampled_from(["stored_at", "at", "length", "stored", "storage", "codec"]))
    value = data.draw(st.integers(0, 2**64 - 1) | st.integers(-2, 2).map(lambda n: n + getattr(chunks[number], name)))
    if value == getattr(chunks[number], name):
        return
    chunks[number] = dataclasses.replace(chunks[number], **{name: value})
    with pytest.raises(VersionError if name == "codec" and value not in (PLANES, KEPT) else FormatError):
        check_chunks(tuple(chunks), lengths, payload)


@given(storages.filter(bool), chunk_sizes, st.data())
def test_a_table_with_chunks_moved_left_out_or_added_is_refused(lengths, size, data):
    chunks = list(lay_out(lengths, size))
    payload = payload_of(chunks)
    number = data.draw(st.integers(0, len(chunks) - 1))
    gone = chunks[:number] + chunks[number + 1 :]
    for table in (gone, [*chunks, chunks[number]], [*chunks[:number], chunks[number], *chunks[number:]]):
        with pytest.raises(FormatError):
            check_chunks(tuple(table), lengths, payload)
    for other in (payload - 1, payload + 1, payload + 4096, payload - 4096):
        with pytest.raises(FormatError):
            check_chunks(tuple(chunks), lengths, other)


@given(storages, chunk_sizes, st.integers(0, 9000))
def test_front_is_read_back_and_paddings_are_what_nothing_covers(lengths, size, room):
    tensors = tuple(
        {"name": f"t{i}", "kind": "tensor", "dtype": "uint8", "shape": [n], "stride": [1], "storage": i, "offset": 0}
        for i, n in enumerate(lengths)
    )
    index = index_section.from_json({"tensors": list(tensors), "storages": list(lengths)})
    chunks = lay_out(lengths, size)
    data, preamble = front(Header(Identity("module"), content="ab" * 32), index, chunks, room)
    assert preamble.header == max(room, len(dump(Header(Identity("module"), content="ab" * 32).to_json())))
    assert len(data) == preamble.payload_at
    assert preamble.file_size == len(data) + payload_of(chunks)
    snapshot = read(reading(data), preamble.file_size)
    assert (snapshot.header, snapshot.index, snapshot.chunks) == (
        Header(Identity("module"), content="ab" * 32),
        index,
        chunks,
    )
    assert read(reading(data), preamble.file_size, with_chunks=False).chunks == ()
    held = [(0, preamble.chunks_end)] + [(preamble.payload_at + c.stored_at, c.stored) for c in chunks]
    covered = sorted(held + snapshot.paddings())
    assert [at for at, _ in covered] == [0, *(at + n for at, n in covered)][:-1]
    assert sum(n for _, n in covered) == preamble.file_size
    assert all(0 < n < 4096 for _, n in snapshot.paddings())


def test_front_refuses_what_the_format_cannot_hold():
    index, header = Index((), ()), Header(Identity("module"), content="ab" * 32)
    with pytest.raises(FormatError, match="too large for format version 1"):
        front(header, index, (), 16 * 2**20 + 1)


def boundaries(data):
    """Offsets where something ends: fields of the preamble, sections, padding, every chunk."""
    snapshot = read(reading(data), len(data))
    preamble = snapshot.preamble
    fields = [0, 8, 12, 16, *range(24, 64, 8), 64, 96, 128, 160, 224, 256]
    sections = [preamble.index_at, preamble.chunks_at, preamble.chunks_end, preamble.payload_at]
    records = list(range(preamble.chunks_at, preamble.chunks_end, 48))
    chunks = [preamble.payload_at + at for c in snapshot.chunks for at in (c.stored_at, c.stored_at + c.stored)]
    return sorted({*fields, *sections, *records, *chunks, len(data)})


def test_every_shorter_file_is_refused():
    data = sound()
    for length in range(len(data)):
        with pytest.raises(FormatError) as raised:
            read(reading(data[:length]), length)
        assert type(raised.value) is (FormatError if length < 12 else CorruptionError)


@pytest.mark.parametrize("more", [1, 2, 48, 4095, 4096, 1 << 20])
def test_longer_file_is_refused(more):
    for byte in (b"\0", b"x"):
        data = sound() + byte * more
        with pytest.raises(CorruptionError, match="too long"):
            read(reading(data), len(data))


def test_file_that_shrinks_while_it_is_read_is_refused():
    """Its size was right when it was opened, and the bytes end at every boundary, one before and one after."""
    data = sound()
    end = read(reading(data), len(data)).preamble.chunks_end
    for boundary in boundaries(data):
        for length in {boundary - 1, boundary, boundary + 1} & set(range(end)):
            with pytest.raises(CorruptionError, match="ends at"):
                read(reading(data[:length]), len(data))


SPLINTERS = (b"", b'"', b"[", b"}", b"-", b"9", b"\xff", b"null,", b"\\u")


@pytest.mark.soak
def test_any_bytes_are_a_snapshot_or_a_format_error(soak):
    """Sections overwritten at random, with the digests made right again: only errors of ours, and soon."""
    for case in soak(small=300, full=20_000):
        rng = case.random
        parts = Parts()
        name = rng.choice(("header", "index", "chunks"))
        if name == "chunks":
            table = [[rng.choice((field, rng.getrandbits(8), 2**16 - 1)) for field in c] for c in parts.sound_chunks()]
            data = dataclasses.replace(parts, chunks=table, payload=parts.sound_payload()).bytes()
        else:
            text = bytearray(parts.text(name))
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text))
                text[at : at + rng.randint(0, 3)] = rng.choice(SPLINTERS)
            data = dataclasses.replace(
                parts, **{name: bytes(text)}, chunks=parts.sound_chunks(), payload=parts.sound_payload()
            ).bytes()
        try:
            read(reading(data), len(data))
        except ThawError as error:
            assert isinstance(error, FormatError), case
