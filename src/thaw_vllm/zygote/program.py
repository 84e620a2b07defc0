"""The last steps from a fork of a zygote to a process that is as if the user had started it."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import importlib.machinery
import io
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from multiprocessing import process
from typing import Any

from ..errors import UsageError

STREAMS = ("stdin", "stdout", "stderr")
FLAGS: dict[str, list[str]] = {"script": [], "module": ["-m"], "code": ["-c"]}
"""What can be run, and how python is told so."""


def described(arguments: list[str], kind: str, *, detached: bool) -> tuple[dict[str, Any], list[int]]:
    """This process's own circumstances, for a program that shall have the same, and the files that go with them.

    Args:
        arguments: the script's path, the module's name or the code, and the program's arguments.
        kind: of FLAGS.
    """
    files, streams = [], []
    for number, name in enumerate(STREAMS):
        if getattr(sys, f"__{name}__") is not None:  # where it is, its number may be that of another file by now
            files.append(number)
            streams.append(name)
    files.append(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    umask = os.umask(0)
    os.umask(umask)
    ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN and s != signal.SIGPIPE]
    return {
        "do": "run",
        "python": python(),
        "kind": kind,
        "arguments": arguments,
        "detached": detached,
        "environment": dict(os.environ),
        "streams": streams,
        "umask": umask,
        "ignored": ignored,
        "affinity": sorted(os.sched_getaffinity(0)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _limits()},
    }, files


def python() -> list[str]:
    """Which installation this is: its directory, a virtual environment's for one, and version."""
    return [sys.prefix, sys.version]


def _limits() -> list[str]:
    return [name for name in dir(resource) if name.startswith("RLIMIT_")]


def check(request: dict[str, Any]) -> None:
    """Refuse a request that is not one of ``described``'s.

    Raises:
        UsageError: it says what is missing; the other side is probably another version of thaw.
    """
    kinds: dict[str, Any] = {
        "python": list,
        "kind": str,
        "arguments": list,
        "detached": bool,
        "environment": dict,
        "streams": list,
        "umask": int,
        "ignored": list,
        "affinity": list,
        "nice": int,
        "limits": dict,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(request.get(name), kind)]
    unknown = wrong or any(name not in STREAMS for name in request["streams"])
    if unknown or request["kind"] not in FLAGS or not request["arguments"]:
        raise UsageError(f"a request without {wrong[0] if wrong else 'a program'}; is thaw of another version there?")


class Program:
    """A program that waits to be run in this process.

    Args:
        request: of ``described``.
        files: the descriptors that came with it, which this owns.
        ready: called when the environment is the program's, before its first line.
    """

    def __init__(self, request: dict[str, Any], files: list[int], ready: Callable[[], None]) -> None:
        self._request = request
        self._files = files
        self._ready = ready
        self._code: int | None = None

    def run(self) -> None:
        """Run it as the interpreter would; what it raises is raised."""
        request = self._request
        self._take_place()
        self._take_streams()
        _renew_randomness()
        kind, arguments = request["kind"], request["arguments"]
        main = types.ModuleType("__main__")
        vars(main).update(__annotations__={}, __builtins__=builtins, __loader__=importlib.machinery.BuiltinImporter)
        sys.orig_argv = [sys.executable, *FLAGS[kind], *arguments]
        self._old_main = sys.modules["__main__"]  # the interpreter still runs it, and has no reference of its own
        sys.modules["__main__"] = main
        self._ready()
        try:
            _RUN[kind](main, list(arguments))
            self._code = 0
        except SystemExit as error:
            self._code = _exit_code(error.code)
            raise
        except KeyboardInterrupt:
            _hide_own_lines()  # no code: the interpreter ends itself by SIGINT
            raise
        except BaseException:
            _hide_own_lines()
            self._code = 1
            raise

    def finish(self) -> None:
        """Call last of all that is called at the interpreter's exit: leave, where nothing is left to be seen.

        What would follow is the interpreter taking apart all that the zygote imported: a second, and each page of
        memory copied for it.
        """
        if self._code is None:
            gc.unfreeze()  # it is collected now, like what the program made
            return
        if threading.active_count() == 1:
            vars(sys.modules["__main__"]).clear()  # what is collected now may have something to write, or to remove
            gc.collect()
        with contextlib.suppress(OSError, ValueError):
            _flush()
            os._exit(self._code & 0xFF)
        gc.unfreeze()  # a standard stream takes no more, which the interpreter has its own words and exit code for

    def _take_place(self) -> None:
        request = self._request
        os.environ.clear()
        os.environ.update(request["environment"])
        time.tzset()
        tempfile.tempdir = None
        os.umask(request["umask"])
        for name, limits in request["limits"].items():
            with contextlib.suppress(OSError, ValueError, AttributeError):
                _limit(getattr(resource, name), *limits)
        with contextlib.suppress(OSError, ValueError):
            os.sched_setaffinity(0, request["affinity"])
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP
                if number == signal.SIGINT:
                    signal.signal(number, signal.default_int_handler)
                elif number != signal.SIGPIPE:
                    signal.signal(number, signal.SIG_DFL)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _take_streams(self) -> None:
        *streams, directory = self._files
        given = dict(zip(self._request["streams"], streams, strict=True))
        os.fchdir(directory)
        with contextlib.suppress(OSError):  # a directory that was removed
            vars(process)["ORIGINAL_DIR"] = os.getcwd()
        for number, name in enumerate(STREAMS):
            if name in given:
                os.dup2(given[name], number)
            else:
                with contextlib.suppress(OSError):
                    os.close(number)
            stream = _stream(number) if name in given else None
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        for file in self._files:
            if file > 2:
                os.close(file)


def _limit(what: int, soft: int, hard: int) -> None:
    """Set a limit, as far as this process may: a hard one is not raised."""
    own = resource.getrlimit(what)[1]
    hard = own if _beyond(hard, own) else hard
    resource.setrlimit(what, (hard if _beyond(soft, hard) else soft, hard))


def _beyond(one: int, other: int) -> bool:
    if other == resource.RLIM_INFINITY:
        return False
    return one == resource.RLIM_INFINITY or one > other


def _stream(number: int) -> io.TextIOWrapper:
    """A standard stream as the interpreter makes it, with the encoding that this one had."""
    old = getattr(sys, f"__{STREAMS[number]}__")
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(number, "wb" if number else "rb", closefd=False)
    raw.name = f"<{STREAMS[number]}>"
    buffered = io.BufferedReader(raw) if not number else raw if unbuffered else io.BufferedWriter(raw)
    made = io.TextIOWrapper(
        buffered,
        encoding=old.encoding if old is not None else "utf-8",
        errors=old.errors if old is not None else "backslashreplace" if number == 2 else "strict",
        newline="\n",
        line_buffering=not unbuffered and (number == 2 or raw.isatty()),
        write_through=unbuffered,
    )
    made.mode = "w" if number else "r"  # type: ignore[misc]
    return made


def _exit_code(code: object) -> int:
    """Of what SystemExit was raised with; anything but a number has been printed."""
    return 0 if code is None else code if isinstance(code, int) else 1


def _flush() -> None:
    """What the end of an interpreter writes: files that nobody has closed, text before the bytes below it."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if stream is not None:
            stream.flush()
    opened = gc.get_objects()  # those that came after the zygote's
    for kind in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
        for file in opened:
            if isinstance(file, kind):
                with contextlib.suppress(OSError, ValueError):
                    file.flush()
    ctypes.CDLL(None).fflush(None)


def _renew_randomness() -> None:
    """What a fresh process draws from the system: Python's own generator has done so when it was forked."""
    process.current_process().authkey = os.urandom(32)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _search_first(directory: str) -> None:
    """Where the interpreter looks for modules first, unless it was told not to (PYTHONSAFEPATH)."""
    if not getattr(sys.flags, "safe_path", False):  # from 3.11 on
        sys.path.insert(0, directory)


def _run_script(main: types.ModuleType, arguments: list[str]) -> None:
    path = arguments[0]
    sys.argv = arguments
    _search_first(os.path.dirname(os.path.realpath(path)))
    main.__file__ = os.path.join(os.getcwd(), path)
    vars(main).update(__cached__=None, __loader__=importlib.machinery.SourceFileLoader("__main__", main.__file__))
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, main.__file__, "exec", dont_inherit=True), main.__dict__)


def _run_module(main: types.ModuleType, arguments: list[str]) -> None:
    sys.argv = ["-m", *arguments[1:]]
    _search_first(os.getcwd())
    runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]  # what the interpreter calls for -m


def _run_code(main: types.ModuleType, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments[1:]]
    _search_first("")
    exec(compile(arguments[0], "<string>", "exec", dont_inherit=True), main.__dict__)


_RUN = {"script": _run_script, "module": _run_module, "code": _run_code}


def _hide_own_lines() -> None:
    """Have the traceback of what is raised now begin with the program's own lines."""
    shown = sys.excepthook
    own = os.path.dirname(__file__) + os.sep

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        rest = at = trace
        while at is not None:
            if at.tb_frame.f_code.co_filename.startswith(own):
                rest = at.tb_next
            at = at.tb_next
        shown(kind, error.with_traceback(rest), rest)

    sys.excepthook = hook
