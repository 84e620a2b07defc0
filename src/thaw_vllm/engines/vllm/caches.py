"""A file of what vLLM compiled somewhere, brought to where a start looks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...caches import archive, machine, places, trust, unpacking
from ...errors import MismatchError, StorageError, ThawError, UsageError
from .fast_start import BUNDLE, can_bundle
from .startup import now

SUFFIX = archive.SUFFIX
BROUGHT = "caches.json"
"""In a directory of a start's report: what became of its file of caches."""


def beside(snapshot: str | os.PathLike[str]) -> Path:
    """Where a snapshot's caches are kept: ``weights.thawcaches`` beside ``weights.thaw``."""
    path = Path(snapshot)
    return path.with_name((path.stem if path.suffix == ".thaw" else path.name) + SUFFIX)


@dataclass(frozen=True)
class Brought:
    """What became of a file of caches.

    Attributes:
        used: whether it was unpacked.
        said: one line, also why it was not.
        environment: variables that a start needs to find it.
        counts: files ``written`` and already ``present``; empty where it was not unpacked.
    """

    used: bool
    said: str
    environment: dict[str, str]
    counts: dict[str, int]


def bring(
    path: str | os.PathLike[str],
    trusted: str | None,
    environment: Mapping[str, str],
    *,
    report: str | None = None,
) -> Brought:
    """Unpack a file of caches for a start with these variables; whatever stands against that, vLLM compiles as ever.

    Args:
        trusted: ``own``, a SHA-256, or None.
        report: a directory for the report of the start, where what became of it is written as well.

    Raises:
        UsageError: ``trusted`` is none of these.
    """
    trust.check_word(trusted)
    try:
        found = _bring(path, trusted, environment)
    except Exception as error:  # no start fails for a file that was to make it shorter
        kind = "" if isinstance(error, (ThawError, RuntimeError)) else f"{type(error).__name__}: "
        found = Brought(False, f"caches are not used: {kind}{error}", {}, {})
    if report:
        _note(Path(report), path, found)
    return found


def _bring(path: str | os.PathLike[str], trusted: str | None, environment: Mapping[str, str]) -> Brought:
    whole = archive.fetch(path)
    require_trust(whole, trusted, environment)
    caches = archive.parse(whole)
    require_machine(caches)
    variables = needed(caches.manifest, environment)
    try:
        done = unpacking.unpack(caches, places.places(environment))
    except StorageError as error:  # what is there may be enough
        return Brought(False, f"caches are not unpacked: {error}", variables, {})
    said = f"caches of {caches.shown}: {done.written} files unpacked, {done.present} were there"
    return Brought(True, said, variables, {"written": done.written, "present": done.present, "bytes": done.bytes})


def require_trust(whole: archive.Whole, trusted: str | None, environment: Mapping[str, str]) -> None:
    """Refuse a file that is not trusted.

    Raises:
        UsageError: why, and the cure.
    """
    if (why := trust.why_not(whole, trusted, environment)) is not None:
        raise UsageError(why)


def require_machine(caches: archive.Caches) -> None:
    """Refuse a file that was made for another machine.

    Raises:
        MismatchError: what is different.
    """
    if differs := machine.differences(caches.manifest.key, machine.key()):
        raise MismatchError(
            f"{caches.shown} was compiled for another machine or other libraries: {'; '.join(differs)}; pack it here: "
            "thaw caches pack"
        )


def needed(manifest: archive.Manifest, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which vLLM finds what is packed, but for those that are chosen already or that it would refuse."""
    said = manifest.made.get("variables")
    bundled = isinstance(said, dict) and said.get(BUNDLE) == "1"
    return {BUNDLE: "1"} if bundled and BUNDLE not in environment and can_bundle(environment) else {}


def _note(directory: Path, path: str | os.PathLike[str], found: Brought) -> None:
    document = {"at": now(), "file": os.fspath(path), "used": found.used, "said": found.said} | found.counts
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / BROUGHT).write_text(json.dumps(document))
    except OSError:  # the start itself says that no report can be written
        pass


def chosen_file(caches: str | os.PathLike[str] | None, snapshot: str | None, trusted: str | None) -> str | None:
    """Which file of caches a start means: the one that is named, or the one beside its snapshot; None for none.

    Raises:
        UsageError: a trust in nothing.
        StorageError: the one that was named is not there.
    """
    trust.check_word(trusted)
    if caches is not None:
        if not os.fspath(caches):
            raise UsageError(f"--caches is empty; give a file ({SUFFIX})")
        if not os.path.exists(caches):
            raise StorageError(f"there is no file of caches {os.fspath(caches)!r}; make it: thaw caches pack")
        return os.fspath(caches)
    if trusted is None:
        return None
    if snapshot is None:
        raise UsageError("--trust-caches trusts a file of caches; name it with --caches")
    return str(beside(snapshot))
