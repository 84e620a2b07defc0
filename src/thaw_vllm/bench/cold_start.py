"""``thaw bench cold-start``: vLLM from process start to its first token, by loader, each in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..caches import places
from ..engines.vllm import fresh, one_server, start_page, start_report, startup
from ..engines.vllm.api import check_sizes
from ..engines.vllm.fast_start import cache_variables, fast_start, has_gpu
from ..errors import StorageError, ThawError, UsageError
from ..zygote.client import ask
from ..zygote.place import place
from ..zygote.start import start
from .new_machine import NewMachine
from .outcome import Missed, Outcome, Say
from .record import RUN
from .start_records import records

EAGER, GRAPHS = "start-eager", "start-graphs"
SERVER, HEALTHY, HEALTHY_CPU = "server", "server-healthy", "server-healthy-cpu"
MODES = {"eager": EAGER, "graphs": GRAPHS, SERVER: HEALTHY}
"""What is started: an engine in a program, until its first token; or vLLM's server, eager, until it is healthy."""
NEW = "start-new-machine"
WARM, COLD, FILE = "warm", "cold", "file"
DEFAULT, SNAPSHOT, STREAMED = "default-loader", "snapshot", "checkpoint"
FORKED, FAST, UNPACKED = "-zygote", "-fast-start", "-nothing-compiled"
"""End the routes of starts in forks of a zygote, of those with the preset of ``thaw serve --fast-start``, and of those
whose caches are packed for others."""
ZYGOTE = f"bench-{os.getpid()}"
DEFAULTS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Of starts, unless the caller has others. GiB, without a GPU only: nearly all of the memory otherwise."""
FORMATS = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai_streamer": "runai-model-streamer",
}
"""vLLM's own load formats → the distribution that each needs."""
QUESTIONS: list[Any] = [list(range(5, 200)), [11, 12, 13]]
"""Token ids: a model of random weights needs no tokenizer and no chat template."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a model directory.
        snapshot: of it, for vLLM; None to leave that line out.
        modes: of MODES.
        loaders: of ``loaders``' names, empty for all.
        runs: fresh processes each loader gets in each mode.
        engine_args: further ones of vLLM.
        max_tokens: of each answer.
        caches: WARM: of compiled and tuned kernels, as they are; COLD: empty ones for every start; FILE: empty but for
            what a file of caches brings, which is packed first.
        reports: a directory for the report of every start, as JSON and as a page, and what vLLM printed; None to keep
            none.
        zygote: also start by each loader of thaw's and vllm's own in forks of a zygote that is started for it.
        fast_start: also start each of these with the preset.
    """

    model: Path
    snapshot: Path | None
    modes: tuple[str, ...]
    loaders: tuple[str, ...]
    runs: int
    engine_args: dict[str, Any]
    max_tokens: int = 16
    caches: str = WARM
    reports: Path | None = None
    zygote: bool = False
    fast_start: bool = False


@dataclass(frozen=True)
class Loader:
    """One way of getting the weights.

    Attributes:
        system: ``vllm`` for its default loader, ``thaw``, or the rival's distribution.
        route: DEFAULT, SNAPSHOT, STREAMED or vLLM's load format.
        engine_args: that choose it.
        snapshot: for ``fresh.run``.
        forked: whether the process is a fork of the zygote.
        fast: whether it is started with the preset.
    """

    system: str
    route: str
    engine_args: dict[str, Any]
    snapshot: Path | None = None
    forked: bool = False
    fast: bool = False

    @property
    def zygote(self) -> str | None:
        """The name of the one that is forked."""
        return ZYGOTE if self.forked else None


def measure(settings: Settings, say: Say) -> Outcome:
    """Every loader in every mode; a loader that fails is a line, the others go on.

    A record's ``phases`` are those of the starts' reports, ``asked`` what the asking process itself has measured. After
    an interruption (Ctrl-C, SIGTERM) there is what was measured until then.

    Raises:
        StorageError: there is no such model or snapshot; reports cannot be kept where they should.
        FormatError, MismatchError: it is no snapshot for vLLM.
        UsageError: an unknown loader.
    """
    size = _weights(settings.model)
    if settings.snapshot is not None and not settings.snapshot.is_file():
        raise StorageError(
            f"there is no snapshot {str(settings.snapshot)!r}; make it: "
            f"thaw freeze --model {settings.model} --output {settings.snapshot}"
        )
    if settings.snapshot is not None:
        check_sizes(os.path.abspath(settings.snapshot), settings.engine_args)
    elif SNAPSHOT in settings.loaders:
        raise UsageError(f"the loader {SNAPSHOT!r} needs --snapshot FILE, made by thaw freeze")
    chosen = [loader for loader in loaders(settings) if not settings.loaders or loader.route in settings.loaders]
    unknown = sorted(set(settings.loaders) - {loader.route for loader in loaders(settings)})
    if unknown:
        for ending, given in ((FORKED, settings.zygote), (FAST, settings.fast_start)):
            if ending in unknown[0] and not given:
                raise UsageError(f"the loader {unknown[0]!r} needs -{ending}")
        raise UsageError(
            f"there is no loader {unknown[0]!r}; there are {', '.join(x.route for x in loaders(settings))}"
        )
    if settings.fast_start and not has_gpu(os.environ):
        raise UsageError("--fast-start changes nothing without a GPU; leave it out")
    if settings.zygote and settings.caches == COLD:
        raise UsageError("a zygote has read where caches are; leave out --zygote or --caches cold")
    if settings.caches == FILE:
        if settings.modes != ("graphs",):
            raise UsageError("--caches file measures --mode graphs alone: what is compiled otherwise is little")
        chosen = [loader for loader in chosen if loader.route not in FORMATS and not loader.route.startswith(DEFAULT)]
        if not chosen:
            raise UsageError("--caches file is for thaw's loaders, snapshot and checkpoint")
        set_here = [name for name in places.UNSET if name in os.environ]
        if settings.zygote and set_here:
            raise UsageError(f"a zygote would find compiled kernels by {set_here[0]}; unset it")
    if settings.reports is not None:
        with _kept(settings.reports):
            settings.reports.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    with _until_terminated(), tempfile.TemporaryDirectory(prefix="thaw-new-", ignore_cleanup_errors=True) as folder:
        machine = NewMachine(Path(folder)) if settings.caches == FILE else None
        try:
            _measure(outcome, settings, chosen, size, machine, say)
        except KeyboardInterrupt:
            outcome.interrupted = True
    return outcome


def _measure(
    outcome: Outcome,
    settings: Settings,
    chosen: Sequence[Loader],
    size: int,
    machine: NewMachine | None,
    say: Say,
) -> None:
    """Add to an outcome, which has what was measured until an interruption."""
    if machine is not None:
        for fast in sorted({loader.fast for loader in chosen}):
            outcome += _pack(fast, settings, chosen, size, machine, say)
        chosen = [loader for loader in chosen if loader.fast in machine.packed]
    with _zygote(settings, machine, say):
        for mode in settings.modes:
            outcome += _mode(mode, chosen, size, settings, machine, say)
            if outcome.interrupted:
                break


def _pack(
    fast: bool, settings: Settings, chosen: Sequence[Loader], size: int, machine: NewMachine, say: Say
) -> Outcome:
    """A start with empty caches, of one kind of compiled code, which is what a file spares."""
    outcome = Outcome()
    thawing = any(loader.snapshot is not None for loader in chosen)
    loader = Loader("thaw", (SNAPSHOT if thawing else STREAMED) + FAST * fast + UNPACKED, {}, fast=fast)
    args = {"enforce_eager": False} | settings.engine_args
    snapshot = settings.snapshot if thawing else None
    try:
        packed = machine.pack(settings.model, snapshot, args, QUESTIONS, settings.max_tokens, fast)
    except (ThawError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        outcome.missed.append(Missed(NEW, loader.system, loader.route, why))
        say(f"{NEW}, {loader.route}: {why}")
        return outcome
    files = len(packed.manifest.members)
    say(f"{NEW}, {loader.route}: {packed.seconds:.1f} s; {files} files packed, {packed.size / 1e6:.1f} MB")
    answers = [packed.answer or {}]
    extra = {"packed_bytes": packed.size, "files": files, "unpacked_bytes": packed.manifest.size}
    for record in records(NEW, loader, answers, size, settings, answers[0]["outputs"], itself=True):
        outcome.records.append(replace(record, extra=record.extra | extra))
    return outcome


@contextlib.contextmanager
def _until_terminated() -> Iterator[None]:
    """SIGTERM, which ``timeout`` sends, ends a measurement as Ctrl-C does: what was started for it is ended, too.

    Once: the next one does not keep it from that.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _zygote(settings: Settings, machine: NewMachine | None, say: Say) -> Iterator[None]:
    """One for the measurement's own use, in its own environment."""
    if not settings.zygote:
        yield
        return
    where = place(ZYGOTE)
    begun = time.perf_counter()
    variables = fresh.READ_FROM_THE_LOG | _defaults() | ({} if machine is None else machine.variables)
    start(where, imports=[], models=[os.path.abspath(settings.model)], environment=variables)
    try:
        say(f"zygote: ready after {time.perf_counter() - begun:.1f} s")
        yield
    finally:
        with contextlib.suppress(ThawError):
            ask(where, "stop")
        for path in (where.log, where.lock):
            path.unlink(missing_ok=True)


def _defaults() -> dict[str, str]:
    return {name: value for name, value in DEFAULTS.items() if name not in os.environ}


def loaders(settings: Settings) -> list[Loader]:
    """In the order of their first round."""
    found = [Loader("vllm", DEFAULT, {})]
    if settings.snapshot is not None:
        found.append(Loader("thaw", SNAPSHOT, {}, settings.snapshot))
    found.append(Loader("thaw", STREAMED, {"load_format": "thaw"}))
    forked = [replace(loader, system="thaw", route=loader.route + FORKED, forked=True) for loader in found]
    found += forked if settings.zygote else []
    found += [replace(x, system="thaw", route=x.route + FAST, fast=True) for x in found] if settings.fast_start else []
    return found + [Loader(package, name, {"load_format": name}) for name, package in FORMATS.items()]


def _mode(
    mode: str, chosen: Sequence[Loader], size: int, settings: Settings, machine: NewMachine | None, say: Say
) -> Outcome:
    outcome, work = Outcome(), MODES[mode] + ("-cold" if settings.caches == COLD else "")
    work = work if machine is None else NEW
    if mode == SERVER and not has_gpu(os.environ):
        work = work.replace(HEALTHY, HEALTHY_CPU)
    found: dict[str, list[dict[str, Any]]] = {loader.route: [] for loader in chosen}
    failed: dict[str, str] = {}
    try:
        if settings.caches == WARM and _compiles(mode):
            _compile(work, mode, chosen, failed, settings, say)
        for number in range(settings.runs):
            shift = number % max(1, len(chosen))
            for loader in [*chosen[shift:], *chosen[:shift]]:
                if loader.route in failed:
                    continue
                answer = _start(loader, mode, settings, _name(work, loader, number + 1), machine)
                if isinstance(answer, str):
                    failed[loader.route] = answer
                else:
                    found[loader.route].append(answer)
                who = f"{loader.system} ({loader.route})"
                say(f"{work}, round {number + 1} of {settings.runs}, {who}: {_told(answer)}")
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.missed += [Missed(work, x.system, x.route, failed[x.route]) for x in chosen if x.route in failed]
    answered = [loader for loader in chosen if found[loader.route]]
    for loader in answered:
        if machine is None:
            held = _held_against(loader, answered)
            reference = found[held.route][0]["outputs"]
            itself = held == loader and not loader.route.startswith(DEFAULT)
        else:
            reference, itself = (machine.packed[loader.fast].answer or {})["outputs"], False
        outcome.records += records(work, loader, found[loader.route], size, settings, reference, itself=itself)
    return outcome


def _held_against(loader: Loader, answered: Sequence[Loader]) -> Loader:
    """Whose outputs this loader's should equal: vLLM's own if it answered, or else the first one's.

    Of those with the preset if this loader is started with it, and of those without if it is not: graphs of other sizes
    are other compiled code, which may round differently.
    """
    alike = [one for one in answered if one.fast == loader.fast]
    return next((one for one in alike if one.route.startswith(DEFAULT)), alike[0])


def _name(work: str, loader: Loader, number: int) -> str:
    """Of what is kept of a start; number 0 is one that was not counted."""
    return f"{RUN}-{work}-{loader.route}-{number}"


def _told(answer: dict[str, Any] | str) -> str:
    return answer if isinstance(answer, str) else f"{answer['seconds']['total']:.1f} s"


def _compiles(mode: str) -> bool:
    """Whether the first start of this kind on a machine takes longer than others: kernels are compiled, and kept."""
    return mode == "graphs" or has_gpu(os.environ)


def _compile(
    work: str, mode: str, chosen: Sequence[Loader], failed: dict[str, str], settings: Settings, say: Say
) -> None:
    """One start of each kind of kernels, the preset's and the usual ones, by the loader that is started soonest.

    Args:
        failed: route → why, of loaders that cannot be started; those found on the way are added.
    """
    compiled: set[bool] = set()
    for loader in sorted(chosen, key=lambda loader: not loader.forked):
        if loader.fast in compiled:
            continue
        answer = _start(loader, mode, settings, _name(work, loader, 0))
        say(f"{work}, not counted, so that kernels are compiled, {loader.system} ({loader.route}): {_told(answer)}")
        if isinstance(answer, str):
            failed[loader.route] = answer
        else:
            compiled.add(loader.fast)


def _start(
    loader: Loader, mode: str, settings: Settings, name: str, machine: NewMachine | None = None
) -> dict[str, Any] | str:
    """The answer, with the ``report`` of the start where there is one; or why there is none."""
    package = FORMATS.get(loader.route)
    if package is not None:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"not installed: pip install {package}"
    args = {"enforce_eager": mode != "graphs"} | settings.engine_args | loader.engine_args
    with tempfile.TemporaryDirectory(prefix="thaw-", ignore_cleanup_errors=True) as folder:
        environment = _defaults()
        if settings.caches == COLD:
            environment |= cache_variables(folder)
        if machine is not None:
            machine.empty()
            environment |= machine.variables
        if loader.fast:
            preset = fast_start(args, os.environ)
            args |= preset.engine_args
            environment |= preset.environment
        log = Path(folder, "log.txt")
        if settings.reports is not None:
            log = settings.reports / f"{name}.log"
            with _kept(settings.reports):
                log.touch()
        if mode == SERVER:
            return _serve(loader, args, settings, environment, log)
        environment[startup.VARIABLE] = os.path.join(folder, "start")
        try:
            answer = fresh.run(
                "ask",
                model=str(settings.model),
                snapshot=loader.snapshot,
                engine_args=args,
                questions=QUESTIONS,
                max_tokens=settings.max_tokens,
                environment=environment,
                zygote=loader.zygote,
                log=log,
                removed=[] if machine is None else places.UNSET,
                caches=None if machine is None else machine.file(loader.fast),
            )
        except (ThawError, OSError) as error:
            return " ".join(str(error).split())[:300]
        try:
            answer["report"] = start_report.read(environment[startup.VARIABLE])
        except ThawError:  # the start itself was measured all the same
            return answer
    if settings.reports is not None:
        _keep(answer["report"], settings.reports, name)
    return answer


def _serve(
    loader: Loader, args: dict[str, Any], settings: Settings, environment: dict[str, str], log: Path
) -> dict[str, Any] | str:
    """As ``_start``, of a server."""
    if loader.snapshot is not None:
        extra = {"snapshot": os.path.abspath(loader.snapshot)}
        args = args | {"load_format": "thaw", "model_loader_extra_config": extra}
    try:
        return one_server.run(
            model=str(settings.model),
            engine_args=args,
            question=QUESTIONS[0],
            max_tokens=settings.max_tokens,
            environment=fresh.READ_FROM_THE_LOG | environment,
            zygote=loader.zygote,
            log=log,
        )
    except (ThawError, OSError) as error:
        return " ".join(str(error).split())[:300]


def _keep(report: start_report.StartReport, directory: Path, name: str) -> None:
    with _kept(directory):
        (directory / f"{name}.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
    start_page.write(report, directory / f"{name}.html")


@contextlib.contextmanager
def _kept(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {str(directory)!r}: {error.strerror}; give another --reports") from None


def _weights(model: Path) -> int:
    """Bytes of the checkpoint's weight files.

    Raises:
        StorageError: it is no directory, or has none.
    """
    if not model.is_dir():
        raise StorageError(f"there is no model directory {str(model)!r}")
    size = sum(os.path.getsize(path) for path in model.glob("*.safetensors"))
    if not size:
        raise StorageError(f"{str(model)!r} has no *.safetensors files to load")
    return size
