"""A session as one file, ``.thawsession``: a tar of its record, its contexts and its blocks, and that brought back."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CorruptionError, FormatError, StorageError
from ..format.document import canonical, parse
from ..transport.writer import StagedFile
from . import blocks
from .blocks import PAYLOAD_AT, Head, Name
from .context import MAX_CONTEXT, Context
from .record import MAGIC, MAX_HEAD, MAX_TOKENS, decode
from .store import Store

SUFFIX = ".thawsession"
RECORDS, CONTEXTS, BLOCKS = "sessions/", "contexts/", "blocks/"
"""What the names of members begin with: first the record, then its contexts, then blocks, each named by its id."""
_TAR = 512
"""Bytes of a member's header, and what its end is rounded up to."""

Progress = Callable[[int, int], None]
"""Called with bytes of blocks done, and in all."""


def export(
    store: Store, session: str, path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> tuple[str, int]:
    """Write a session to a file that holds all of it. Its parent's record is not in it.

    Args:
        session: an id, how one begins, or a label.
        force: replace an existing file.

    Returns:
        Its id, and the file's bytes.

    Raises:
        UsageError, StorageError, FormatError, CorruptionError: there is no such session, or it is not sound; nothing
            was published.
        ExistsError, SpaceError: as for any file.
    """
    with store.use():
        id_ = store.find(session)
        whole = store.read(id_)
        named = {name: context.page for context, name in store.names(whole)}
        absent = [name for name in named if not name.path(store.blocks).exists()]
        if absent:
            raise StorageError(
                f"the session {id_[:12]} lacks {len(absent)} of its blocks; thaw fsck says with how many tokens it "
                "goes on: export a branch of so many (thaw branch --at)"
            )
        members = [(RECORDS + id_, whole.encode())]
        members += [(CONTEXTS + one.id, canonical(one.to_json())) for one in store.contexts(whole.head)]
        sizes = [*(len(data) for _, data in members), *(PAYLOAD_AT + page for page in named.values())]
        total = sum(_TAR + -(-size // _TAR) * _TAR for size in sizes) + tarfile.RECORDSIZE
        with StagedFile(path, total, force=force) as staged:
            out: Any = _Out(staged)
            with tarfile.open(fileobj=out, mode="w|") as tar:
                for member, data in members:
                    tar.addfile(_member(member, len(data)), io.BytesIO(data))
                done, every, room = 0, sum(named.values()), bytearray()
                for name, page in named.items():
                    if len(room) != page:
                        room = bytearray(page)
                    blocks.read(store.blocks, name, memoryview(room))
                    head = Head.of(name, memoryview(room)).encode()
                    tar.addfile(_member(BLOCKS + _digits(name), len(head) + page), io.BytesIO(head + room))
                    done += page
                    if progress is not None:
                        progress(done, every)
            size = out.at
            staged.cut(size)
            staged.publish()
    return id_, size


def bring(store: Store, path: str | os.PathLike[str], *, progress: Progress | None = None) -> tuple[str, int]:
    """Add the session of a file to a store. Everything is verified before the session is known.

    Returns:
        Its id, and how many of its blocks were not there before.

    Raises:
        StorageError: it cannot be read; FormatError, CorruptionError: it is not sound. No session was added.
    """
    shown = repr(os.fspath(path))
    try:
        with Path(path).open("rb") as file, store.use():
            return _bring(store, file, shown, progress)
    except OSError as error:
        raise StorageError(f"{shown} cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter of numbers in its headers
        raise FormatError(f"{shown} is no session of thaw's, or it is cut: {error}") from None


def _bring(store: Store, file: BinaryIO, shown: str, progress: Progress | None) -> tuple[str, int]:
    length = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r|") as tar:
        members = _members(tar, shown, length)
        name, size, read = next(members, ("", 0, None))
        if not name.startswith(RECORDS) or read is None or size > len(MAGIC) + MAX_HEAD + 4 * MAX_TOKENS:
            raise FormatError(f"{shown} is no session of thaw's: it does not begin with one")
        session = decode(read(size), name.removeprefix(RECORDS), shown)
        contexts: list[Context] = []
        for wanted in session.head.contexts:
            name, size, read = next(members, ("", 0, None))
            if name != CONTEXTS + wanted or read is None or size > MAX_CONTEXT:
                raise FormatError(f"{shown}: the context {wanted} is missing")
            contexts.append(Context.from_json(parse(read(size), shown)))
            if contexts[-1].id != wanted:
                raise CorruptionError(f"{shown} is damaged: a context is not the one that its name says")
        rank = session.head.files
        if sum(rank * (_TAR + PAYLOAD_AT + context.page) for context in contexts) > length:
            raise CorruptionError(f"{shown} is cut: it has {length} bytes, {rank} blocks of its session have more")
        needed = {name: context.page for context, name in store.named(session, contexts)}
        added, done, every = 0, 0, sum(needed.values())
        for name, size, read in members:
            found = next((one for one in [_name(name)] if one in needed), None)
            if found is None or read is None:
                raise FormatError(f"{shown} has a member that is none of its session's: {name[:100]!r}")
            page = needed.pop(found)
            if size != PAYLOAD_AT + page:
                raise CorruptionError(
                    f"{shown}: the block {found} has {size} bytes, its context says {PAYLOAD_AT + page}"
                )
            raw = read(size)
            payload = memoryview(raw)[PAYLOAD_AT:]
            what = f"the block {found}"
            try:
                Head.decode(raw[:PAYLOAD_AT], found, size, what).verify(payload, what)
            except FormatError as error:
                raise CorruptionError(f"{shown} is damaged: {error}; copy the file again, or export again") from None
            added += blocks.write(store.blocks, found, payload, heal=True)
            done += page
            if progress is not None:
                progress(done, every)
        if needed:
            raise CorruptionError(f"{shown} is cut: {len(needed)} blocks are missing")
        return store.publish(session, contexts), added


Read = Callable[[int], bytes]


def _members(tar: tarfile.TarFile, shown: str, length: int) -> Iterator[tuple[str, int, Read]]:
    """Name, size, and how it is read; of a file of so many bytes."""
    for member in tar:
        if member.size > length:
            raise CorruptionError(f"{shown} is cut: {member.name[:100]!r} is to have {member.size} bytes")
        file = tar.extractfile(member) if member.isreg() else None
        if file is None or member.issparse():
            raise FormatError(f"{shown} has a member that is no plain file: {member.name[:100]!r}")

        def read(size: int, file: BinaryIO = file) -> bytes:  # type: ignore[assignment]
            data = file.read(size)
            if len(data) != size:
                raise CorruptionError(f"{shown} is cut")
            return data

        yield member.name, member.size, read


def _member(name: str, size: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.mode = size, 0o600
    return made


def _digits(name: Name) -> str:
    return f"{name.address.hex()}-{name.group}"


def _name(member: str) -> Name | None:
    digits = member.removeprefix(BLOCKS)
    found = blocks.name_of(Path(digits[:2]) / (digits[2:] + blocks.SUFFIX))
    return found if found is not None and member == BLOCKS + _digits(found) else None


class _Out:
    """What tarfile writes to."""

    def __init__(self, staged: StagedFile) -> None:
        self._staged, self.at = staged, 0

    def write(self, data: bytes) -> int:
        self._staged.write(self.at, data)
        self.at += len(data)
        return len(data)
