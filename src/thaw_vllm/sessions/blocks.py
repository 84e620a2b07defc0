"""The files of blocks: one for each block of a group of layers, named by its address, with checksums of its bytes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptionError, ExistsError, FormatError, StorageError
from ..transport.checksum import wordsum, xxh3
from ..transport.writer import StagedFile

MAGIC = b"THAWBLK1"
PAYLOAD_AT = 4096
"""Offset of the payload: a page, so that it can be read directly, or mapped."""
MAX_PAYLOAD = 1 << 40
SUFFIX = ".block"
CURE = "; thaw fsck --repair takes it out"
"""Of a damaged block in a store."""

_HEAD = struct.Struct("<8s32sHHIQQQ")
_SUM = struct.Struct("<Q")
_ZEROS = bytes(PAYLOAD_AT - _HEAD.size - _SUM.size)


@dataclass(frozen=True, slots=True)
class Name:
    """Which block: its address, 32 bytes, and the group of layers."""

    address: bytes
    group: int

    @property
    def file(self) -> str:
        """Its file's path below the directory of all blocks: in one for the address's first byte."""
        digits = self.address.hex()
        return f"{digits[:2]}/{digits[2:]}-{self.group}{SUFFIX}"

    def path(self, directory: Path) -> Path:
        """Its file."""
        return directory / self.file

    def __str__(self) -> str:
        return f"{self.address.hex()[:16]}-{self.group}"


def name_of(path: Path) -> Name | None:
    """Which block a file is by its path; None for any other file."""
    digits, dash, group = path.name.removesuffix(SUFFIX).partition("-")
    whole = path.parent.name + digits
    if not path.name.endswith(SUFFIX) or not dash or len(whole) != 64 or not group.isdecimal() or int(group) > 0xFFFF:
        return None
    try:
        found = Name(bytes.fromhex(whole), int(group))
    except ValueError:
        return None
    return found if found.path(path.parent.parent) == path else None


@dataclass(frozen=True)
class Head:
    """What stands before a payload: of which block it is, its bytes, and both checksums (docs/format.md, section 6)."""

    name: Name
    length: int
    xxh3: int
    wordsum: int

    @classmethod
    def of(cls, name: Name, payload: memoryview, words: int | None = None) -> Head:
        """With the checksums of a payload; ``words``: its word sum, where it is known."""
        return cls(name, len(payload), xxh3(payload), wordsum(payload) if words is None else words)

    def verify(self, payload: memoryview, what: str, cure: str = "", *, words: bool = True) -> None:
        """Hold a payload of this length against the checksums.

        Args:
            words: against the word sum, too, which takes a processor 2 ms for 2 MiB. A GPU looks at that one alone.

        Raises:
            CorruptionError: it does not agree.
        """
        if xxh3(payload) != self.xxh3 or (words and wordsum(payload) != self.wordsum):
            raise damaged(what, cure)

    def encode(self) -> bytes:
        """``PAYLOAD_AT`` bytes; the second checksum at the end of the fields is over these themselves."""
        fields = _HEAD.pack(MAGIC, self.name.address, self.name.group, 0, 0, self.length, self.xxh3, self.wordsum)
        return (fields + _SUM.pack(xxh3(memoryview(fields)))).ljust(PAYLOAD_AT, b"\0")

    @classmethod
    def decode(cls, data: bytes, name: Name, size: int, what: str) -> Head:
        """Checked.

        Args:
            name: which block it has to be.
            size: of the file.
            what: its name, for messages.

        Raises:
            FormatError: it is no block of this version; CorruptionError: it is damaged, or another one.
        """
        if len(data) < PAYLOAD_AT or data[:8] != MAGIC:
            raise FormatError(f"{what} is no block of this version of thaw, or it is damaged")
        end = _HEAD.size
        _, address, group, low, high, length, sum_, words = _HEAD.unpack_from(data)
        if _SUM.unpack_from(data, end)[0] != xxh3(memoryview(data)[:end]) or data[end + 8 : PAYLOAD_AT] != _ZEROS:
            raise CorruptionError(f"{what} is damaged: the checksum of its head does not agree")
        if low or high or length > MAX_PAYLOAD or size != PAYLOAD_AT + length:
            raise CorruptionError(f"{what} is damaged: it has {size} bytes, {PAYLOAD_AT + length} were written")
        if Name(address, group) != name:
            raise CorruptionError(f"{what} holds another block than its name says")
        return cls(name, length, sum_, words)


def write(directory: Path, name: Name, payload: memoryview, *, words: int | None = None, heal: bool = False) -> bool:
    """Keep a block, unless it is there: whoever comes first writes it.

    Args:
        directory: of all blocks.
        payload: bytes, contiguous.
        words: their word sum, where it is known.
        heal: look at one that is there, and replace it where it is damaged.

    Returns:
        Whether it was not there.

    Raises:
        SpaceError, StorageError: nothing was published.
    """
    path = name.path(directory)
    there = path.exists()
    if there and not (heal and _damaged(directory, name, len(payload))):
        return False
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the directory {str(path.parent)!r} cannot be made: {error.strerror or error}") from None
    head = Head.of(name, payload, words).encode()
    try:
        with StagedFile(path, len(head) + len(payload), force=there) as staged:
            staged.write(0, head)
            staged.write(len(head), payload)
            staged.publish()
    except ExistsError:
        return False
    return True


def _damaged(directory: Path, name: Name, length: int) -> bool:
    try:
        read(directory, name, memoryview(bytearray(length)))
    except (FormatError, StorageError):
        return True
    return False


def read(directory: Path, name: Name, into: memoryview, *, words: bool = True) -> None:
    """A block's bytes, verified; ``into`` has as many as it has to have.

    Args:
        words: see ``Head.verify``.

    Raises:
        StorageError: it is not there, or cannot be read.
        FormatError, CorruptionError: it is not what was written.
    """
    head, done = _read(directory, name, len(into), into)
    what = repr(str(name.path(directory)))
    if done != len(into):
        raise CorruptionError(f"{what} is cut")
    head.verify(into, what, CURE, words=words)


def check(directory: Path, name: Name, length: int) -> Head:
    """A block's head, held against its name and its length.

    Raises:
        As ``read``.
    """
    return _read(directory, name, length, None)[0]


def damaged(what: str, cure: str = CURE) -> CorruptionError:
    """What to raise where the bytes of the block ``what`` do not agree with a checksum of its head."""
    return CorruptionError(f"{what} is damaged: the checksum of its bytes does not agree{cure}")


def _read(directory: Path, name: Name, length: int, into: memoryview | None) -> tuple[Head, int]:
    """A block's head, and how many bytes were read."""
    path = f"{os.fspath(directory)}/{name.file}"  # pathlib would take as long as reading a head
    what = repr(path)
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            head = Head.decode(_exactly(file, PAYLOAD_AT), name, os.fstat(file.fileno()).st_size, what)
            if head.length != length:
                raise CorruptionError(f"{what} has {head.length} bytes, a block of its context has {length}")
            while into is not None and done < length and (count := file.readinto(into[done:])):
                done += count
    except FileNotFoundError:
        raise StorageError(f"{what} is missing; thaw fsck shows which sessions lack it") from None
    except OSError as error:
        raise StorageError(f"{what} cannot be read: {error.strerror or error}") from None
    return head, done


def everything(directory: Path) -> Iterator[Path]:
    """Every file below a directory of blocks, those of writers among them."""
    for below in sorted(directory.iterdir() if directory.is_dir() else ()):
        if below.is_dir() and not below.is_symlink():
            yield from sorted(below.iterdir())
        else:
            yield below


def _exactly(file: Any, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found
