"""Compiled code that a start finds again wherever its model lies.

vLLM names what it has compiled by a hash in which the model directory's path and the user's home are. Neither changes
what is compiled. So beside vLLM's name a second one is kept, without them: ``thaw-<hash>``, of which vLLM's is a
symbolic link. A start under another path makes a link of its own, and vLLM finds what is behind it, checks the sources
that it was made of (``_verify_source_unchanged``) and the machine (``SystemInfo`` of PyTorch), and loads it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from ...errors import UnsupportedError
from . import kernels, versions
from .caches import NOTE, PLANNED
from .versions import CompiledName

if TYPE_CHECKING:
    import torch

logger = init_logger(f"vllm.{__name__}")

FACTORS = "thaw-factors.json"
"""Beside what was compiled: what its name was made of, to say why another start does not find it."""
FOUND, NEW, REFUSED = "found", "new", "refused"


@dataclass
class Looked:
    """What a start has found of what earlier ones compiled.

    Attributes:
        state: FOUND, for each of the model's parts; NEW, so it will be compiled; REFUSED, as ``why`` says. Empty where
            nothing is compiled.
        why: of NEW and REFUSED, a sentence.
        names: the parts' second names.
    """

    state: str = ""
    why: str = ""
    names: tuple[str, ...] = ()


last: Looked = Looked()
"""Of this worker process."""


_kernels: dict[str, str] = {}
"""Triton's kernels that were there when the model was loaded."""


def report() -> dict[str, Any]:
    """What this process found, and what it compiled.

    ``state``, ``why`` and ``names`` as of ``Looked``; ``counts`` of vLLM's own counter (``aot_compiles``,
    ``aot_artifacts_loaded``, …); ``kernels``: of Triton, that were not in its caches when the model was loaded, each with
    its ``name`` and ``why``.
    """
    return {**asdict(last), "counts": versions.compile_counts(), "kernels": kernels.compiled_since(_kernels)}


def prepare(model: torch.nn.Module, config: Any) -> None:
    """Have vLLM find, under its own names, what was compiled for the same model elsewhere; never raises.

    Measured memory is looked for at once. Compiled code is when the model runs for the first time, since vLLM's
    configuration, which is in its names, is not complete before; a part of the model is compiled within that call.
    """
    global last, _kernels
    last = Looked()
    with contextlib.suppress(Exception):
        _kernels = kernels.listed()
    with contextlib.suppress(Exception):  # measured again
        if (plan := versions.plan_name(config)) is not None:
            _take_plan(plan)

    def first_call(module: torch.nn.Module, args: Any) -> None:
        handle.remove()
        _look(module, config)

    handle = model.register_forward_pre_hook(first_call)


def _look(model: torch.nn.Module, config: Any) -> None:
    global last
    try:
        last = _prepare(model, config)
    except (OSError, UnsupportedError) as error:
        last = Looked(REFUSED, f"what is compiled is kept under vLLM's names only: {error}")
    except Exception as error:  # vLLM's own functions, of a version that nobody has tried
        last = Looked(REFUSED, f"what is compiled is kept under vLLM's names only: {type(error).__name__}: {error}")
    if last.why:
        logger.info("%s", last.why)


def _prepare(model: torch.nn.Module, config: Any) -> Looked:
    names = versions.compiled_names(model, config)
    if not names:
        return Looked()
    rank = config.parallel_config.rank, config.parallel_config.data_parallel_index
    missing = [name for name in names if not _link(name, "rank_{}_{}/model".format(*rank))]
    every = tuple(name.anywhere for name in names)
    if not missing:
        return Looked(FOUND, "", every)
    return Looked(NEW, "this model is compiled: " + _why(missing[0]), every)


def _link(name: CompiledName, file: str) -> bool:
    """Give a directory both names; whether ``file`` is in it."""
    own, anywhere = name.directory / name.own, name.directory / f"thaw-{name.anywhere}"
    if own.is_dir() and not own.is_symlink():  # compiled before thaw was here, or without it
        if not os.path.lexists(anywhere):
            _symlink(anywhere, own.name)
    else:
        anywhere.mkdir(parents=True, exist_ok=True)
        if not own.is_dir():
            own.unlink(missing_ok=True)  # dangling
            _symlink(own, anywhere.name)
    found = (own / file).exists()
    if name.factors and not (own / FACTORS).exists():
        _write(own / FACTORS, json.dumps(name.factors, indent=1, sort_keys=True, default=str))
    return found


def _symlink(path: Path, target: str) -> None:
    with contextlib.suppress(FileExistsError):  # another rank was here
        path.symlink_to(target)


def _take_plan(name: CompiledName) -> None:
    """What another start measured, under this one's name, which it holds as well; and a note of both names."""
    own, anywhere = name.directory / PLANNED.format(name.own), name.directory / PLANNED.format(f"thaw-{name.anywhere}")
    if not own.exists() and anywhere.exists():
        found = json.loads(anywhere.read_text(encoding="utf-8"))
        _write(own, json.dumps(found | {"fingerprint": name.own}))
    _write(name.directory / f"thaw-{name.anywhere}{NOTE}", name.own)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _why(name: CompiledName) -> str:
    """Why there is nothing compiled of that name: the nearest other one, and in what it differs."""
    nearest: list[str] | None = None
    for file in name.directory.glob(f"thaw-*/{FACTORS}"):
        if file.parent.name == f"thaw-{name.anywhere}":
            continue
        try:
            differs = _differences(json.loads(file.read_text(encoding="utf-8")), name.factors)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if nearest is None or len(differs) < len(nearest):
            nearest = differs
    if nearest is None:
        return "nothing that was compiled is in the cache"
    return "what is in the cache was compiled for another start, which differs in " + "; ".join(nearest)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    here = json.loads(json.dumps(here, default=str))
    found = []
    for variable in sorted(there["variables"].keys() | here["variables"].keys()):
        theirs, ours = there["variables"].get(variable), here["variables"].get(variable)
        if theirs != ours:
            found.append(f"{variable} ({theirs!r}, here {ours!r})")
    if there["configuration"] != here["configuration"]:
        found.append("the model's configuration or vLLM's arguments")
    if there["part"] != here["part"]:
        found.append("vLLM's version, or the model's class")
    for theirs, ours in itertools.zip_longest(there["others"], here["others"], fillvalue={}):
        names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
        found += [f"{name} of PyTorch ({theirs.get(name)}, here {ours.get(name)})" for name in names]
    return found or ["nothing that can be told"]
