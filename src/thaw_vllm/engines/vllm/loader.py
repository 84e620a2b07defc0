"""``load_format="thaw"``: vLLM's model filled from a snapshot, or frozen while vLLM's own loader fills it.

Both happen between ``load_weights`` and vLLM's post-processing (the raw stage), so quantisation, repacking and derived
weights are always vLLM's own work on the same bytes as after an ordinary start.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ... import __version__
from ...errors import UnsupportedError, UsageError
from ...format.header import Header
from ...format.identity import Identity, require
from ...transport.collector import collection_paused
from ...weights.capture import capture, fillable, module_tensors
from ...weights.checkpoint import Checkpoint, carried_files, has_weights, open_checkpoint
from ...weights.freeze import FreezeOptions, FreezeReport
from ...weights.open import open_rank
from ...weights.provenance import check_source, checkpoint_id, source_record
from ...weights.ranks import freeze_rank
from ...weights.reading import RestoreOptions, reading
from ...weights.restore import RestoreReport, restore
from ...weights.stream import StreamReport
from . import audit, streaming
from .exchange import world_exchange
from .failures import noted
from .identity import config_directory, engine_identity, model_directory
from .kv import ahead
from .swap.filled import note, remember
from .versions import parallel_groups, untie, untied_by_checkpoint

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

last_report: FreezeReport | RestoreReport | StreamReport | None = None
"""Of this worker process; ``thaw_report`` hands it to the engine's caller."""

MODES = ("thaw", "freeze", "stream")

OTHER_FILES = ("pt", "npcache", "mistral")
"""Load formats that pass over ``*.safetensors`` files beside their own."""

UNTIED = "untied_by_checkpoint"
"""Key in the header's source: the checkpoint had an lm_head that its config does not announce."""


@dataclass(frozen=True)
class LoaderConfig:
    """``model_loader_extra_config`` of ``load_format="thaw"``.

    Attributes:
        snapshot: path of the snapshot, or of its set's manifest; left out to stream the model directory's own weights.
        mode: ``thaw`` to fill the model from it, ``freeze`` to load the checkpoint and write it, ``stream`` to load the
            checkpoint through thaw's transport. Without a snapshot it is ``stream``.
        verify: thaw: hold every chunk against its checksum.
        check_source: thaw: refuse a model directory whose weight files are not the snapshot's.
        force: freeze: replace an existing snapshot.
        source_format: freeze: vLLM's load format for the checkpoint.
        source_config: freeze: that loader's own extra config.
        workers: threads or helper processes a rank; None for what the machine bears.
        processes: thaw: whether helper processes may be started to read.
        expects_kv: a restore of KV blocks follows the start, for which to make ready; set by ``load``.
        asked: when the engine was asked for (``time.time()``), its model directory being complete; set by ``load``.
        failures: directory in which a worker notes its error for the caller; set by ``load`` and ``freeze_checkpoint``.
    """

    snapshot: str = ""
    mode: str = ""
    verify: bool = True
    check_source: bool = True
    force: bool = False
    source_format: str = "auto"
    source_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    workers: int | None = None
    processes: bool = True
    expects_kv: bool = False
    asked: float | None = None
    failures: str | None = None

    @classmethod
    def parse(cls, given: object) -> LoaderConfig:
        """Checked; an unknown key, a wrong type or a missing snapshot raises UsageError."""
        example = """--model-loader-extra-config '{"snapshot": "weights.thaw"}'"""
        given = {} if given is None else given
        if not isinstance(given, dict) or not isinstance(given.get("snapshot", ""), str):
            raise UsageError(f"load_format='thaw' takes the snapshot's path: {example}")
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"load_format='thaw' knows no option {unknown[0]!r}; example: {example}")
        if given.get("mode", MODES[0]) not in MODES:
            raise UsageError(f"load_format='thaw': mode must be one of {', '.join(MODES)}, not {given['mode']!r}")
        if not given.get("snapshot") and (given.get("mode", "stream") != "stream" or "snapshot" in given):
            raise UsageError(f"load_format='thaw' needs the snapshot's path: {example}")
        options: dict[str, Any] = {"mode": "thaw" if given.get("snapshot") else "stream"}
        found = cls(**options | given)
        for name in ("verify", "check_source", "force", "processes", "expects_kv"):
            if not isinstance(getattr(found, name), bool):
                raise UsageError(f"load_format='thaw': {name} must be true or false")
        if found.workers is not None and (type(found.workers) is not int or found.workers < 1):
            raise UsageError("load_format='thaw': workers must be a whole number from 1")
        if found.asked is not None and type(found.asked) is not float:
            raise UsageError("load_format='thaw': asked must be a time in seconds")
        if found.mode == "stream" and found.snapshot:
            raise UsageError("load_format='thaw': mode 'stream' reads the model directory; leave snapshot out")
        if found.source_format == "thaw" or not isinstance(found.source_config, dict):
            raise UsageError("load_format='thaw': source_format must be one of vLLM's own, source_config an object")
        return found


class ThawModelLoader(BaseModelLoader):
    """vLLM's loader for snapshots; made by vLLM from ``LoadConfig``."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.config = LoaderConfig.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the checkpoint when it is read; thawing needs its config and tokenizer only."""
        if self.config.mode != "thaw":
            self._source().download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """vLLM's own sequence (initialise on the device, load, post-process), with our ``load_weights`` in the middle.

        vLLM allocates parameters uninitialised, so nothing is written twice.
        """
        with noted(self.config.failures):
            self._prepare(vllm_config, model_config)
            model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
            note(model, vllm_config, self.config.asked)
            return model

    def _prepare(self, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
        speculative = vllm_config.speculative_config
        draft = getattr(speculative, "draft_model_config", None)
        # Methods without a draft model, such as ngram, name the target there.
        if self.config.mode != "stream" and draft is model_config and draft is not vllm_config.model_config:
            raise UnsupportedError(
                "draft models are not in a snapshot in this version; give the draft a loader of its own "
                """(--speculative-config '{"draft_load_config": {"load_format": "auto"}, ...}')"""
            )
        if self.config.mode == "thaw" and not untied_by_checkpoint(model_config):
            with open_rank(self.config.snapshot, 0, with_chunks=False) as opened:
                if opened.snapshot.header.source.get(UNTIED) is True:
                    untie(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill ``model``'s raw parameters from the snapshot, or from the checkpoint and maybe freeze them."""
        global last_report
        if self.config.mode == "stream":
            last_report = self._stream(model, model_config)
            return
        audit.refuse_unsound(model)
        identity = engine_identity(get_current_vllm_config(), model_config)
        work = self._freeze if self.config.mode == "freeze" else self._thaw
        last_report, found = work(model, model_config, identity)
        model._thaw_model_id = found  # type: ignore[assignment]  # of this model, not of this process
        if self.config.expects_kv:
            ahead.expect(next(model.parameters()).device)

    def _thaw(
        self, model: torch.nn.Module, model_config: ModelConfig, identity: Identity
    ) -> tuple[RestoreReport, str | None]:
        config = self.config
        start = time.perf_counter()
        targets, required = fillable(model)

        def options(progress: Callable[[int, int], None] | None) -> RestoreOptions:
            return RestoreOptions(
                verify=config.verify, workers=config.workers, processes=config.processes, progress=progress
            )

        with (
            collection_paused(),
            _progress("thaw", first=identity.parallel.rank == 0) as progress,
            open_rank(config.snapshot, identity.parallel.rank) as opened,
            reading(opened.source, targets.values(), options(progress)) as way,
        ):
            header = opened.snapshot.header
            require(header.identity, identity, config.snapshot)
            _warn_version(header.identity, identity)
            directory = model_directory(model_config, self.load_config.download_dir)
            if config.check_source and directory is not None:
                check_source(header.source, header.identity.model, directory, config.snapshot)
            checked = time.perf_counter()
            owners = audit.attribute_owners(model, header.attributes)
            report = restore(opened.source, opened.snapshot, targets, required, options(progress), way)
            audit.apply_attributes(owners, header.attributes)
            names = frozenset(tensor.name for tensor in opened.snapshot.index.tensors)
            remember(model, config.snapshot, header, names, identity)
        seconds = {"open": checked - start} | report.seconds | {"total": time.perf_counter() - start}
        report = dataclasses.replace(report, seconds=seconds)
        logger.info(
            "thawed %d tensors, %.2f GB in %.2f s (%.2f GB/s, %s) from %s",
            report.tensors,
            report.bytes / 1e9,
            seconds["total"],
            report.gb_per_s,
            "every chunk verified" if config.verify else "not verified",
            config.snapshot,
        )
        logger.info("%s (%s)\n%s", report.route, report.why, report.waterfall())
        return report, header.identity.model

    def _freeze(
        self, model: torch.nn.Module, model_config: ModelConfig, identity: Identity
    ) -> tuple[FreezeReport, str | None]:
        directory = model_directory(model_config, self.load_config.download_dir)
        checkpoint = self._checkpoint(directory)
        ident = _BackgroundId(checkpoint) if identity.parallel.rank == 0 else None
        before = audit.take(model)
        self._source().load_weights(model, model_config)
        audit.refuse_unsound(model)
        after = audit.take(model)
        source: dict[str, Any] = {UNTIED: True} if untied_by_checkpoint(model_config) else {}
        files: list[tuple[str, bytes]] = []
        if checkpoint is not None:
            source |= source_record(checkpoint)
            checkpoint.check_unchanged()
        if directory is not None and identity.parallel.rank == 0:
            files = carried_files(directory, config_directory(model_config))
        header = Header(
            identity=identity,
            writer=f"thaw {__version__}",
            source=source,
            attributes=audit.changed_attributes(before, after),
            metadata={"model": Path(model_config.model).name if directory is not None else str(model_config.model)},
        )
        captured = capture(module_tensors(model, also=audit.changed_buffers(before, after)), files)
        with _progress("freeze", first=identity.parallel.rank == 0) as progress:
            report = freeze_rank(
                self.config.snapshot,
                header,
                captured,
                FreezeOptions(force=self.config.force, workers=self.config.workers, progress=progress),
                world_exchange(),
                ident.result if ident is not None else lambda: None,
            )
        names = frozenset(tensor.name for tensor in captured.index.tensors)
        remember(model, self.config.snapshot, dataclasses.replace(header, content=report.content), names, identity)
        logger.info("froze %d tensors, %.2f GB to %s", report.tensors, report.bytes / 1e9, report.path)
        return report, report.model

    def _stream(self, model: torch.nn.Module, model_config: ModelConfig) -> StreamReport | None:
        directory = model_directory(model_config, self.load_config.download_dir)
        found = streaming.suited(model, model_config, directory)
        if isinstance(found, str):
            logger.warning("vLLM's own loader reads the checkpoint: %s", found)
            self._source().load_weights(model, model_config)
            return None
        with _progress("stream", first=all(rank == 0 for rank, _ in parallel_groups().values())) as progress:
            return streaming.load(model, model_config, found, self.config.workers, progress)

    def _checkpoint(self, directory: Path | None) -> Checkpoint | None:
        """What vLLM's loader is about to read, as it is now; None where that has no files of its own here."""
        kind = self.config.source_format
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

    def _source(self) -> Any:
        """vLLM's own loader for the checkpoint."""
        return get_model_loader(
            dataclasses.replace(
                self.load_config,
                load_format=self.config.source_format,
                model_loader_extra_config=dict(self.config.source_config),
            )
        )


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


def _warn_version(found: Identity, wanted: Identity) -> None:
    ours, theirs = (str(i.engine_version).split(".")[:2] for i in (found, wanted))
    if ours != theirs:
        logger.warning(
            "the snapshot was frozen by vLLM %s, this is %s; every tensor's name, shape and dtype is checked, but "
            "freeze again if loading changed between them",
            found.engine_version,
            wanted.engine_version,
        )


class _progress:
    """A tqdm bar like vLLM's own on the first rank, or nothing; a context manager that gives the callback."""

    def __init__(self, verb: str, *, first: bool) -> None:
        self._verb, self._show = verb, first
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Callable[[int, int], None] | None:
        return self._advance if self._show else None

    def _advance(self, done: int, total: int) -> None:
        with self._lock:
            if self._bar is None:
                from tqdm.auto import tqdm

                # disable=None: shown on a terminal only.
                self._bar = tqdm(
                    total=total, unit="B", unit_scale=True, desc=self._verb, leave=False, delay=1, disable=None
                )
            self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
