"""What each process of a vLLM start was doing when, written as it happens; off unless ``THAW_START_REPORT`` says where.

The variable names a directory. Each process appends one JSON line an event to a file of its own there, and
``start_report`` reads them. Times are seconds of the clock that the kernel's process start times are given in, so that
the beginning of a process needs nobody to be there, and processes of one machine can be compared.

An event: ``pid``, ``parent``, ``name`` (as multiprocessing has it), ``created``, ``phase``, ``begin``, ``end``. A
process that was forked also notes which modules it has imported since then, in ``PID.imported.json``: ``created`` and
``modules``. It could have had them from the process that it is a fork of. A worker that compiles notes in
``PID.compiled.json`` what it found compiled. ``caches.json`` says what became of a file of caches.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

VARIABLE = "THAW_START_REPORT"
IMPORTED = ".imported.json"
"""After its pid, the name of the file with what a process has imported."""
COMPILED = ".compiled.json"
"""Likewise, with what a worker has found of compiled code, and compiled itself (``compiled.report``)."""
_COMPILING = {"compile", "warm-up", "kernel warm-up", "graphs"}
"""Phases within which something may be compiled; after the last of them a start is over."""
_MARK = "_thaw_start"
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(_CLOCK)


def created() -> float | None:
    """When the kernel made this process, rounded down to its tick (10 ms); None where it does not say."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        found = ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return found if 0 < found <= now() else None


def interpreter_began() -> float:
    """When this process, or the one it was forked from, imported ``logging``, which is among Python's first imports."""
    record = logging.makeLogRecord({})
    return now() - (time.time() - record.created) - record.relativeCreated / 1000


class Recorder:
    """Writes events of the process that uses it, also when that was forked meanwhile.

    Never raises: what cannot be written ends it, with one warning.

    Attributes:
        done: whether the first tokens have come, or writing failed; nothing is written any more.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self._here()

    def _here(self) -> None:
        """Write for the process that this runs in, of which nothing has been written."""
        self.done = False
        self._pid, self._parent, self._created = os.getpid(), os.getppid(), created()
        self._seen: set[str] = set()
        self._plugin: float | None = None
        self._inherited: set[str] | None = None  # modules; None of a process that was not forked
        self._imported = 0
        self._request: float | None = None

    def begin(self) -> None:
        """The plugin is loaded: write what came before."""
        at = self._plugin = now()
        python = interpreter_began()
        if self._created is None:
            self._created = python
        elif python < self._created - 0.05:  # another process's, from which this one was forked
            python = at
            self._inherited = set(sys.modules)
        elif python < self._created:  # by less than a tick
            python = self._created
        self.span("process", self._created, python)
        if python < at:
            self.span("imports", python, at)

    def enter(self) -> float:
        """The time at which something begins; a process that was forked is noticed here."""
        global _at_fork
        at = now()
        if os.getpid() != self._pid:
            self._here()
            self._inherited, _at_fork = _at_fork or set(sys.modules), None
            self._created = at if self._created is None else self._created
            self.span("process", self._created, at)
        return at

    def span(self, phase: str, begin: float, end: float | None = None) -> None:
        """A phase that has ended."""
        if self.done or os.getpid() != self._pid:
            return
        self._seen.add(phase)
        event = {
            "pid": self._pid,
            "parent": self._parent,
            "name": multiprocessing.current_process().name,
            "created": self._created,
            "phase": phase,
            "begin": begin,
            "end": now() if end is None else end,
        }
        try:
            os.makedirs(self.directory, exist_ok=True)
            path = os.path.join(self.directory, f"{self._pid}.jsonl")
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                os.write(file, json.dumps(event).encode() + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            self.done = True
            _say(error)
        else:
            with contextlib.suppress(Exception):  # the less important parts
                self._note_imports()
            with contextlib.suppress(Exception):
                self._note_compiled(phase)

    def _note_imports(self) -> None:
        if self._inherited is None:
            return
        found = [name for name in list(sys.modules) if name not in self._inherited]
        if len(found) == self._imported:
            return
        self._imported = len(found)
        self._replace(IMPORTED, {"created": self._created, "modules": found})

    def _note_compiled(self, phase: str) -> None:
        module = sys.modules.get(f"{__package__}.compiled")
        if module is not None and phase in _COMPILING and (found := module.report()) is not None:
            self._replace(COMPILED, {"created": self._created, **found})

    def _replace(self, ending: str, document: dict[str, Any]) -> None:
        handle, part = tempfile.mkstemp(prefix=".report.", dir=self.directory)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(document))
        os.replace(part, os.path.join(self.directory, f"{self._pid}{ending}"))

    def under_way(self, phase: str, end: float) -> None:
        """A phase in which the plugin was loaded, and which nobody could see begin."""
        if phase not in self._seen and self._plugin is not None:
            self.span(phase, self._plugin, end)

    def request(self, at: float) -> None:
        """One has come."""
        if self._request is None:
            self._request = at

    def tokens(self) -> None:
        """The first have come."""
        if self._request is not None:
            self.span("first token", self._request)
        self.done = True


_recorder: Recorder | None = None
_at_fork: set[str] | None = None
"""Modules of this process when it was forked, until its first phase."""


def _note_fork() -> None:
    global _at_fork
    _at_fork = set(sys.modules)


def begin() -> None:
    """Call first of all when the plugin is loaded; without the variable, and a second time, does nothing."""
    global _recorder
    directory = os.environ.get(VARIABLE)
    if not directory or _recorder is not None:
        return
    try:
        _recorder = Recorder(directory)
        _recorder.begin()
        os.register_at_fork(after_in_child=_note_fork)
    except Exception as error:  # a start must not fail for being looked at
        _say(error)


def plugin_loaded() -> None:
    """Call last of all when the plugin is loaded."""
    if _recorder is not None:
        install(_recorder)
        _recorder.under_way("plugin", now())


def _say(error: Exception) -> None:
    logging.getLogger(__name__).warning("%s: no report of this start is written: %s", VARIABLE, error)


def install(recorder: Recorder) -> None:
    """Look on from now at whatever of vLLM this process has imported; a second call adds what has come since.

    Never raises: what cannot be looked at is left out, with a warning.
    """
    try:
        _install(recorder)
    except Exception as error:
        _say(error)


def _install(recorder: Recorder) -> None:
    from . import versions

    makers = {
        versions.SPAN: _timed,
        versions.CONTEXT: _timed_context,
        versions.DEVICE: _device,
        versions.LOADING: _loading,
        versions.REQUEST: _request,
        versions.STEP: _step,
        versions.READY: _ready,
    }
    for kind, phase, owner, name in versions.start_hooks():
        real = vars(owner)[name]
        function = real.__func__ if isinstance(real, staticmethod) else real
        if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
            continue
        if hasattr(function, _MARK) or getattr(function, "__isabstractmethod__", False):
            continue
        made = functools.wraps(function)(makers[kind](recorder, phase, function))
        setattr(made, _MARK, True)
        setattr(owner, name, staticmethod(made) if isinstance(real, staticmethod) else made)


def _timed(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        begun = recorder.enter()
        try:
            return real(*args, **kwargs)
        finally:
            recorder.span(phase, begun)

    return call


def _timed_context(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        begun = recorder.enter()
        try:
            with real(*args, **kwargs) as given:
                yield given
        finally:
            recorder.span(phase, begun)

    return call


def _device(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    timed = _loading(recorder, phase, real)

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.under_way("worker init", recorder.enter())
        install(recorder)
        return timed(*args, **kwargs)

    return call


def _loading(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    timed = _timed(recorder, phase, real)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return timed(*args, **kwargs)
        finally:
            install(recorder)

    return call


def _request(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.request(recorder.enter())
        return real(*args, **kwargs)

    return call


def _step(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    from .versions import gave_tokens

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = real(*args, **kwargs)
        if not recorder.done:
            with contextlib.suppress(Exception):  # another shape of answer: no first token, but a step as ever
                if gave_tokens(outputs):
                    recorder.tokens()
        return outputs

    return call


def _ready(recorder: Recorder, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.under_way(phase, recorder.enter())
        return real(*args, **kwargs)

    return call
