"""Which variables of its environment a zygote has read, so that a program with other values is not run in it."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping

BY_LIBRARIES = (
    "ATEN_",
    "BLIS_",
    "GLIBC_",
    "GOMP_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "NETWORKX_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "PYTORCH_",
    "TORCH",
    "TQDM_",
)
"""Beginnings of names that are read where nobody sees it: by the loader, C and C++ libraries, the interpreter at its
start, and by modules that go through all variables."""

MAY_DIFFER = {
    "CI": "how output looks",
    "COLUMNS": "how output looks",
    "CUDA_VISIBLE_DEVICES": "the driver reads it when it is first used, in the program",
    "FORCE_COLOR": "how output looks",
    "LINES": "how output looks",
    "LNAME": "who asks",
    "LOGNAME": "who asks",
    "NO_COLOR": "how output looks",
    "OLDPWD": "the program has its own working directory",
    "PATH": "modules look for compilers in it again when they need one",
    "PWD": "the program has its own working directory",
    "PYTHONUNBUFFERED": "set anew for the program's standard streams",
    "SHELL": "who asks",
    "SHLVL": "who asks",
    "TEMP": "the place for temporary files is looked for again",
    "TERM": "how output looks",
    "THAW_START_REPORT": "set anew for the program",
    "TMP": "the place for temporary files is looked for again",
    "TMPDIR": "the place for temporary files is looked for again",
    "TZ": "set anew for the program",
    "USER": "who asks",
    "USERNAME": "who asks",
    "VLLM_WORKER_MULTIPROC_METHOD": "read whenever a process is started",
    "_": "who asks",
}
"""Variables that may have other values in a program although they were read before, and why."""


class Reads:
    """The names that were looked up in ``os.environ`` while ``watching``, whether they were set or not.

    Attributes:
        names: of the variables.
        before: all variables as they were before.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.before = dict(os.environ)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note every lookup meanwhile. Going through all variables, as ``items`` and ``dict`` do, is not one."""
        kind = type(os.environ)
        get, names = kind.__getitem__, kind.__iter__
        passing: deque[str] = deque()

        def looked_up(this: os._Environ[str], key: str) -> str:
            if passing and passing[0] == key:
                passing.popleft()
            elif this is os.environ and isinstance(key, str):
                self.names.add(key)
            return get(this, key)

        def gone_through(this: os._Environ[str]) -> Iterator[str]:
            found = list(names(this))
            passing.clear()
            passing.extend(found)
            return iter(found)

        kind.__getitem__ = looked_up  # type: ignore[method-assign]
        kind.__iter__ = gone_through  # type: ignore[method-assign]
        try:
            yield
        finally:
            kind.__getitem__ = get  # type: ignore[method-assign]
            kind.__iter__ = names  # type: ignore[method-assign]

    def differences(self, theirs: Mapping[str, str]) -> list[str]:
        """Names of variables that have another value in ``theirs`` and were read here, in order.

        What modules imported here have set for libraries (BY_LIBRARIES) is none: who asks may have imported them as
        well, as a program that used scikit-learn has its ``KMP_INIT_AT_FORK``.
        """

        def set_here(name: str) -> bool:
            return (
                name.startswith(BY_LIBRARIES) and name not in self.before and theirs.get(name) == os.environ.get(name)
            )

        return sorted(
            name
            for name in _changed(self.before, theirs)
            if name not in MAY_DIFFER and (name in self.names or name.startswith(BY_LIBRARIES)) and not set_here(name)
        )

    def imported(self, theirs: Mapping[str, str]) -> dict[str, str]:
        """``theirs`` as the modules that were imported here would have left it: some set variables."""
        left = dict(theirs)
        now = dict(os.environ)
        for name in _changed(self.before, now):
            if name in now:
                left[name] = now[name]
            else:
                left.pop(name, None)
        return left


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
