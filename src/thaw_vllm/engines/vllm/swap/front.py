"""What an engine's front end has read beside the weights, and what a snapshot carries of it."""

from __future__ import annotations

import contextlib
import fnmatch
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from ....errors import MismatchError
from ....weights.checkpoint import CARRIED_FILES, CONFIG_FILES
from ....weights.open import Opened
from ....weights.read_storage import filled as stored
from ..identity import config_directory, model_directory, tokenizer_directory

if TYPE_CHECKING:
    from vllm.config import ModelConfig

OF_MODEL = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
OF_TOKENIZER = tuple(name for name in CARRIED_FILES if name not in (*CONFIG_FILES, *OF_MODEL, "params.json"))
"""What a front end reads once, when the engine is started; the model's config is compared as a whole, by its hash."""

NOT_CARRIED = ("*.tiktoken", "*.model", "*.py", "*vocab*", "*merges*", "*token*", "*.jinja", "*template*")
"""What may be part of a tokenizer: one with such files that no snapshot carries cannot be compared."""


@dataclass(frozen=True)
class Files:
    """Of an engine, as they were when its model was loaded.

    Attributes:
        digests: base name → BLAKE3 of what the front end reads; None where there is no such file.
        unknown: why they do not say what the front end has read; None where they do.
    """

    digests: Mapping[str, bytes | None]
    unknown: str | None = None


def engine_files(model_config: ModelConfig, asked: float | None = None) -> Files:
    """Read now. A file that was changed after the front end was started is not what that has read, perhaps.

    Args:
        asked: when the engine was asked for, after which its front end has read them; None where nobody says.
    """
    model, tokenizer = model_directory(model_config), tokenizer_directory(model_config)
    if model is None or tokenizer is None:
        return Files({}, "the directories of its model and tokenizer are not known")
    if getattr(model_config, "trust_remote_code", False):
        return Files({}, "its tokenizer may be code of its own (trust_remote_code)")
    places = {name: model / name for name in OF_MODEL} | {name: tokenizer / name for name in OF_TOKENIZER}
    configs = {name: (config_directory(model_config) or model) / name for name in CONFIG_FILES}
    strange = [
        name
        for name in sorted(os.listdir(tokenizer))
        if name not in CARRIED_FILES and any(fnmatch.fnmatch(name.lower(), one) for one in NOT_CARRIED)
        if (tokenizer / name).is_file()
    ]
    if strange:
        return Files({}, f"{str(tokenizer / strange[0])!r} may be part of its tokenizer, and snapshots do not carry it")
    started, digests = max(front_started(), asked or 0), {name: _digest(path) for name, path in places.items()}
    for path in [*places.values(), *configs.values()]:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ctime > started:
                return Files(digests, f"{str(path)!r} was changed after the engine was started; restart it")
    return Files(digests)


def _digest(path: Path) -> bytes | None:
    return blake3(path.read_bytes()).digest() if path.is_file() else None


def require_files(opened: Opened, path: str, files: Files | None, cure: str) -> None:
    """Tokenizer, chat template, generation and processor config are byte for byte those of the engine.

    Raises:
        MismatchError: one differs, or is missing on one side; or what the engine has is not known.
    """
    if files is None or files.unknown is not None:
        why = "they were not noted" if files is None else files.unknown
        raise MismatchError(f"the engine's tokenizer and generation config cannot be compared: {why}; {cure}")
    carried = {file.name: file.storage for file in opened.snapshot.index.files}
    for name, ours in files.digests.items():
        if (ours is None) != (name not in carried):
            who = "the engine" if ours is not None else repr(path)
            raise MismatchError(f"only {who} has a {name}; {cure}")
        if ours is None:
            continue
        storage = carried[name]
        theirs = stored(opened.snapshot, opened.source, storage)
        if blake3(theirs).digest() != ours:
            raise MismatchError(f"{path!r} holds another {name} than the engine's; {cure}")


def front_started() -> float:
    """When the process that reads tokenizers for this worker was started, by ``time.time()``'s clock; or before that.

    An engine core is a child of the front end, and may be the worker itself; any other worker that is a child is one of
    the core. Where that is in the front end's process, it is taken for when the process above that was started.
    """
    pid, parent = os.getpid(), multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        pid = parent.pid
        if not multiprocessing.current_process().name.startswith("EngineCore"):
            pid = int(_stat(pid)[1])
    ticks = int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat says after the name: state, parent, …; start time at 19."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
