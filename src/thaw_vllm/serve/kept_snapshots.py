"""Snapshots that starts have found or made: whether one still holds what a start of its model would load."""

from __future__ import annotations

from ..engines.vllm.command_line import given
from ..engines.vllm.identity import local_directory
from ..errors import ThawError
from ..weights.cache import origin_of, stamp
from ..weights.checkpoint import CARRIED_FILES, carried_files, open_checkpoint
from ..weights.open import open_snapshot
from ..weights.read_storage import filled
from .config import Model

_ELSEWHERE = ("tokenizer", "tokenizer_revision", "hf_config_path", "hf_overrides", "code_revision")
"""Options by which a front end reads other files than those of the model's directory."""


def outdated(model: Model, options: tuple[str, ...], snapshot: str) -> str | None:
    """Why a swap to it would not give the model that a start gives now; None where it would.

    The model's own directory, whichever one the snapshot was frozen from, has the same weight files, by what changes
    with their content, and the same configuration, tokenizer and template, byte for byte.

    Args:
        options: of every server.
        snapshot: one in the cache.
    """
    chosen = given([*options, *model.args])
    if named := sorted(set(_ELSEWHERE) & chosen.keys()):
        return f"--{named[0].replace('_', '-')} is given, and what that names is not in it"
    directory = local_directory(model.path, chosen.get("revision"), chosen.get("download_dir"))
    if directory is None:
        return "the model's files are not here"
    try:
        with open_snapshot(snapshot) as opened:
            if stamp(open_checkpoint(directory)) != origin_of(opened.snapshot.header).get("files"):
                return "the model's weight files are others by now"
            carried = {file.name: file.storage for file in opened.snapshot.index.files}
            now = dict(carried_files(directory))
            for name in CARRIED_FILES:
                if (name in now) != (name in carried):
                    return f"{name!r} came or went after it was frozen"
                if name not in now:
                    continue
                if filled(opened.snapshot, opened.source, carried[name]) != now[name]:
                    return f"{name!r} is another by now"
    except (ThawError, OSError) as error:
        return str(error)
    return None
