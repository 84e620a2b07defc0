"""The zygote: takes programs over its socket, proves before each that a fork is sound, and forks."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import MismatchError, StorageError, ThawError, UnsupportedError, UsageError
from . import keeper, messages, processes, proof, sources
from .environment import Reads
from .memory import resident
from .place import Place, make
from .program import Program, check, python

_PATIENCE = 5.0
"""Seconds for a client to say what it wants."""
_ARGUMENTS, _ARGUMENT = 32, 200
"""Arguments of a program, and characters of each, that the status has."""
_LOOK = 60.0
"""Seconds between looks at whether the socket is still there."""


@dataclass
class Imported:
    """What a zygote has in its memory, and what was found out while it came there.

    Attributes:
        modules: names, in the order of their import.
        left_out: modules of the list that are not there in these versions.
        pools: native threads of BLAS pools.
        seconds: the imports took.
        reads: variables that were read.
        program: called in each program before its first line.
    """

    modules: list[str]
    left_out: list[str]
    pools: int
    seconds: float
    reads: Reads
    program: Callable[[], None] = lambda: None
    details: dict[str, Any] = field(default_factory=dict)


def lock(place: Place) -> int:
    """The lock of the zygote's place, held as long as the descriptor is open.

    Raises:
        UsageError: another zygote has it.
    """
    make(place.directory)
    try:
        file = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"cannot open {str(place.lock)!r}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(
            f"a zygote {place.name!r} runs already; thaw zygote status --name {place.name} says more"
        ) from None
    return file


def _shown(arguments: list[Any]) -> list[str]:
    """As much of a command line as anybody looks at."""
    return [str(argument)[:_ARGUMENT] for argument in arguments[:_ARGUMENTS]]


def _leader(below: list[int]) -> int | None:
    """The program among the processes of a keeper: it leads a process group."""
    for process in below:
        with contextlib.suppress(OSError):
            if os.getpgid(process) == process:
                return process
    return None


class Zygote:
    """Serves one place.

    Args:
        held: the descriptor of ``lock``.
        imported: what is in memory; the files it came from are looked at from now on.
    """

    def __init__(self, place: Place, held: int, imported: Imported) -> None:
        self._place = place
        self._held = held
        self._imported = imported
        self._files = sources.loaded(time.time() - imported.seconds)
        self._since = time.time()
        self._running: dict[int, dict[str, Any]] = {}
        self._ended = 0
        self._leave = False
        self._own = set(processes.children(os.getpid()))  # of imported modules
        processes.adopt_orphans()
        self._listening = self._listen()
        self._inode = os.stat(place.socket).st_ino

    def _listen(self) -> socket.socket:
        """The socket, in the place of one that a killed zygote left."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._place.socket)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listening.bind(os.fspath(self._place.socket))
        except OSError as error:
            raise StorageError(f"cannot listen on {str(self._place.socket)!r}: {error.strerror}") from None
        finally:
            os.umask(old)
        listening.listen(64)
        listening.setblocking(False)
        return listening

    def serve(self) -> Program | None:
        """Until somebody stops it. Returns a program in a fork that shall run it, and None in the zygote at its end."""
        gc.collect()
        gc.freeze()  # a collection in a fork must not write to every object, which would copy their pages
        self._wake, self._waking = processes.woken_by_signals()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: setattr(self, "_leave", True))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            while not self._leave:
                ready, _, _ = select.select([self._listening.fileno(), self._wake], [], [], _LOOK)
                if not ready and not self._found():
                    break
                if self._wake in ready:
                    processes.awake(self._wake)
                    self._take_leave()
                if self._listening.fileno() in ready and (program := self._accept()):
                    return program
        finally:
            self._close()
        return None

    def _found(self) -> bool:
        """Whether clients still find this zygote: directories of sockets are removed when their user logs out."""
        try:
            return os.stat(self._place.socket).st_ino == self._inode
        except OSError:
            return False

    def _close(self) -> None:
        """No more programs; in a fork, whose socket's name is the zygote's, the name stays."""
        if self._held >= 0:
            if self._found():
                os.unlink(self._place.socket)
            self._let_go()

    def _let_go(self) -> None:
        """Close what only the zygote needs."""
        self._listening.close()
        messages.close((self._held, self._wake, self._waking))
        self._held = -1

    def _take_leave(self) -> None:
        """Of keepers that have ended. One that was killed leaves what it kept to this process, which ends it.

        What such a process had started comes here when it has ended itself, so that each that ends is a reason to look.
        """
        for process, status in processes.reap().items():
            self._own.discard(process)
            kept = self._running.pop(process, None) is not None
            self._ended += kept
            if status or not kept:
                for stray in set(processes.children(os.getpid())) - self._running.keys() - self._own:
                    processes.send_all([stray, *processes.below(stray)], signal.SIGKILL)

    def _accept(self) -> Program | None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionAbortedError)):
                time.sleep(0.1)  # no descriptor or memory for it now; it waits
            return None
        files: list[int] = []
        try:
            connection.settimeout(_PATIENCE)
            if messages.peer(connection)[1] != os.getuid():
                return None
            received = messages.receive(connection)
            if received is None:
                return None
            request, files = received
            return self._answer(connection, request, files)
        except ThawError as error:
            self._refuse(connection, error)
        except OSError:  # the client has gone, or does not speak
            pass
        except Exception:  # whatever it asked for, others go on
            traceback.print_exc()
        finally:
            if self._held >= 0:
                connection.close()
                messages.close(files)
        return None

    def _refuse(self, connection: socket.socket, error: ThawError) -> None:
        with contextlib.suppress(OSError):
            messages.send(connection, {"refused": str(error), "error": type(error).__name__})

    def _answer(self, connection: socket.socket, request: dict[str, Any], files: list[int]) -> Program | None:
        what = request.get("do")
        if what == "run":
            return self._fork(connection, request, files)
        if what == "status":
            messages.send(connection, self._status())
        elif what == "stop":
            self._leave = True
            messages.send(connection, {"stopped": os.getpid(), "running": len(self._running)})
        else:
            raise UsageError(f"a zygote cannot {what!r}; is thaw of another version there?")
        return None

    def _fork(self, connection: socket.socket, request: dict[str, Any], files: list[int]) -> Program | None:
        check(request)
        if len(files) != len(request["streams"]) + 1:
            raise UsageError(f"{len(files)} files came where {len(request['streams']) + 1} were named")
        if request["python"] != python():
            raise MismatchError(
                f"the zygote runs the Python in {sys.prefix!r} and not this one; start another one here (thaw zygote "
                "start --name NAME, then --zygote NAME)"
            )
        self._check_sources()
        other = self._imported.reads.differences(request["environment"])
        if other:
            raise MismatchError(
                f"the zygote was started with other values of {', '.join(other)}, which are read at import; start "
                "another one here (thaw zygote start --name NAME, then --zygote NAME), or set them as they were"
            )
        reason = proof.unsound(self._imported.pools)
        if reason:
            raise UnsupportedError(f"the zygote cannot be forked: {reason}; thaw zygote stop, and start it again")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        started = time.time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which ``unsound`` has looked at
            try:
                pid = os.fork()
            except OSError as error:
                raise ThawError(f"the system lets the zygote have no more processes: {error.strerror}") from None
        if pid:
            self._running[pid] = {
                "keeper": pid,
                "arguments": _shown(request["arguments"]) if request["kind"] != "code" else ["-c"],
                "started": started,
                "detached": request["detached"],
            }
            return None
        try:
            signal.set_wakeup_fd(-1)
            self._let_go()
            connection.settimeout(None)
            keeper.keep(connection, files, detached=request["detached"])
            request["environment"] = self._imported.reads.imported(request["environment"])
            return Program(request, files, self._imported.program)
        except BaseException as error:
            traceback.print_exc()
            self._refuse(connection, ThawError(f"the program could not be started: {error}"))
            os._exit(1)

    def _check_sources(self) -> None:
        path = sources.changed(self._files)
        if path is not None:
            self._leave = True
            raise UnsupportedError(
                f"{path!r} has changed since the zygote imported it, so the zygote has ended; thaw zygote start"
            )

    def _status(self) -> dict[str, Any]:
        me = os.getpid()
        programs = []
        for pid, about in self._running.items():
            below = processes.below(pid)
            programs.append(about | {"pid": _leader(below), "processes": len(below), "memory": resident([pid, *below])})
        return {
            "pid": me,
            "name": self._place.name,
            "since": self._since,
            "python": sys.version.split()[0],
            "executable": sys.executable,
            "import_seconds": round(self._imported.seconds, 3),
            "modules": self._imported.modules,
            "left_out": self._imported.left_out,
            "unsound": proof.unsound(self._imported.pools),
            "changed": sources.changed(self._files),
            "memory": resident([me]),
            "programs": programs,
            "ended": self._ended,
            **self._imported.details,
        }
