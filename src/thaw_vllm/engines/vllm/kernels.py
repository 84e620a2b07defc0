"""Triton's kernels in its caches: which were compiled since a model was loaded, and why they were not found.

A kernel's directory is named by a hash of its source, its options and its arguments' types. In it lie what its options
were, ``NAME.json``, and the first form that it was brought to, ``NAME.ttir``, whose function has the arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...caches import places
from ...caches.machine import differing
from . import versions

_SIGNATURE = re.compile(r"^\s*tt\.func public @\S*?\((.*)\)", re.MULTILINE)
_PLACE = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
_OWN = {"hash", "name"}
"""Of what is noted of a kernel, what says nothing about its compilation."""
_BESIDE = "TRITON_CACHE_DIR"
"""PyTorch sets it while it compiles, to a directory beside what it makes."""


def listed() -> dict[str, str]:
    """Kernels in all places where this process's Triton may keep them: directory → name."""
    now = dict(os.environ)
    usual = {name: value for name, value in now.items() if name != _BESIDE}
    roots = {places.places(variables)[places.TRITON].directory for variables in (now, usual)}
    roots |= {*versions.compiled_root().glob("thaw-*/inductor_cache/triton/*")}
    found = {}
    for root in roots:
        with contextlib.suppress(OSError), os.scandir(root) as entries:
            for entry in entries:
                for binary in Path(entry.path).glob("*.cubin"):
                    found[os.path.realpath(entry.path)] = binary.name.removesuffix(".cubin")
    return found


def compiled_since(before: Mapping[str, str]) -> list[dict[str, str]]:
    """Kernels that are new: each one's ``name``, and ``why`` none of those before did."""
    now = listed()
    return [
        {"name": name, "why": _why(Path(directory), name, before)}
        for directory, name in sorted(now.items(), key=lambda item: (item[1], item[0]))
        if directory not in before
    ]


def _why(directory: Path, name: str, before: Mapping[str, str]) -> str:
    others = [Path(other) for other, known in before.items() if known == name]
    if not others:
        return "there was none of that name"
    if any(other.name == directory.name for other in others):
        return "it was there, but Triton looked elsewhere"
    return min((_differences(other, directory, name) for other in others), key=len)


def _differences(other: Path, directory: Path, name: str) -> str:
    theirs, ours = _options(other / f"{name}.json"), _options(directory / f"{name}.json")
    differs = [f"{key} ({there}, here {here})" for key, there, here in differing(theirs, ours) if key not in _OWN]
    differs += _arguments(_signature(other / f"{name}.ttir"), _signature(directory / f"{name}.ttir"))
    return "; ".join(differs) or "its source is another, or Triton or its ptxas is"


def _arguments(theirs: list[str], ours: list[str]) -> Iterator[str]:
    if len(theirs) != len(ours):
        yield f"it had {len(theirs)} arguments, here {len(ours)}"
        return
    yield from (f"argument {there} (here {here})" for there, here in zip(theirs, ours, strict=True) if there != here)


def _options(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _signature(file: Path) -> list[str]:
    """Arguments with their types and what is known of their values, without where in a source they stand."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = _SIGNATURE.search(text)
    parts = re.split(r",\s*(?=%)", found[1]) if found else []
    return [_PLACE.sub("", part) for part in parts]
