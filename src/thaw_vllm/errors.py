"""Every error thaw raises on purpose.

* ThawError
    * UsageError            an argument that cannot be right
        * UnknownSessionError  it names a session that is not there
    * FormatError           the bytes are not a snapshot this reader understands
        * VersionError      a later format version, or a codec this build lacks
        * CorruptionError   a checksum, a length or an id does not agree with the bytes
    * MismatchError         the snapshot is sound and is not the one this model or engine needs
    * UnsupportedError      freezing or thawing this would not be exact, so it is refused
        * BusyError         for now: somebody else is using what would change
    * StorageError          the file system said no
        * ExistsError       the target is there and ``force`` was not given
        * SpaceError        not enough room, or the disk filled up
        * ReplacedError     the file changed while it was being read
    * DeviceError           the accelerator or its driver said no
    * BrokenEngineError     a running engine was left half-way and has been closed, or it died
    * MissingDependencyError  an optional package is not installed

Each carries an ``exit_code`` that the command line uses; docs/cli.md lists them.
"""

from __future__ import annotations


class ThawError(Exception):
    """Base of all errors raised on purpose; the message says what, where, and the cure."""

    exit_code = 1


class UsageError(ThawError):
    """An argument that cannot be right."""

    exit_code = 2


class UnknownSessionError(UsageError):
    """A session is named that is not in the store."""


class FormatError(ThawError):
    """The bytes are not a snapshot this reader understands."""

    exit_code = 3


class VersionError(FormatError):
    """The snapshot needs a later format version or a codec this build lacks."""


class CorruptionError(FormatError):
    """A checksum, a length or an id does not agree with the bytes."""


class MismatchError(ThawError):
    """A sound snapshot that is not the one this model or engine needs."""

    exit_code = 4


class UnsupportedError(ThawError):
    """Freezing or thawing this would not be exact."""

    exit_code = 5


class BusyError(UnsupportedError):
    """Not now: somebody else is using what would change; nothing was, and it may be tried again."""


class StorageError(ThawError):
    """The file system refused."""

    exit_code = 6


class ExistsError(StorageError):
    """The target exists and overwriting was not asked for."""


class SpaceError(StorageError):
    """Not enough room for the snapshot."""


class ReplacedError(StorageError):
    """The snapshot changed while it was being read."""


class DeviceError(ThawError):
    """The accelerator or its driver refused."""

    exit_code = 8


class BrokenEngineError(ThawError):
    """A running engine was left neither in its old state nor in the new one, and has been closed; or it has died."""

    exit_code = 9


class MissingDependencyError(ThawError):
    """An optional package is not installed; the message holds the install line."""

    exit_code = 7


def named(name: object) -> type[ThawError] | None:
    """The class that another process or a server has named; None where it is none of these."""
    found = globals().get(name) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, ThawError) else None
