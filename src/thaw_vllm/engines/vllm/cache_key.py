"""What makes a snapshot in the cache the right one for a start, and the key that is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from ...errors import FormatError, StorageError, UnsupportedError
from ...format.document import canonical
from ...format.identity import Identity
from ...weights import cache
from ...weights.capture import capture, module_tensors
from ...weights.checkpoint import Checkpoint
from . import audit
from .freezing import source_checkpoint
from .identity import engine_identity

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from .loader import ThawModelLoader

_MARGIN = 16 << 20
"""Bytes of a rank's file beside its tensors."""


def key_of(digests: Iterable[str]) -> str:
    """The key of a set of files, from each rank's digest in their order."""
    return blake3("".join(["thaw 1", *digests]).encode()).hexdigest()[: cache.KEY_DIGITS]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What makes a rank's snapshot valid.

    Attributes:
        files: of the checkpoint, as ``cache.stamp`` has them.
        vllm: its minor version.
        same: digest of the rest, but for the model's configuration.
        digest: of everything.
        bytes: that its file will have, roughly.
    """

    identity: Identity
    directory: Path
    checkpoint: Checkpoint
    files: list[list[Any]]
    vllm: str
    same: str
    digest: str
    bytes: int

    def origin(self) -> dict[str, Any]:
        """For the header."""
        return {
            cache.ORIGIN: {
                "directory": str(self.checkpoint.directory),
                "files": self.files,
                "config": self.identity.config,
                "vllm": self.vllm,
                "same": self.same,
            }
        }

    def differs(self, origin: Mapping[str, Any]) -> str | None:
        """Why a snapshot of the same directory is not the one that this start needs; None of one that is for others."""
        if (origin.get("directory"), origin.get("same")) != (str(self.checkpoint.directory), self.same):
            return None
        if origin.get("files") != self.files:
            return "the model's weight files have changed"
        if origin.get("vllm") != self.vllm:
            return f"vLLM {origin.get('vllm')} has frozen it, this is {self.vllm}"
        if origin.get("config") != self.identity.config:
            return "the model's configuration has changed"
        return None


def find(loader: ThawModelLoader, model: torch.nn.Module, vllm_config: VllmConfig, config: ModelConfig) -> Facts:
    """Of a model that is initialised, and not loaded; what of its checkpoint is not here is fetched.

    Raises:
        ThawError, OSError: it cannot be frozen, or is not here.
    """
    audit.refuse_unsound(model)
    if getattr(model, "secondary_weights", ()) or getattr(model, "allow_patterns_overrides", None):
        raise UnsupportedError("it names further weight files itself")
    identity = engine_identity(vllm_config, config, model)
    try:
        directory = loader.directory(config)
        checkpoint = source_checkpoint(directory, loader.config.source_format)
    except (StorageError, FormatError):  # part of it, perhaps, where vLLM has yet to fetch the rest
        checkpoint = None
    if checkpoint is None:
        loader.source().download_model(config)
        directory = loader.directory(config)
        checkpoint = source_checkpoint(directory, loader.config.source_format)
    if checkpoint is None or directory is None:
        raise UnsupportedError("its weights are not files of this machine")
    files, vllm = cache.stamp(checkpoint), ".".join(str(identity.engine_version).split(".")[:2])
    options = [loader.config.source_format, loader.config.source_config, loader.load_config.ignore_patterns]
    ours = dataclasses.replace(identity, engine_version=None, config=None).to_json()
    same = _digest([ours, _layout(model), options, str(getattr(config, "convert_type", None))])
    beside = _beside(directory, code=bool(config.trust_remote_code))
    size = sum(capture(module_tensors(model)).index.storages) + _MARGIN
    whole = _digest([same, files, beside, vllm, identity.config])
    return Facts(identity, directory, checkpoint, files, vllm, same, whole, size)


def _digest(value: Any) -> str:
    return blake3(canonical(value)).hexdigest()


def _layout(model: torch.nn.Module) -> str:
    """Digest of the model's class, and what a snapshot of it would hold: name, shape and dtype.

    Not of other buffers, which differ with lengths and sizes that the weights know nothing of.
    """
    forms = sorted([name, list(t.shape), str(t.dtype)] for name, _, t in module_tensors(model))
    return _digest([type(model).__module__, type(model).__qualname__, forms])


def _beside(directory: Path, *, code: bool) -> list[list[Any]]:
    """Weights in directories below, as sentence transformers have them, and code, as ``cache.stamp`` has files."""
    found = [path for end in ("safetensors", "bin", "pt") for path in directory.glob(f"*/*.{end}")]
    found += directory.glob("*.py") if code else []
    return [[str(p.relative_to(directory)), (s := p.stat()).st_size, str(s.st_mtime_ns)] for p in sorted(found)]
