"""A freeze around vLLM's own loading: what it needs from before, and the snapshot once the weights are there."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from ... import __version__
from ...errors import UnsupportedError
from ...format.header import Header
from ...format.identity import Identity
from ...weights.capture import Captured, capture, module_tensors
from ...weights.checkpoint import Checkpoint, carried_files, has_weights, open_checkpoint
from ...weights.freeze import FreezeOptions, FreezeReport
from ...weights.provenance import checkpoint_id, source_record
from ...weights.ranks import freeze_rank
from . import audit
from .exchange import world_exchange
from .identity import config_directory
from .progress import progress_bar
from .swap.filled import remember
from .versions import untied_by_checkpoint

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger(f"vllm.{__name__}")

OTHER_FILES = ("pt", "npcache", "mistral")
"""Load formats that pass over ``*.safetensors`` files beside their own."""

UNTIED = "untied_by_checkpoint"
"""Key in the header's source: the checkpoint had an lm_head that its config does not announce."""


def source_checkpoint(directory: Path | None, kind: str) -> Checkpoint | None:
    """What vLLM's loader is about to read, as it is now; None where that has no files of its own here.

    Args:
        kind: vLLM's load format.
    """
    if kind == "dummy" or directory is None or not has_weights(directory):
        return None  # random weights are nobody's checkpoint
    checkpoint = open_checkpoint(directory)
    consolidated = kind == "auto" and any(directory.glob("consolidated*.safetensors"))
    others = consolidated and not checkpoint.files[0].startswith("consolidated")
    if checkpoint.headers and (others or kind in OTHER_FILES):
        raise UnsupportedError(
            f"with the load format {kind!r} vLLM reads other files of {str(directory)!r} than "
            f"{checkpoint.files[0]!r}, of which the model id would be made; freeze with "
            "source_format='safetensors', or move the files that are not meant elsewhere"
        )
    return checkpoint


class Freezing:
    """One rank's freeze: made before vLLM loads, then ``prepare``, then ``write``; every rank does the same."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        identity: Identity,
        directory: Path | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Takes the model's state before loading; rank 0 begins to compute the checkpoint's model id.

        Args:
            directory: of the model.
            checkpoint: what will be loaded from there.
        """
        self._model, self._model_config, self._identity = model, model_config, identity
        self._directory, self._checkpoint = directory, checkpoint
        self._id = _BackgroundId(checkpoint) if identity.parallel.rank == 0 else None
        self._before = audit.take(model)
        self._header: Header | None = None
        self._captured: Captured | None = None

    def prepare(self, **origin: Any) -> None:
        """What vLLM has loaded, held against the state before.

        Args:
            origin: more about where it is from, for the header.

        Raises:
            UnsupportedError: a snapshot could not bring it back exactly.
            ReplacedError: the checkpoint has changed meanwhile.
        """
        model, rank = self._model, self._identity.parallel.rank
        audit.refuse_unsound(model)
        after = audit.take(model)
        source: dict[str, Any] = {UNTIED: True} if untied_by_checkpoint(self._model_config) else {}
        if self._checkpoint is not None:
            source |= source_record(self._checkpoint)
            self._checkpoint.check_unchanged()
        files: list[tuple[str, bytes]] = []
        if self._directory is not None and rank == 0:
            files = carried_files(self._directory, config_directory(self._model_config))
        name = str(self._model_config.model)
        self._header = Header(
            identity=self._identity,
            writer=f"thaw {__version__}",
            source=source | origin,
            attributes=audit.changed_attributes(self._before, after),
            metadata={"model": Path(name).name if self._directory is not None else name},
        )
        self._captured = capture(module_tensors(model, also=audit.changed_buffers(self._before, after)), files)

    def write(self, path: str, *, force: bool, workers: int | None, compress: bool = False) -> FreezeReport:
        """Publish it, and note on the model that its weights are this snapshot's.

        Raises:
            ThawError: as of ``freeze_rank``; nothing of it is left.
        """
        header, captured, ident = self._header, self._captured, self._id
        assert header is not None and captured is not None
        replicas = self._identity.parallel.dp_size > 1  # of a mixture of experts: all else is the same in each
        with progress_bar("freeze", first=self._identity.parallel.rank == 0) as progress:
            report = freeze_rank(
                path,
                header,
                captured,
                FreezeOptions(force=force, compress=compress, workers=workers, progress=progress, once=replicas),
                world_exchange(),
                ident.result if ident is not None else lambda: None,
            )
        names = frozenset(tensor.name for tensor in captured.index.tensors)
        sealed = dataclasses.replace(header, content=report.content)
        remember(self._model, path, sealed, names, self._identity)
        logger.info("froze %d tensors, %.2f GB to %s", report.tensors, report.bytes / 1e9, report.path)
        return report


class _BackgroundId:
    """The checkpoint's model id, computed while vLLM loads it."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self._checkpoint = checkpoint
        self._found: str | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="thaw-model-id", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._checkpoint is not None:
                self._found = checkpoint_id(self._checkpoint)
        except Exception as error:  # raised by result(): a snapshot must not lose its id in silence
            self._failure = error

    def result(self) -> str | None:
        """Waits for it; None when there is no local checkpoint to hash."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._found
