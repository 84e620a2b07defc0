"""Compiled code as one file, ``.thawcaches``, read: a ZIP whose first member says what is in it, and whose it is.

docs/format.md specifies it. Nothing here executes, imports or unpickles what a file holds; engines will.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptionError, FormatError, ReplacedError, StorageError, VersionError
from ..format import document
from ..format.document import array, integer, mapping, text
from .places import carried, is_path

SUFFIX = ".thawcaches"
MANIFEST = "thaw-caches.json"
VERSION = 1
MAX_FILE = (4 << 30) - (1 << 20)
"""Bytes of a file of caches: it is read into memory whole, so that what was hashed is what is unpacked."""
MAX_MEMBER = 1 << 30
MAX_BYTES = 8 << 30
"""Of all members."""
MAX_MEMBERS = 50_000
MAX_MANIFEST = 16 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_END = struct.Struct("<4s4H2LH")
"""Of a ZIP: signature, disks, members (twice), bytes of their list, where it is, bytes of a comment."""
_ENTRY = 46
"""Bytes of a member in that list, less its name, and what may follow it."""
_LENGTHS = (28, 30, 32)
"""Where these bytes have the lengths of both."""
_MALFORMED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError),
    *(ArithmeticError, LookupError, ValueError),
)
"""What ``zipfile`` raises where a file is not what it should be; the last three are of numbers in it."""
_NAMES = 16 << 20
"""Bytes of all names in that list."""


@dataclass(frozen=True)
class Member:
    """One file.

    Attributes:
        path: relative, beginning with the name of a place.
        size: in bytes.
        sha256: of its bytes as they are in the file of caches.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a file of caches says of itself.

    Attributes:
        key: what it belongs to (``machine.key``).
        made: how it was made, to be shown: names and plain values.
        members: in order.
    """

    key: dict[str, str]
    made: dict[str, Any]
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of all members."""
        return sum(member.size for member in self.members)


@dataclass(frozen=True)
class Whole:
    """The bytes of a file, of which nothing was looked at yet.

    Attributes:
        shown: its path, for messages.
        sha256: of all of it.
    """

    shown: str
    data: bytes
    sha256: str


@dataclass(frozen=True)
class Caches:
    """A file of caches, whole and in memory; its structure was checked, its members were not.

    Attributes:
        shown: its path, for messages.
        sha256: of all of it.
        size: in bytes.
    """

    shown: str
    sha256: str
    size: int
    manifest: Manifest
    _archive: zipfile.ZipFile

    def read(self, member: Member) -> bytes:
        """The member's bytes.

        Raises:
            CorruptionError: they are not those that the manifest tells.
        """
        data = _decompressed(self._archive, member, self.shown)
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            raise CorruptionError(f"{self.shown} is damaged: {member.path!r} has other bytes; copy the file again")
        return data


def fetch(path: str | os.PathLike[str]) -> Whole:
    """A file, read whole; what is trusted, looked at and unpacked are these bytes, whatever becomes of the file.

    Raises:
        StorageError: it cannot be read, or is no plain file.
        FormatError: it is too large.
    """
    shown = repr(os.fspath(path))
    data = _whole(path, shown)
    return Whole(shown, data, hashlib.sha256(data).hexdigest())


def read(path: str | os.PathLike[str]) -> Caches:
    """``fetch`` and ``parse``."""
    return parse(fetch(path))


def parse(whole: Whole) -> Caches:
    """A file of caches, held against every limit; nothing is decompressed but its manifest.

    Raises:
        FormatError, VersionError: it is none of caches, or holds what none may: paths that lead elsewhere, links,
            devices, members twice, or sizes beyond the limits.
    """
    shown, data, digest = whole.shown, whole.data, whole.sha256
    _check_end(data, shown)
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except _MALFORMED as error:
        raise FormatError(f"{shown} is no file of caches: {error}") from None
    if not infos or infos[0].filename != MANIFEST:
        raise FormatError(f"{shown} is no file of caches: it does not begin with {MANIFEST}")
    for info in infos:
        _check_member(info, shown)
    if infos[0].file_size > MAX_MANIFEST:
        raise FormatError(f"{shown}: its manifest is too large")
    first = Member(MANIFEST, infos[0].file_size, "")
    manifest = _manifest(_decompressed(archive, first, shown), shown)
    _agree(manifest, infos[1:], shown)
    return Caches(shown, digest, len(data), manifest, archive)


def _whole(path: str | os.PathLike[str], shown: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # the latter of a name with a zero in it
        raise StorageError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StorageError(f"{shown} cannot be read: it is no plain file")
        if found.st_size > MAX_FILE:
            raise FormatError(f"{shown} has {found.st_size} bytes; {MAX_FILE} are the most")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(found.st_size + 1)
    except OSError as error:
        raise StorageError(f"{shown} cannot be read: {error.strerror or error}") from None
    finally:
        os.close(descriptor)
    if len(data) > found.st_size:
        raise ReplacedError(f"{shown} was written to while it was read")
    return data


def _check_end(data: bytes, shown: str) -> None:
    """Refuse, before the list of members is read, one that is longer than any may be, and what need not be there."""
    end = data[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise FormatError(f"{shown} is no file of caches, or it is cut")
    _, _, _, _, members, size, at, comment = _END.unpack(end)
    if comment or data[-_END.size - 20 : -_END.size].startswith(b"PK\x06\x07"):
        raise FormatError(f"{shown} is no file of caches: it has a comment, or is a ZIP64")
    if members > MAX_MEMBERS + 1 or size > members * _ENTRY + _NAMES or at + size != len(data) - _END.size:
        raise FormatError(f"{shown} has {members} members in {size} bytes; {MAX_MEMBERS} are the most")
    counted = 0
    while at < len(data) - _END.size:
        at += _ENTRY + sum(int.from_bytes(data[at + n : at + n + 2], "little") for n in _LENGTHS)
        counted += 1
        if counted > members:
            raise FormatError(f"{shown} has more members than it says")


def _check_member(info: zipfile.ZipInfo, shown: str) -> None:
    what = f"{shown}: the member {info.filename[:200]!r}"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not info.filename or info.filename.endswith("/") or kind not in (0, stat.S_IFREG):
        raise FormatError(f"{what} is no plain file")
    if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(f"{what} is encrypted, or compressed in a way that is not known here")
    if info.file_size > MAX_MEMBER:
        raise FormatError(f"{what} has {info.file_size} bytes; {MAX_MEMBER} are the most")
    if info.orig_filename != info.filename:
        raise FormatError(f"{what} has another name in the file")


def _decompressed(archive: zipfile.ZipFile, member: Member, shown: str) -> bytes:
    try:
        with archive.open(member.path) as file:
            return file.read(member.size + 1)
    except _MALFORMED as error:
        raise CorruptionError(f"{shown} is damaged: {member.path!r}: {error}; copy the file again") from None


def _manifest(data: bytes, shown: str) -> Manifest:
    what = f"{shown}: {MANIFEST}"
    found = document.parse(data, what)
    if found.get("format") != "thaw caches":
        raise FormatError(f"{shown} is no file of caches")
    if type(found.get("version")) is not int or found["version"] != VERSION:
        raise VersionError(f"{shown} has version {found.get('version')!r}; this build reads {VERSION}: upgrade thaw")
    key = {text(k, what, 100): text(v, f"{what}: {k}", 1000) for k, v in mapping(found.get("key"), what).items()}
    members = []
    for entry in array(found.get("files"), what, MAX_MEMBERS):
        if not isinstance(entry, list) or len(entry) != 3:
            raise FormatError(f"{what}: a file has a path, a size and a digest")
        path, size, digest = text(entry[0], what), integer(entry[1], what, 0, MAX_MEMBER), text(entry[2], what, 64)
        check_path(path, what)
        if not _DIGEST.fullmatch(digest):
            raise FormatError(f"{what}: {digest!r} is no SHA-256")
        members.append(Member(path, size, digest))
    made = mapping(found.get("made"), what)
    return Manifest(key, made, tuple(members))


def check_path(path: str, what: str) -> None:
    """Refuse what does not lie below a place, or is never carried."""
    if not is_path(path):
        raise FormatError(f"{what}: {path[:200]!r} is no path in a cache")
    if not carried(path):
        raise FormatError(f"{what}: {path[:200]!r} is nothing that travels")


def _agree(manifest: Manifest, infos: list[zipfile.ZipInfo], shown: str) -> None:
    told = [(member.path, member.size) for member in manifest.members]
    if sorted((info.filename, info.file_size) for info in infos) != sorted(told):
        raise FormatError(f"{shown}: its members are not those that its manifest tells")
    names = {path for path, _ in told}
    if len(names) != len(told):
        raise FormatError(f"{shown}: a member is there twice")
    for path in names:
        parts = path.split("/")
        if any("/".join(parts[:end]) in names for end in range(2, len(parts))):
            raise FormatError(f"{shown}: {path[:200]!r} lies below a file")
    if manifest.size > MAX_BYTES:
        raise FormatError(f"{shown}: its members have {manifest.size} bytes; {MAX_BYTES} are the most")
