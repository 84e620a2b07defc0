"""Ports of a server whose engine is a fork of it."""

from __future__ import annotations

import os
import socket

from thaw_vllm.zygote.sockets import let_go_of_ports


def test_only_a_port_without_a_peer_is_let_go_of():
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket() as bound,
        socket.socket() as fresh,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.create_connection(listening.getsockname()) as connected,
    ):
        bound.bind(("127.0.0.1", 0))
        datagrams.bind(("127.0.0.1", 0))
        accepted, _ = listening.accept()
        pid = os.fork()
        if not pid:
            found = let_go_of_ports()
            kept = [fresh, datagrams, connected, accepted]
            right = {listening.fileno(), bound.fileno()} <= set(found)
            right &= not {file.fileno() for file in kept} & set(found)
            right &= all(os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev for number in found)
            os._exit(0 if right and let_go_of_ports() == [] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        accepted.sendall(b"x")
        assert connected.recv(1) == b"x"
        port = listening.getsockname()[1]
        accepted.close()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
