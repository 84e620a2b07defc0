"""What a forked engine must not keep of the server that it was forked from."""

from __future__ import annotations

import os
import socket
import stat


def let_go_of_ports() -> list[int]:
    """Put ``/dev/null`` in the place of TCP sockets that have a port and no peer; their descriptors.

    A server has its port before it starts its engine. A fork would hold it, too: nobody else could have the port until
    the engine has ended, and vLLM's server, which looks for it in the end, would find the engine on it. The numbers
    stay taken, since objects that were copied with the process may close them.
    """
    found = [int(entry) for entry in os.listdir("/proc/self/fd") if _holds_port(int(entry))]
    if found:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in found:
            os.dup2(null, number, inheritable=False)
        os.close(null)
    return found


def _holds_port(number: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        there = socket.socket(fileno=number)
    except OSError:
        return False
    try:
        if there.family not in (socket.AF_INET, socket.AF_INET6) or there.type != socket.SOCK_STREAM:
            return False
        if not there.getsockname()[1]:
            return False
        try:
            there.getpeername()
        except OSError:
            return True
        return False
    finally:
        there.detach()
