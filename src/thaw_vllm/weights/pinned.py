"""A snapshot kept in memory, ready to be put into models again and again at the speed of the link."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from ..errors import UsageError
from ..transport import parallel
from ..transport.collector import collection_paused
from ..transport.cuda import Context
from ..transport.links import by_driver
from ..transport.readers import choose
from ..transport.resident import Resident
from ..transport.source import FileSource
from .module import restore_opened
from .open import Opened, open_snapshot
from .reading import RestoreOptions
from .restore import RestoreReport


def pin(
    path: str | os.PathLike[str],
    device: torch.device | str | int | None = None,
    *,
    workers: int | None = None,
) -> Pinned:
    """Hold a snapshot in page-locked host memory.

    A file on tmpfs is mapped and locked where it is and takes no further memory; any other is read into memory of its
    own, as much as the file has bytes. Locking takes about 0.5 s for 16 GB, once.

    Args:
        path: the snapshot, one file.
        device: a GPU, for its driver; the memory serves every GPU of the process. None: the current one where there is
            one. ``"cpu"``, and any GPU of AMD, locks nothing and keeps the bytes at hand.
        workers: threads; None for what the machine bears.

    Returns:
        Owns the memory and the open file until it is closed; a context manager.

    Raises:
        UsageError: a device that is neither a CUDA GPU nor the host.
        FormatError, CorruptionError, StorageError: the file is unsound or cannot be read.
        DeviceError: the memory cannot be locked (``ulimit -l`` of a container, for one).

    Example:
        >>> with thaw_vllm.pin("weights.thaw") as pinned:
        ...     pinned.restore(model)
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    wanted = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    if wanted.type not in ("cuda", "cpu"):
        raise UsageError(f"pin() knows CUDA GPUs and the host, not {str(wanted)!r}")
    return Pinned(path, wanted, workers or parallel.default_workers())


class Pinned:
    """A snapshot in memory; made by ``pin``.

    Attributes:
        path: the file.
        bytes: of the file, all of them held.
        why: how they are held, and why so.
        seconds: what holding them took.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device, workers: int) -> None:
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open_snapshot(path))
            file = opened.source
            assert isinstance(file, FileSource)
            context = None
            if by_driver(device):
                context = Context(torch.cuda.current_device() if device == torch.device("cuda") else device.index)
                stack.callback(context.close)
            with contextlib.closing(choose(file)) as reader:
                self._resident = Resident(file, reader, context, workers)
            stack.callback(self._resident.close)
            self._stack = stack.pop_all()
        self._opened, self._file = Opened(self._resident, opened.snapshot), file
        self.path, self.bytes, self.why = str(path), file.size, self._resident.why
        self.seconds = time.perf_counter() - start
        self._closed = False

    def restore(self, model: torch.nn.Module, **options: Any) -> RestoreReport:
        """``restore_model`` from the held bytes; the same arguments, errors and report.

        Raises:
            UsageError: it was closed.
            ReplacedError: a mapped file was written to; pin it again.
        """
        if self._closed:
            raise UsageError(f"{self.path!r} is not held any more; pin it again")
        start = time.perf_counter()
        with collection_paused():
            report = restore_opened(model, self._opened.source, RestoreOptions(**options), start, self._opened.snapshot)
        return replace(report, why=self.why, replaced=self._file.replaced)

    @property
    def opened(self) -> Opened:
        """The held bytes as a source, for whoever fills other things than modules; ends with ``close``."""
        return self._opened

    @property
    def replaced(self) -> bool:
        """Whether the path names another file by now."""
        return self._file.replaced

    def close(self) -> None:
        """Unlock and return the memory; a second call does nothing."""
        self._closed = True
        self._stack.close()

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
