"""A directory of sessions: records, the contexts they name, and blocks that they share.

Several processes may use it at once, and any of them may be killed at any moment: files appear whole or not at all, and
records after what they name. ``use`` is held by whoever adds or reads blocks, ``alone`` by whoever removes some.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    CorruptionError,
    ExistsError,
    FormatError,
    StorageError,
    ThawError,
    UnknownSessionError,
    UsageError,
    VersionError,
)
from ..format.document import canonical, parse
from ..transport.private import private
from ..transport.writer import StagedFile
from . import blocks
from .blocks import Name
from .context import ID_DIGITS, MAX_CONTEXT, Context
from .record import MAGIC, MAX_HEAD, MAX_TOKENS, Head, Session, decode, decode_head, record_id

VARIABLE = "THAW_SESSIONS_DIR"
ABOUT = "store.json"
VERSION = 1
RECORD, CONTEXT = ".session", ".json"
SHORTEST = 4
"""Digits by which a session may be named at least."""
_AHEAD = 4096
"""Bytes in which the head of most records ends."""


def default_directory() -> Path:
    """``$THAW_SESSIONS_DIR``, else ``$XDG_DATA_HOME/thaw/sessions``, by default below ``~/.local/share``."""
    chosen = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(os.path.abspath(Path(chosen).expanduser() if chosen else Path(base) / "thaw" / "sessions"))


@dataclass(frozen=True)
class Listed:
    """A record as a list has it.

    Attributes:
        id: of the session.
        head: what it says; not held against the id, for which all of it would have to be read.
        used: when it was made, or last resumed or branched off; seconds since 1970.
        pinned: it is kept, whatever room it takes.
    """

    id: str
    head: Head
    used: float
    pinned: bool


class Store:
    """Attributes:
    directory: of all.
    blocks: of the blocks' files.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, create: bool = False) -> None:
        """
        Args:
            directory: None for ``default_directory``.
            create: make it where it is not there.

        Raises:
            StorageError: there is none, it cannot be made, or others may write to it.
            FormatError: it is something else, or of a later version.
        """
        self.directory = default_directory() if directory is None else Path(os.path.abspath(directory))
        self.blocks = self.directory / "blocks"
        self._sessions, self._contexts = self.directory / "sessions", self.directory / "contexts"
        self._pins = self.directory / "pins"
        self._known: dict[str, Context] = {}
        self._labels: dict[str, tuple[str, ...]] = {}  # of records, which do not change
        shown = repr(str(self.directory))
        about = self.directory / ABOUT
        if not about.exists():
            if not create and not self._sessions.is_dir():  # else only that file is gone, or was not made yet
                if not self.directory.is_dir():
                    kind = "is no directory" if self.directory.exists() else "does not exist"
                    raise StorageError(
                        f"{shown} {kind}: thaw checkpoint makes a store, --store or {VARIABLE} says where it is"
                    )
                raise StorageError(
                    f"{shown} holds no sessions; thaw checkpoint makes them, --store or {VARIABLE} says where they are"
                )
            self._make(about, shown)
        private(self.directory, f"choose another directory with --store or {VARIABLE}", write=create)
        try:
            found = parse(about.read_bytes()[:MAX_HEAD], repr(str(about)))
        except OSError as error:
            raise StorageError(f"{str(about)!r} cannot be read: {error.strerror or error}") from None
        if found.get("holds") != "sessions":
            raise FormatError(f"{shown} is no store of sessions")
        if found.get("version") != VERSION:
            raise VersionError(f"{shown} is of version {found.get('version')!r}; this thaw knows version {VERSION}")

    def _make(self, about: Path, shown: str) -> None:
        private(self.directory, f"choose another directory with --store or {VARIABLE}")
        if any(not name.startswith(".") and name not in _PARTS for name in os.listdir(self.directory)):
            raise StorageError(f"{shown} has other files in it; give an empty directory, or one that is not there yet")
        try:
            for part in (self.blocks, self._sessions, self._contexts, self._pins):
                part.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{shown} cannot be made: {error.strerror or error}") from None
        with contextlib.suppress(ExistsError):  # another process was quicker
            _publish(about, canonical({"holds": "sessions", "version": VERSION}))

    # Locks

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Nobody removes blocks meanwhile. Waits for whoever does."""
        with self._locked("gate", fcntl.LOCK_SH):
            lock = self._lock("lock", fcntl.LOCK_SH)
        try:
            yield
        finally:
            _release(lock)

    def try_use(self) -> contextlib.ExitStack | None:
        """``use`` without waiting, which ends when what is returned is closed; None: somebody is alone, or wants to be.

        Raises:
            StorageError: the lock cannot be opened.
        """
        held = contextlib.ExitStack()
        try:
            with self._locked("gate", fcntl.LOCK_SH | fcntl.LOCK_NB):
                held.callback(_release, self._lock("lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        return held

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else uses it meanwhile. Waits for those that do; whoever comes after that waits for this."""
        with self._locked("gate", fcntl.LOCK_EX), self._locked("lock", fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str, how: int, *, writes: bool = False) -> Iterator[None]:
        lock = self._lock(name, how, writes=writes)
        try:
            yield
        finally:
            _release(lock)

    def _lock(self, name: str, how: int, *, writes: bool = False) -> int:
        """A descriptor that holds it; of a store that may only be read the directory's, unless something is written."""
        path = self.directory / f"{name}.lock"
        try:
            try:
                found = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if writes or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                found = os.open(path if path.exists() else self.directory, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be opened: {error.strerror or error}") from None
        try:
            fcntl.flock(found, how)
        except BaseException:
            os.close(found)
            raise
        return found

    # Records

    def publish(self, session: Session, contexts: Sequence[Context] = ()) -> str:
        """Make a session known; its blocks are there already. ``use`` is held.

        Args:
            contexts: those that it names, where they may not be there.

        Returns:
            Its id.

        Raises:
            UsageError: what a record cannot hold.
            SpaceError, StorageError: nothing was published.
        """
        data = session.encode()
        for context in contexts:
            _ensure(self.context_file(context.id), canonical(context.to_json()))
        id_ = record_id(data)
        _ensure(self.record(id_), data)
        return id_

    def listed(self) -> tuple[list[Listed], dict[str, ThawError]]:
        """All sessions, oldest first; and of those that cannot be read what is the matter, by id."""
        return self._listed(self._named(self._sessions, RECORD))

    def latest(self, most: int) -> tuple[list[Listed], dict[str, ThawError], int]:
        """As ``listed``, but only those that were made or used last, ``most`` of them; and how many others there are,
        whose records are not opened."""
        used: dict[str, float] = {}
        for id_ in self._named(self._sessions, RECORD):
            try:
                used[id_] = self.record(id_).stat().st_mtime
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError:  # what is the matter with it is to be told
                used[id_] = math.inf
        ids = sorted(used, key=lambda id_: (used[id_], id_), reverse=True)
        return *self._listed(ids[:most]), len(ids[most:])

    def _listed(self, ids: Iterable[str]) -> tuple[list[Listed], dict[str, ThawError]]:
        found: list[Listed] = []
        bad: dict[str, ThawError] = {}
        pinned = self._named(self._pins, "")
        for id_ in sorted(ids):
            path = self.record(id_)
            try:
                with path.open("rb", buffering=0) as file:
                    status = os.fstat(file.fileno())
                    data = file.read(_AHEAD)
                    if b"\n" not in data[len(MAGIC) :]:
                        data += file.read(MAX_HEAD)
                head, _ = decode_head(data, repr(str(path)), status.st_size)
                found.append(Listed(id_, head, status.st_mtime, id_ in pinned))
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError as error:
                bad[id_] = StorageError(f"{str(path)!r} cannot be read: {error.strerror or error}")
            except ThawError as error:
                bad[id_] = error
        return sorted(found, key=lambda one: (one.head.created, one.id)), bad

    def read(self, id_: str) -> Session:
        """A session, held against its id.

        Raises:
            UnknownSessionError: there is none; FormatError, CorruptionError, StorageError: it cannot be used.
        """
        path = self.record(id_)
        try:
            if path.stat().st_size > len(MAGIC) + MAX_HEAD + 4 * MAX_TOKENS:
                raise FormatError(f"{str(path)!r} is longer than any session")
            data = path.read_bytes()
        except FileNotFoundError:
            raise UnknownSessionError(f"there is no session {id_!r} in {str(self.directory)!r}") from None
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
        return decode(data, id_, repr(str(path)))

    def find(self, word: str) -> str:
        """The id of the session that a word means: an id, how one begins, or a label.

        Raises:
            UnknownSessionError: none; UsageError: several.
        """
        if word in (known := self._named(self._sessions, RECORD)):
            return word
        found = {id_ for id_ in known if len(word) >= SHORTEST and id_.startswith(word.lower())}
        if new := known - self._labels.keys():
            self._labels |= {one.id: one.head.labels for one in self._listed(new)[0]}
        found |= {id_ for id_ in known if word in self._labels.get(id_, ())}
        if len(found) == 1:
            return found.pop()
        if found:
            some = ", ".join(one[:12] for one in sorted(found)[:4])
            raise UsageError(
                f"{word!r} means {len(found)} sessions: {some}{' …' * (len(found) > 4)}; give more of an id"
            )
        more = f", or give {SHORTEST} digits of an id at least" if len(word) < SHORTEST else ""
        raise UnknownSessionError(
            f"there is no session {word!r} in {str(self.directory)!r}; thaw log shows which there are{more}"
        )

    def touch(self, id_: str) -> None:
        """Note that it is used now."""
        with contextlib.suppress(OSError):
            os.utime(self.record(id_))

    def pin(self, id_: str, pinned: bool = True) -> None:
        """Keep it, whatever room it takes; or not any more. ``use`` is held, so that nobody removes it meanwhile.

        Raises:
            UnknownSessionError: there is no such session.
            StorageError: that cannot be noted.
        """
        path = self._pins / id_
        with self._locked("pins", fcntl.LOCK_EX, writes=True):
            if pinned and not self.record(id_).exists():
                raise UnknownSessionError(f"there is no session {id_!r} in {str(self.directory)!r}")
            try:
                if pinned:
                    self._pins.mkdir(mode=0o700, exist_ok=True)  # git, for one, keeps no empty directories
                    path.touch(0o600)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{str(path)!r} cannot be written: {error.strerror or error}") from None

    def pinned(self, id_: str) -> bool:
        """Whether it is kept."""
        return (self._pins / id_).exists()

    def remove(self, id_: str) -> None:
        """Forget a session; its blocks go with the next ``collect``. ``use`` is held.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            self.record(id_).unlink(missing_ok=True)
            (self._pins / id_).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"the session {id_!r} cannot be removed: {error.strerror or error}") from None

    def forget(self, ids: Sequence[str]) -> None:
        """``remove`` several, none of which may be pinned. ``use`` is held.

        Raises:
            UsageError: one is pinned; none was removed.
            StorageError: one cannot be removed.
        """
        with self._locked("pins", fcntl.LOCK_EX, writes=True):  # nobody pins one between being looked at and removed
            if pinned := [id_ for id_ in ids if self.pinned(id_)]:
                raise UsageError(f"the session {pinned[0][:12]} is pinned; thaw pin --off lets it go")
            for id_ in ids:
                self.remove(id_)

    # What they name

    def context(self, id_: str) -> Context:
        """A context, held against its id.

        Raises:
            StorageError, FormatError, CorruptionError: it cannot be used.
        """
        found = self._known.get(id_)
        if found is None:
            path = self.context_file(id_)
            try:
                if path.stat().st_size > MAX_CONTEXT:
                    raise FormatError(f"{str(path)!r} is longer than any context")
                data = path.read_bytes()
            except OSError as error:
                raise StorageError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
            found = Context.from_json(parse(data, repr(str(path))))
            if found.id != id_:
                raise CorruptionError(f"{str(path)!r} is damaged: it is not the context that its name says")
            self._known[id_] = found
        return found

    def contexts(self, head: Head) -> list[Context]:
        """Of every rank.

        Raises:
            As ``context``; FormatError: they are not those of its ranks.
        """
        return _fitting(head, [self.context(id_) for id_ in head.contexts])

    def names(self, session: Session) -> Iterator[tuple[Context, Name]]:
        """Every block that is kept of a session, rank by rank, in the order of its tokens.

        Raises:
            As ``contexts``.
        """
        return self.named(session, self.contexts(session.head))

    def named(self, session: Session, contexts: Sequence[Context]) -> Iterator[tuple[Context, Name]]:
        """``names`` where the contexts are at hand.

        Raises:
            FormatError: they are not those of its ranks.
        """
        head = session.head
        for context in _fitting(head, contexts):
            for number, address in enumerate(context.addresses(session.tokens, head.salt, head.blocks)):
                for group, first in enumerate(head.kept):
                    if number >= first:
                        yield context, Name(address, group)

    def block_files(self) -> Iterator[Path]:
        """Every file among the blocks."""
        return blocks.everything(self.blocks)

    def records(self) -> list[Path]:
        """Every file among the records and the contexts."""
        return [path for part in (self._sessions, self._contexts) if part.is_dir() for path in sorted(part.iterdir())]

    def context_ids(self) -> set[str]:
        """Of all contexts that are there."""
        return self._named(self._contexts, CONTEXT)

    def remove_context(self, id_: str) -> None:
        """Forget one that no session names."""
        with contextlib.suppress(OSError):
            self.context_file(id_).unlink()

    def directories(self) -> list[Path]:
        """In which writers write."""
        own = [self.directory, self._sessions, self._contexts, self._pins]
        blocks = sorted(self.blocks.iterdir()) if self.blocks.is_dir() else []
        return [path for path in own + blocks if path.is_dir()]

    def knows(self, path: Path) -> bool:
        """Whether a file is a record or a context by its name."""
        suffix = {self._sessions: RECORD, self._contexts: CONTEXT}.get(path.parent)
        return suffix is not None and path.name.endswith(suffix) and _is_id(path.name.removesuffix(suffix))

    def forget_contexts(self) -> None:
        """Read them anew when they are next asked for."""
        self._known.clear()

    def context_file(self, id_: str) -> Path:
        """Its file."""
        return self._contexts / f"{id_}{CONTEXT}"

    def record(self, id_: str) -> Path:
        """Its file."""
        return self._sessions / f"{id_}{RECORD}"

    def _named(self, directory: Path, suffix: str) -> set[str]:
        try:
            found = os.listdir(directory)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StorageError(f"{str(directory)!r} cannot be read: {error.strerror or error}") from None
        return {stem for name in found if name.endswith(suffix) and _is_id(stem := name.removesuffix(suffix))}


def _is_id(name: str) -> bool:
    return len(name) == ID_DIGITS and set(name) <= set("0123456789abcdef")


def _fitting(head: Head, contexts: Sequence[Context]) -> list[Context]:
    for rank, one in enumerate(contexts):
        layout, parallel = one.layout, one.identity.parallel
        if (parallel.rank, parallel.world) != (rank, len(contexts)):
            raise FormatError("a session's contexts are not those of its ranks")
        if len(layout.groups) != len(head.kept) or layout.block_size != head.block_size:
            raise FormatError("a session has other groups or blocks than its contexts")
        if one.identity.model != head.model:
            raise FormatError("a session names another model than its contexts")
    return [*contexts]


_PARTS = {ABOUT, "blocks", "sessions", "contexts", "pins", "gate.lock", "lock.lock", "pins.lock"}


def _release(lock: int) -> None:
    """Closing alone would leave it to a process that was forked meanwhile."""
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _ensure(path: Path, data: bytes) -> None:
    """Have a file whose name is a digest of these bytes; one that has others is damaged, and replaced."""
    try:
        there = path.read_bytes() == data
    except OSError:
        there = False
    if not there:
        with contextlib.suppress(ExistsError):  # another process was quicker
            _publish(path, data, force=path.exists())


def _publish(path: Path, data: bytes, *, force: bool = False) -> None:
    with StagedFile(path, len(data), force=force) as staged:
        staged.write(0, data)
        staged.publish()
