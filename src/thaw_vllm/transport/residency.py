"""Which parts of a file are in the page cache, asked without bringing anything into it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from functools import cache
from typing import Any

from .staging import address_of


class Residency:
    """Asks mincore(2) about a file through a mapping of which no page is ever touched; safe in several threads.

    A read that may not wait (RWF_NOWAIT) would tell too, and start to read ahead what is not there: then the disk
    brings everything twice. For files that the user neither owns nor may write, the kernel says that all is cached.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """
        Args:
            descriptor: of the open file; not needed afterwards.
            size: its bytes, at least 1.

        Raises:
            OSError: it cannot be mapped.
        """
        try:
            self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except ValueError as error:  # the file is shorter by now
            raise OSError(errno.EINVAL, str(error)) from None
        self._address, self._size, self._local = address_of(self._map), size, threading.local()

    def whole(self, offset: int, length: int) -> bool:
        """Whether every page of a range is in memory at this moment; never for one that leaves the file."""
        if offset + length > self._size:
            return False
        states = self._states(offset, length)
        return states is not None and states == b"\1" * len(states)

    def pages(self, offset: int, length: int) -> int:
        """How many pages of a range inside the file are in memory at this moment.

        Raises:
            OSError: the kernel does not tell.
        """
        states = self._states(offset, length)
        if states is None:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return states.count(b"\1")

    def _states(self, offset: int, length: int) -> bytes | None:
        """A byte for each page: its lowest bit says whether it is in memory, the others are reserved and zero."""
        low = offset // mmap.PAGESIZE * mmap.PAGESIZE
        pages = -(-(offset + length - low) // mmap.PAGESIZE)
        states: ctypes.Array[ctypes.c_char] | None = getattr(self._local, "states", None)
        if states is None or len(states) < pages:
            states = self._local.states = ctypes.create_string_buffer(pages)
        if _mincore()(self._address + low, offset + length - low, states):
            return None
        return states.raw[:pages]

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        self._map.close()


@cache
def _mincore() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    function.restype = ctypes.c_int
    return function
