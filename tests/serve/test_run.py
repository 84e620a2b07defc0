"""What a pool listens on."""

from __future__ import annotations

import socket

from thaw_vllm.serve import run as subject


def test_what_is_sent_does_not_wait_for_more():
    """Else each answer of two pieces takes 40 ms on asyncio's own loop, and so may each token of a stream."""
    with (
        subject._bound("127.0.0.1", 0) as bound,
        socket.create_connection(bound.getsockname()),
        bound.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
