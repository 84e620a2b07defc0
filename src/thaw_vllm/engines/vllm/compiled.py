"""Compiled code that a start finds again wherever its model lies.

vLLM names what it has compiled by a hash in which the model directory's path and the user's home are. Neither changes
what is compiled. So beside vLLM's name a second one is kept, without them: ``thaw-<hash>``, of which vLLM's is a
symbolic link. A start under another path makes a link of its own, and vLLM finds what is behind it, checks the sources
that it was made of (``_verify_source_unchanged``) and the machine (``SystemInfo`` of PyTorch), and loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from ...caches.machine import differing
from ...errors import UnsupportedError
from ...weights.checkpoint import CONFIG_FILES
from . import kernels, versions
from .identity import config_directory
from .startup import VARIABLE as REPORT
from .versions import NOTE, PLANNED, CompiledName

logger = init_logger(f"vllm.{__name__}")

FACTORS = "thaw-factors.json"
"""Beside what was compiled: what its name was made of, to say why another start does not find it."""
FOUND, NEW, REFUSED = "found", "new", "refused"
_KEPT = "what is compiled is kept under vLLM's names only"


@dataclass(frozen=True)
class Looked:
    """What a start has found of what earlier ones compiled of one part of its model.

    Attributes:
        state: FOUND; NEW, so it will be compiled; REFUSED, as ``why`` says.
        why: of NEW and REFUSED, a sentence.
        name: the part's second name, where it has one.
    """

    state: str
    why: str = ""
    name: str = ""


_looked: dict[tuple[str, str], Looked] = {}
"""Of this worker process, by vLLM's keys of parts, and their second names."""
_kernels: dict[str, str] | None = None
"""Triton's kernels that were there when the model was loaded, where somebody asks for a report."""


def report() -> dict[str, Any] | None:
    """What this process found, and what it compiled; None where it has compiled nothing and looked for nothing.

    ``parts`` of models, each as Looked; ``counts`` of vLLM's own counter (``aot_compiles``, ``aot_artifacts_loaded``,
    …); ``kernels`` of Triton that were not in its caches when the model was loaded, each with its ``name`` and ``why``,
    or None where the start was not asked for a report (THAW_START_REPORT).
    """
    if not _looked:
        return None
    new = None if _kernels is None else kernels.compiled_since(_kernels)
    return {"parts": [asdict(one) for one in _looked.values()], "counts": versions.compile_counts(), "kernels": new}


def prepare(config: Any) -> None:
    """Have vLLM find, under its own names, what was compiled for the same model elsewhere; never raises.

    Measured memory is looked for at once. Compiled code is just before vLLM itself looks for it, since its
    configuration, which is in its names, is not complete before.
    """
    global _kernels
    _looked.clear()
    if os.environ.get(REPORT):
        with contextlib.suppress(Exception):  # the less important part
            _kernels = kernels.listed()
    with contextlib.suppress(Exception):  # measured again
        if (plan := versions.plan_name(config, _instead(config.model_config))) is not None:
            _take_plan(plan)
    try:
        versions.watch_compiling(_look)
    except UnsupportedError as error:
        _looked["", ""] = Looked(REFUSED, f"{_KEPT}: {error}")
        logger.info("%s", _looked["", ""].why)


def _look(part: Any, key: str) -> None:
    try:
        found = _find(part.vllm_config, key)
    except (OSError, UnsupportedError) as error:
        found = Looked(REFUSED, f"{_KEPT}: {error}")
    except Exception as error:  # vLLM's own functions, of a version that nobody has tried
        found = Looked(REFUSED, f"{_KEPT}: {type(error).__name__}: {error}")
    _looked[key, found.name] = found
    versions.prepare_triton()
    if found.why:
        logger.info("%s", found.why)


def _find(config: Any, key: str) -> Looked:
    name = versions.compiled_name(config, key, _instead(config.model_config))
    rank = config.parallel_config.rank, config.parallel_config.data_parallel_index
    if _link(name, "rank_{}_{}/model".format(*rank)):
        return Looked(FOUND, "", name.anywhere)
    return Looked(NEW, "this model is compiled: " + _why(name), name.anywhere)


def _instead(model_config: Any) -> str:
    """What stands for a model's path: what vLLM reads in its directory beside the configuration that it hashes."""
    directory = config_directory(model_config)
    if directory is None:
        return str(model_config.model)
    digest = hashlib.sha256()
    for name in CONFIG_FILES[1:]:
        if (directory / name).is_file():
            digest.update(f"{name}\0".encode() + (directory / name).read_bytes())
    return digest.hexdigest()


def _link(name: CompiledName, file: str) -> bool:
    """Give a directory both names; whether ``file`` is in it. Several ranks may do so at once."""
    own, anywhere = name.directory / name.own, name.directory / f"thaw-{name.anywhere}"
    if own.is_dir() and not own.is_symlink() and ((own / file).exists() or not (anywhere / file).exists()):
        if not os.path.lexists(anywhere):  # compiled before thaw was here, or without it
            with contextlib.suppress(FileExistsError):
                anywhere.symlink_to(own.name)
    elif not own.is_symlink() or os.readlink(own) != anywhere.name:
        anywhere.mkdir(parents=True, exist_ok=True)
        if own.is_dir() and not own.is_symlink():  # made meanwhile, and empty of what is behind the other name
            own.rename(own.with_name(f".{own.name[:16]}.{secrets.token_hex(4)}"))
        part = own.with_name(f".{own.name[:16]}.{secrets.token_hex(4)}")
        part.symlink_to(anywhere.name)
        os.replace(part, own)
    else:
        anywhere.mkdir(parents=True, exist_ok=True)
    found = (own / file).exists()
    if not (own / FACTORS).exists():
        _write(own / FACTORS, json.dumps(name.factors, indent=1, sort_keys=True, default=str))
    return found


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
    variables = differing(there["variables"], here["variables"])
    found = [f"{name} ({theirs!r}, here {ours!r})" for name, theirs, ours in variables]
    if there["configuration"] != here["configuration"]:
        found.append("the model's configuration or vLLM's arguments")
    if there["part"] != here["part"]:
        found.append("vLLM's version, or the model's class")
    pairs: Iterator[tuple[dict[str, Any], dict[str, Any]]]
    pairs = itertools.zip_longest(there["others"], here["others"], fillvalue={})
    for pair in pairs:
        found += [f"{name} of PyTorch ({theirs}, here {ours})" for name, theirs, ours in differing(*pair)]
    return found or ["nothing that can be told"]
