"""``load_format="thaw"``: vLLM's model filled from a snapshot, or frozen while vLLM's own loader fills it.

Both happen between ``load_weights`` and vLLM's post-processing (the raw stage), so quantisation, repacking and derived
weights are always vLLM's own work on the same bytes as after an ordinary start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from ...errors import ThawError, UnsupportedError, UsageError
from ...format.header import Header
from ...format.identity import Identity, require
from ...transport.collector import collection_paused
from ...transport.reading_helpers import WORTH
from ...transport.tcp_address import peer_address, remote
from ...weights import ahead
from ...weights.capture import fillable
from ...weights.freeze import FreezeReport
from ...weights.open import Opened, open_rank
from ...weights.peers import AUTO, given_back
from ...weights.provenance import check_source
from ...weights.reading import RestoreOptions, reading
from ...weights.restore import RestoreReport, match
from ...weights.stream import StreamReport
from . import audit, automatic, compiled, offering, resharding, streaming
from .automatic import Outcome
from .exchange import Together
from .failures import noted
from .freezing import UNTIED, Freezing, source_checkpoint
from .identity import engine_identity, model_directory, replica
from .progress import progress_bar
from .shared_weights import Placeholders, place, require_shareable
from .swap.filled import forget, note, remember
from .versions import parallel_groups, untie, untied_by_checkpoint

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

    from ...transport.kept_helpers import KeptHelpers

logger = init_logger(f"vllm.{__name__}")

last_report: FreezeReport | RestoreReport | StreamReport | None = None
"""Of this worker process; ``thaw_report`` hands it to the engine's caller."""

last_outcome: Outcome | None = None
"""The same of how the model got its weights."""

MODES = ("thaw", "freeze", "stream", "auto")


@dataclass(frozen=True)
class LoaderConfig:
    """``model_loader_extra_config`` of ``load_format="thaw"``.

    Attributes:
        snapshot: path of the snapshot, or of its set's manifest; left out to stream the model directory's own weights.
        mode: ``thaw`` to fill the model from it, ``freeze`` to load the checkpoint and write it, ``stream`` to load the
            checkpoint through thaw's transport, ``auto`` to thaw what ``cache`` has for this model and
            configuration, or load the checkpoint and write it there. Without a snapshot it is ``stream``.
        cache: auto: the directory in which starts keep snapshots.
        cache_bytes: auto: how large it may become; None for a share of its file system.
        shared: thaw: the socket of a process that holds the snapshot's weights for several engines on one GPU
            (``sessions/pool_holder``); they are mapped, not read.
        peer: thaw, auto: ``auto`` to take the weights from an engine of this host that offers them, where there is
            one, the socket of such an offer, or ``tcp://HOST:PORT`` of a ``thaw lend``.
        offer: thaw, freeze, auto: lend them to engines of this host that ask for them.
        verify: thaw: hold every chunk against its checksum.
        check_source: thaw: refuse a model directory whose weight files are not the snapshot's.
        force: freeze: replace an existing snapshot.
        compress: freeze: store what shrinks by codec 1.
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
    cache: str = ""
    cache_bytes: int | None = None
    shared: str = ""
    peer: str = ""
    offer: bool = False
    verify: bool = True
    check_source: bool = True
    force: bool = False
    compress: bool = False
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
        if not isinstance(given, dict) or not _texts(given, "snapshot", "cache", "shared", "peer"):
            raise UsageError(f"load_format='thaw' takes the snapshot's path: {example}")
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"load_format='thaw' knows no option {unknown[0]!r}; example: {example}")
        if given.get("mode", MODES[0]) not in MODES:
            raise UsageError(f"load_format='thaw': mode must be one of {', '.join(MODES)}, not {given['mode']!r}")
        without = given.get("mode", "stream") in ("stream", "auto")
        if not given.get("snapshot") and (not without or "snapshot" in given):
            raise UsageError(f"load_format='thaw' needs the snapshot's path: {example}")
        options: dict[str, Any] = {"mode": "thaw" if given.get("snapshot") else "stream"}
        found = cls(**options | given)
        for name in ("offer", "verify", "check_source", "force", "compress", "processes", "expects_kv"):
            if not isinstance(getattr(found, name), bool):
                raise UsageError(f"load_format='thaw': {name} must be true or false")
        if found.workers is not None and (type(found.workers) is not int or found.workers < 1):
            raise UsageError("load_format='thaw': workers must be a whole number from 1")
        if found.asked is not None and type(found.asked) is not float:
            raise UsageError("load_format='thaw': asked must be a time in seconds")
        if found.mode == "stream" and found.snapshot:
            raise UsageError("load_format='thaw': mode 'stream' reads the model directory; leave snapshot out")
        if found.shared and found.mode != "thaw":
            raise UsageError("load_format='thaw': weights that are shared are those of a snapshot; give it, too")
        if found.peer and (found.mode not in ("thaw", "auto") or found.shared):
            raise UsageError("load_format='thaw': a peer gives weights of a snapshot that is thawed, and not shared")
        if remote(found.peer):
            peer_address(found.peer)
        if found.offer and (found.mode == "stream" or found.shared):
            raise UsageError("load_format='thaw': weights that are offered are a snapshot's, and this engine's own")
        if bool(found.cache) != (found.mode == "auto"):
            raise UsageError("load_format='thaw': mode 'auto' takes a directory as cache, and nothing else does")
        if found.mode == "auto" and found.snapshot:
            raise UsageError("load_format='thaw': mode 'auto' finds the snapshot itself; leave snapshot out")
        if found.cache_bytes is not None and (type(found.cache_bytes) is not int or found.cache_bytes < 0):
            raise UsageError("load_format='thaw': cache_bytes must be a whole number from 0")
        if found.source_format == "thaw" or not isinstance(found.source_config, dict):
            raise UsageError("load_format='thaw': source_format must be one of vLLM's own, source_config an object")
        return found


class ThawModelLoader(BaseModelLoader):
    """vLLM's loader for snapshots; made by vLLM from ``LoadConfig``."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.config = LoaderConfig.parse(load_config.model_loader_extra_config)
        self._placeholders: Placeholders | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the checkpoint when it is read; thawing needs its config and tokenizer only."""
        if self.config.mode != "thaw":
            self.source().download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """vLLM's own sequence (initialise on the device, load, post-process), with our ``load_weights`` in the middle.

        vLLM allocates parameters uninitialised, so nothing is written twice.
        """
        with noted(self.config.failures):
            model = self._loaded(vllm_config, model_config, prefix)
            compiled.prepare(vllm_config)
            return model

    def _loaded(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> torch.nn.Module:
        expected = self._expect()
        if self.config.mode == "auto" and (why := automatic.left_to_vllm(vllm_config, model_config)) is not None:
            return self._as_vllm(vllm_config, model_config, prefix, why)
        self._prepare(vllm_config, model_config)
        self._placeholders = Placeholders() if self.config.shared else None
        try:
            model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        finally:
            if self._placeholders is not None:
                self._placeholders.end()
                self._placeholders = None
            if expected is not None and not self.config.expects_kv:
                ahead.rest(expected)  # memory may not be unlocked while vLLM captures graphs, which is next
            given_back()  # nor unmapped
        note(model, vllm_config, self.config.asked)
        if self.config.offer and not automatic.is_draft(vllm_config, model_config):
            self._offer(model, vllm_config)
        return model

    def _offer(self, model: torch.nn.Module, vllm_config: VllmConfig) -> None:
        """An engine that cannot is as good otherwise."""
        try:
            offering.lend(model, vllm_config, engine_identity(vllm_config, vllm_config.model_config).parallel.rank)
        except (ThawError, OSError) as error:
            logger.warning("%s", error)

    def _as_vllm(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str, why: str) -> torch.nn.Module:
        global last_outcome
        if all(rank == 0 for rank, _ in parallel_groups().values()):
            logger.warning("vLLM loads %s itself: %s", model_config.model, why)
        if not automatic.is_draft(vllm_config, model_config):
            last_outcome = Outcome(automatic.LOADED, None, why)
            if self.config.offer:
                logger.warning("this engine's weights cannot be offered to others: vLLM loads them itself")
        model: torch.nn.Module = self.source().load_model(vllm_config, model_config, prefix)
        return model

    def _prepare(self, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
        if self.config.mode in ("thaw", "freeze") and automatic.is_draft(vllm_config, model_config):
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
        global last_report, last_outcome
        config, found = self.config, None
        if config.mode == "stream":
            last_report, last_outcome = self._stream(model, model_config), Outcome(automatic.LOADED)
            return
        if config.mode == "auto":
            last_report, found, last_outcome = automatic.load(self, model, get_current_vllm_config(), model_config)
        elif config.mode == "freeze" and (number := replica(get_current_vllm_config())):
            logger.info("replica 0 freezes the weights; this is replica %d, which has the same", number)
            self.source().load_weights(model, model_config)
            last_report, last_outcome = None, Outcome(automatic.LOADED)
        elif config.mode == "freeze":
            last_report, found = self._freeze(model, model_config, self._identity(model, model_config))
            last_outcome = Outcome(automatic.FROZEN, config.snapshot)
        elif self._placeholders is not None:
            identity = self._identity(model, model_config)
            last_report, found = self._place(model, model_config, identity, config.snapshot)
            last_outcome = Outcome(automatic.THAWED, config.snapshot)
        else:
            with Together(config.snapshot) as begin:
                identity = self._identity(model, model_config)
                last_report, found = self.thaw(model, model_config, identity, config.snapshot, begin)
            last_outcome = Outcome(automatic.THAWED, config.snapshot)
        model._thaw_model_id = found  # type: ignore[assignment]  # of this model, not of this process
        if config.expects_kv:
            ahead.expect(next(model.parameters()).device)

    def _identity(self, model: torch.nn.Module, model_config: ModelConfig) -> Identity:
        audit.refuse_unsound(model)
        return engine_identity(get_current_vllm_config(), model_config, model)

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors for vLLM's ``reload_weights``, as vLLM's own loader has them.

        No generator: vLLM puts the parameters on the meta device between this call and the first tensor, so what speaks
        against it has to be said here.

        Raises:
            ThawError: others use these weights; nothing was changed.
        """
        if self.config.shared:
            raise UnsupportedError("other engines use these weights, too; they cannot be loaded again in one of them")
        offering.withdraw(model)
        forget(model)  # a snapshot that the weights were thawed from is not what they are now
        found: Iterator[tuple[str, torch.Tensor]] = self.source().get_all_weights(model_config, model)
        return found

    def thaw(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        identity: Identity,
        snapshot: str,
        begin: Callable[[str | None], None],
    ) -> tuple[RestoreReport, str | None]:
        """Fill it from this rank's file of a snapshot; also gives the model id.

        Args:
            begin: called when the file has been found to be the right one, before anything is written, with what tells
                the set that it is of.
        """
        config, start = self.config, time.perf_counter()
        if (written := resharding.other_size(snapshot, identity.parallel)) is not None:
            return self._reshard(model, model_config, identity, snapshot, written, begin)
        targets, required = fillable(model)
        helped = self._helped(snapshot)

        def options(progress: Callable[[int, int], None] | None) -> RestoreOptions:
            return RestoreOptions(verify=config.verify, workers=config.workers, processes=helped, progress=progress)

        with (
            collection_paused(),
            progress_bar("thaw", first=identity.parallel.rank == 0) as progress,
            open_rank(snapshot, identity.parallel.rank) as opened,
            reading(opened.source, targets.values(), options(progress), self._kept(targets.values(), helped)) as way,
        ):
            header = self._checked(opened, model_config, identity, snapshot)
            checked = time.perf_counter()
            owners = audit.attribute_owners(model, header.attributes)
            match(opened.snapshot, targets, required, opened.source.name)
            begin(header.set_id or header.content)
            report = offering.restored(opened, targets, required, options(progress), way, config.peer)
            audit.apply_attributes(owners, header.attributes)
            names = frozenset(tensor.name for tensor in opened.snapshot.index.tensors)
            remember(model, snapshot, header, names, identity)
        seconds = {"open": checked - start} | report.seconds | {"total": time.perf_counter() - start}
        report = dataclasses.replace(report, seconds=seconds)
        logger.info(
            "thawed %d tensors, %.2f GB in %.2f s (%.2f GB/s, %s) from %s",
            report.tensors,
            report.bytes / 1e9,
            seconds["total"],
            report.gb_per_s,
            "not verified" if report.verified == "none" else "every chunk verified",
            snapshot,
        )
        logger.info("%s (%s)\n%s", report.route, report.why, report.waterfall())
        return report, header.identity.model

    def _reshard(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        identity: Identity,
        snapshot: str,
        written: int,
        begin: Callable[[str | None], None],
    ) -> tuple[RestoreReport, str | None]:
        """``thaw``, of a set that another number of tensor-parallel ranks has written."""
        config = self.config
        if config.peer and config.peer != AUTO:
            raise UsageError(
                f"a peer has the weights of a rank of {written}, this engine has {identity.parallel.tp_size} ranks; "
                "leave 'peer' out"
            )
        start = time.perf_counter()
        with collection_paused(), progress_bar("thaw", first=identity.parallel.rank == 0) as progress:
            options = RestoreOptions(
                verify=config.verify, workers=config.workers, processes=config.processes, progress=progress
            )
            report, found = resharding.thaw(
                model,
                identity,
                snapshot,
                written,
                options,
                self._kept(model.parameters(), config.processes),
                lambda opened, wanted: self._checked(opened, model_config, wanted, snapshot),
                begin,
            )
        logger.info(
            "thawed %d tensors, %.2f GB of the files of %d ranks, in %.2f s (%s) from %s",
            report.tensors,
            report.bytes / 1e9,
            written,
            time.perf_counter() - start,
            "every chunk verified" if config.verify else "not verified",
            snapshot,
        )
        return report, found

    def _expect(self) -> torch.device | None:
        """Have helpers and kernels come up while vLLM builds the model; on which GPU, if they do."""
        config = self.config
        if config.mode != "thaw" or config.shared:
            return None
        with contextlib.suppress(OSError):  # no file; who opens it says so
            if os.stat(config.snapshot).st_size >= WORTH and current_platform.is_cuda():
                device = torch.device("cuda", torch.cuda.current_device())
                if config.workers is None and self._helped(config.snapshot):
                    ahead.expect(device)
                elif config.peer and not remote(config.peer):
                    ahead.expect_peer(device)  # should the peer have gone by then, helpers will read the file
                else:
                    return None
                return device
        return None

    def _kept(self, targets: Iterable[torch.Tensor], helped: bool) -> KeptHelpers | None:
        return ahead.ready(targets) if helped and self.config.workers is None else None

    def _helped(self, snapshot: str) -> bool:
        """Whether helper processes may read it."""
        return self.config.processes and not offering.expected(self.config.peer, snapshot)

    def _place(
        self, model: torch.nn.Module, model_config: ModelConfig, identity: Identity, snapshot: str
    ) -> tuple[RestoreReport, str | None]:
        """``thaw``, of weights that another process holds."""
        assert self._placeholders is not None
        self._placeholders.end()
        require_shareable(model, get_current_vllm_config())
        with open_rank(snapshot, identity.parallel.rank, with_chunks=False) as opened:
            header = self._checked(opened, model_config, identity, snapshot)
            owners = audit.attribute_owners(model, header.attributes)
            report = place(model, opened, self.config.shared, self._placeholders)
            audit.apply_attributes(owners, header.attributes)
        logger.info(
            "mapped %d tensors, %.2f GB of another process, in %.2f s; they are those of %s",
            report.tensors,
            report.bytes / 1e9,
            report.seconds["total"],
            snapshot,
        )
        return report, header.identity.model

    def _checked(self, opened: Opened, model_config: ModelConfig, identity: Identity, snapshot: str) -> Header:
        """The header of a snapshot that is the right one for this engine and this model directory."""
        header = opened.snapshot.header
        require(header.identity, identity, snapshot)
        _warn_version(header.identity, identity)
        directory = self.directory(model_config)
        if self.config.check_source and directory is not None:
            check_source(header.source, header.identity.model, directory, snapshot)
        return header

    def _freeze(
        self, model: torch.nn.Module, model_config: ModelConfig, identity: Identity
    ) -> tuple[FreezeReport, str | None]:
        config, directory = self.config, self.directory(model_config)
        checkpoint = source_checkpoint(directory, config.source_format)
        freezing = Freezing(model, model_config, identity, directory, checkpoint)
        self.source().load_weights(model, model_config)
        freezing.prepare()
        report = freezing.write(config.snapshot, force=config.force, workers=config.workers, compress=config.compress)
        return report, report.model

    def _stream(self, model: torch.nn.Module, model_config: ModelConfig) -> StreamReport | None:
        directory = self.directory(model_config)
        found = streaming.suited(model, model_config, directory)
        if isinstance(found, str):
            logger.warning("vLLM's own loader reads the checkpoint: %s", found)
            self.source().load_weights(model, model_config)
            return None
        with progress_bar("stream", first=all(rank == 0 for rank, _ in parallel_groups().values())) as progress:
            return streaming.load(model, model_config, found, self.config.workers, progress)

    def directory(self, model_config: ModelConfig) -> Path | None:
        """Where the model's files are; None where they are not here."""
        return model_directory(model_config, self.load_config.download_dir)

    def source(self) -> Any:
        """vLLM's own loader for the checkpoint."""
        return get_model_loader(
            dataclasses.replace(
                self.load_config,
                load_format=self.config.source_format,
                model_loader_extra_config=dict(self.config.source_config),
            )
        )


def _texts(given: dict[str, Any], *names: str) -> bool:
    return all(isinstance(given.get(name, ""), str) for name in names)


def _warn_version(found: Identity, wanted: Identity) -> None:
    ours, theirs = (str(i.engine_version).split(".")[:2] for i in (found, wanted))
    if ours != theirs:
        logger.warning(
            "the snapshot was frozen by vLLM %s, this is %s; every tensor's name, shape and dtype is checked, but "
            "freeze again if loading changed between them",
            found.engine_version,
            wanted.engine_version,
        )
