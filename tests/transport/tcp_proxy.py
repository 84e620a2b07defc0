"""Somebody on the way between two ends of TCP, who does to the bytes what a test says."""

import contextlib
import socket
import threading
from collections.abc import Callable

Alter = Callable[[int, bytes], bytes]
"""``alter(at, data)``: what is passed on of bytes that begin ``at`` so many on their way."""


def flip(at):
    """Alters the byte ``at`` so many of the way."""

    def alter(begin, data):
        if begin <= at < begin + len(data):
            return data[: at - begin] + bytes([data[at - begin] ^ 1]) + data[at - begin + 1 :]
        return data

    return alter


class Proxy:
    """Passes connections on to an address; of the taker's bytes ``up`` is passed on, of the lender's ``down``."""

    def __init__(self, to, up: Alter = lambda at, data: data, down: Alter = lambda at, data: data) -> None:
        self._to, self._alters = to, (up, down)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        self._ends, self._threads = [], []
        self._start(self._serve)

    def _start(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, name="thaw-test-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                taker, _ = self._listening.accept()
                lender = socket.create_connection(self._to)
                self._ends += [taker, lender]
                self._start(self._pass, taker, lender, self._alters[0])
                self._start(self._pass, lender, taker, self._alters[1])

    def _pass(self, source, target, alter):
        at = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(alter(at, data))
                at += len(data)
        self.cut(source, target)

    def cut(self, *ends):
        """Hang up on both sides, of all connections unless some are named."""
        for end in ends or self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()
