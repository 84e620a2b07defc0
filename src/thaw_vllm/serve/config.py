"""Which models a pool serves and how it treats them: a TOML file, and ``--register`` on the command line."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import StorageError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
LONGEST = 7 * 24 * 3600.0
"""Seconds, of any time that can be set."""


@dataclass(frozen=True)
class Model:
    """One model that is served.

    Attributes:
        name: what requests call it.
        path: a model directory, or its name on the hub.
        snapshot: its weights, a ``.thaw`` file; None: vLLM loads the checkpoint.
        args: further words of ``vllm serve``'s command line.
        share: of the memory that all engines have together, more than 0, at most 1.
        minimum: engines that are started with the pool, in free room, and that idle times leave.
        maximum: engines at most; a further one is started in free room when all that it has are busy.
        busy: requests at once with which an engine is.
        pinned: so many as the minimum, at least one, never make room for another model.
        park: park it rather than stop it, where that can be done.
        idle_park, idle_stop: seconds without a request after which it is parked, stopped; None: not for that.
        deadline: seconds that a request may wait until its model is there.
    """

    name: str
    path: str
    snapshot: str | None = None
    args: tuple[str, ...] = ()
    share: float = 1.0
    minimum: int = 0
    maximum: int = 1
    busy: int = 64
    pinned: bool = False
    park: bool = True
    idle_park: float | None = None
    idle_stop: float | None = None
    deadline: float = 120.0

    def __post_init__(self) -> None:
        where = f"model {self.name!r}"
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} cannot name a model; use letters, digits and any of ._:/@+-")
        values: Mapping[str, object] = vars(self)  # out of a file: nothing has checked them yet
        if not isinstance(values["path"], str) or not self.path:
            raise UsageError(f"{where}: path is missing: a model directory, or a name on the hub")
        if not isinstance(values["snapshot"], (str, type(None))):
            raise UsageError(f"{where}: snapshot must be a path")
        words = values["args"]
        if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
            raise UsageError(f"{where}: args must be a list of texts, the words of vllm serve's command line")
        _number(where, "share", self.share, 1.0, positive=True)
        for name, least in (("minimum", 0), ("maximum", 1), ("busy", 1)):
            _whole(where, name, values[name], least)
        if self.minimum > self.maximum:
            raise UsageError(f"{where}: minimum is {self.minimum}, more than maximum, which is {self.maximum}")
        for name in ("pinned", "park"):
            if not isinstance(values[name], bool):
                raise UsageError(f"{where}: {name} must be true or false")
        for name in ("idle_park", "idle_stop"):
            if getattr(self, name) is not None:
                _number(where, name, getattr(self, name), LONGEST)
        _number(where, "deadline", self.deadline, LONGEST, positive=True)

    @property
    def least(self) -> int:
        """Engines that idle times leave."""
        return max(self.minimum, int(self.pinned))


@dataclass(frozen=True)
class Settings:
    """Of a pool.

    Attributes:
        models: by name.
        drain: seconds in which the requests of a model may end that has to make room.
        parked: engines that may be parked at once; the one used longest ago is stopped.
        parked_gib: host memory that they may take together; None: as much as there is.
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    drain: float = 30.0
    parked: int = 8
    parked_gib: float | None = None

    def __post_init__(self) -> None:
        _number("the pool", "drain", self.drain, LONGEST)
        _whole("the pool", "parked", self.parked, 0)
        if self.parked_gib is not None:
            _number("the pool", "parked_gib", self.parked_gib, 1e6)
        pinned = {name: model.share * model.least for name, model in self.models.items() if model.pinned}
        for name, model in self.models.items():
            beside = {other: share for other, share in pinned.items() if other != name}
            own = pinned.get(name, model.share)
            if own > 1 + 1e-9:
                raise UsageError(
                    f"the model {name!r} is pinned: the shares of its {model.least} engines are more than 1"
                )
            if beside and sum(beside.values()) + own > 1 + 1e-9:
                names = ", ".join(map(repr, beside))
                raise UsageError(
                    f"the model {name!r} has no room beside what is pinned ({names}): their shares are more than 1 "
                    "together; give them smaller ones"
                )


DEFAULTS = ("share", "park", "idle_park", "idle_stop", "deadline", "minimum", "maximum", "busy")
"""What may stand at the top of the file, too, for all models."""


OWN = ("drain", "parked", "parked_gib")
"""What stands there for the pool."""


def read(path: str | os.PathLike[str], registered: Iterable[str] = ()) -> Settings:
    """A file's settings, and models of ``--register``.

    Raises:
        StorageError: it cannot be read.
        UsageError: what is wrong in it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    shown = repr(os.fspath(path))
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{shown} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{shown} is not TOML: {error}") from None
    tables = found.pop("models", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"{shown}: models must be tables, as in [models.llama]")
    own = {name: found.pop(name) for name in OWN if name in found}
    common = {name: found.pop(name) for name in DEFAULTS if name in found}
    if found:
        known = ", ".join(["models", *OWN, *DEFAULTS])
        raise UsageError(f"{shown} says {next(iter(found))!r}, which is nothing known; there are {known}")
    base = Path(path).absolute().parent
    models = {name: _model(name, common | table, base) for name, table in tables.items()}
    return Settings(models | _registered(registered, models, common), **own)


def registered(words: Iterable[str]) -> Settings:
    """The models of ``--register name=path`` alone.

    Raises:
        UsageError: one is not like that, or there twice.
    """
    return Settings(_registered(words, {}, {}))


def _registered(words: Iterable[str], there: Mapping[str, Model], common: Mapping[str, Any]) -> dict[str, Model]:
    found: dict[str, Model] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--register {word!r}: it is NAME=PATH, a model directory or a name on the hub")
        if name in there or name in found:
            raise UsageError(f"the model {name!r} is registered twice")
        found[name] = _model(name, dict(common) | {"path": path}, Path.cwd())
    return found


def _model(name: str, table: Mapping[str, Any], base: Path) -> Model:
    known = {one.name for one in fields(Model)} - {"name"}
    for key in table:
        if key not in known:
            raise UsageError(
                f"model {name!r} says {key!r}, which is nothing known; there are {', '.join(sorted(known))}"
            )
    values = dict(table)
    for key in ("path", "snapshot"):
        value = values.get(key)
        if isinstance(value, str) and (key == "snapshot" or (base / value).exists()):
            values[key] = str(base / value)
    if isinstance(values.get("args"), list):
        values["args"] = tuple(values["args"])
    if "path" not in values:
        raise UsageError(f"model {name!r}: path is missing: a model directory, or a name on the hub")
    return Model(name, **values)


def _whole(where: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 10000:
        raise UsageError(f"{where}: {name} must be a whole number from {least} on")


def _number(where: str, name: str, value: object, most: float, *, positive: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= most or (positive and value == 0):  # type: ignore[operator]
        least = "more than 0" if positive else "from 0"
        raise UsageError(f"{where}: {name} must be a number, {least}, up to {most:g}")
