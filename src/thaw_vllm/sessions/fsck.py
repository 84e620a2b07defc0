"""A store held against itself: every record, context and block; and what is damaged taken out of the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FormatError, StorageError, ThawError, UsageError, VersionError
from ..transport.writer import ANY_TOKEN, hidden_name, remove_stale
from . import blocks
from .blocks import Name, name_of
from .record import Session
from .store import RECORD, Store
from .windows import rest

Progress = Callable[[int, int], None]
"""Called with blocks checked, and how many there are."""


@dataclass
class Checked:
    """What was found.

    Attributes:
        sessions, blocks, bytes: that were looked at.
        broken: sessions whose record is damaged, or whose context is, and why.
        damaged: files of blocks and contexts that are not what was written, and why.
        unread: files that could not be read, and why: whether they are sound is not known, and they are left alone.
        missing: sessions of which blocks are not there, or are damaged: with how many tokens each can go on.
        unneeded: blocks that no session names; no fault, ``collect`` removes them. 0 while a session is broken, of
            which it is not known what it names.
        unfinished: files of writers that were killed, or are writing; no fault either.
        strange: files that are nothing of a store's.
        repaired: what was taken out.
    """

    sessions: int = 0
    blocks: int = 0
    bytes: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    unneeded: int = 0
    unfinished: int = 0
    strange: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Every session that is there can be resumed whole."""
        return not (self.broken or self.damaged or self.unread or self.missing)


def fsck(store: Store, *, quick: bool = False, repair: bool = False, progress: Progress | None = None) -> Checked:
    """Hold everything in a store against its checksums and names.

    Args:
        quick: leave out the bytes of blocks; their heads and sizes are looked at.
        repair: remove damaged blocks and contexts, and move records that cannot be read to ``lost``. A session that
            lacks a block goes on from the one before it; the next checkpoint of the same tokens brings it back, and
            that of any session of the same engine brings back its context.

    Raises:
        StorageError: it cannot be read or repaired.
    """
    with store.alone() if repair else store.use():
        found, unreadable = Checked(), set[str]()
        store.forget_contexts()
        needed: dict[Name, int] = {}
        owners: dict[str, Session] = {}
        listed, bad = store.listed()
        found.broken = {id_: str(error) for id_, error in bad.items()}
        for id_, problem in bad.items():
            if isinstance(problem, FormatError) and not isinstance(problem, VersionError):
                unreadable.add(id_)
            else:
                found.unread[str(store.record(id_))] = str(problem)
        for id_ in store.context_ids():
            try:
                store.context(id_)
            except FormatError as error:
                found.damaged[str(store.context_file(id_))] = str(error)
            except StorageError as error:
                found.unread[str(store.context_file(id_))] = str(error)
        for one in listed:
            found.sessions += 1
            try:
                session = store.read(one.id)
            except UsageError:  # forgotten meanwhile
                found.sessions -= 1
                continue
            except (StorageError, VersionError) as error:
                found.broken[one.id] = found.unread[str(store.record(one.id))] = str(error)
                continue
            except ThawError as error:
                found.broken[one.id] = str(error)
                unreadable.add(one.id)
                continue
            try:
                names = [*store.names(session)]
            except ThawError as error:
                found.broken[one.id] = str(error)
                continue
            owners[one.id] = session
            needed |= {name: context.page for context, name in names}
        there, useless = _sort(store, found), set[Name]()
        for done, (name, path) in enumerate(sorted(there.items(), key=lambda item: item[1])):
            if progress is not None:
                progress(done, len(there))
            try:
                size = path.stat().st_size
            except OSError:  # a link to nothing
                del there[name]
                found.strange.append(str(path))
                continue
            found.blocks, found.bytes = found.blocks + 1, found.bytes + size
            found.unneeded += name not in needed
            try:
                length = needed.get(name, max(0, size - blocks.PAYLOAD_AT))
                if quick:
                    blocks.check(store.blocks, name, length)
                else:
                    blocks.read(store.blocks, name, memoryview(bytearray(length)))
            except FormatError as error:
                found.damaged[str(path)] = str(error)
                useless.add(name)
            except StorageError as error:
                found.unread[str(path)] = str(error)
        if progress is not None:
            progress(len(there), len(there))
        for id_, session in owners.items():
            count, _, lost = rest(session, store.contexts(session.head), lambda n: n not in there or n in useless)
            if lost:
                found.missing[id_] = count * session.head.block_size
        if found.broken:
            found.unneeded = 0
        if repair:
            _repair(store, found, unreadable)
        return found


def _sort(store: Store, found: Checked) -> dict[Name, Path]:
    """Blocks by their names; other files are noted."""
    there = {}
    for path in [*store.block_files(), *store.records()]:
        name = name_of(path)
        if path.match(hidden_name("*", ANY_TOKEN)):
            found.unfinished += 1
        elif path.parent.parent == store.blocks and name is not None:
            there[name] = path
        elif not store.knows(path):
            found.strange.append(str(path))
    return there


def _repair(store: Store, found: Checked, unreadable: set[str]) -> None:
    lost = store.directory / "lost"
    try:
        for shown in found.damaged:
            Path(shown).unlink(missing_ok=True)
            found.repaired.append(shown)
        for id_ in unreadable:
            lost.mkdir(mode=0o700, exist_ok=True)
            store.record(id_).rename(lost / f"{id_}{RECORD}")
            found.repaired.append(str(store.record(id_)))
    except OSError as error:
        raise StorageError(f"{str(store.directory)!r} cannot be repaired: {error.strerror or error}") from None
    for below in store.directories():
        found.repaired += map(str, remove_stale(below, "*"))
