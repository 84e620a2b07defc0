"""What holds the weights of a fork pool's engines, in a process of its own: ``pool_holder SOCKET``; see ``pool``."""

from __future__ import annotations

import os
import selectors
import socket
import sys
from typing import Any

import torch

from ....weights.shared import Held
from ....zygote import messages
from .pool_process import spelt, tell


def main(path: str) -> int:
    """Thaw a snapshot into memory that others may map, and tell whoever asks where it is, until the pool is gone.

    The pool sends ``snapshot`` and ``socket``, at which engines ask, and is told ``holder``, this process, ``bytes``,
    and ``memory``: of the GPU, all of it; None on the host.

    Exit status: 0; 1 where that failed, which the pool is told.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as pool:
        pool.connect(path)
        asked = messages.receive(pool)
        if asked is None:
            return 0
        try:
            device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
            held = Held(asked[0]["snapshot"], device)
            memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(asked[0]["socket"])
            listening.listen()
        except Exception as error:
            tell(pool, spelt(error))
            return 1
        tell(pool, {"holder": os.getpid(), "bytes": held.report.bytes, "memory": memory})
        told = {"memory": held.made.told, "content": held.content}
        _serve(pool, listening, told | {"bytes": held.report.bytes, "verified": held.report.verified})
    return 0


def _serve(pool: socket.socket, listening: socket.socket, told: dict[str, Any]) -> None:
    """Tell it to each that connects, and keep the connection, by whose end they see that this process has ended."""
    with selectors.DefaultSelector() as selector:
        for one in (pool, listening):
            selector.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                asking: Any = key.fileobj
                if asking is pool:
                    return
                if asking is listening:
                    connection, _ = listening.accept()
                    try:
                        messages.send(connection, told)
                    except OSError:
                        connection.close()
                    else:
                        selector.register(connection, selectors.EVENT_READ)
                else:  # an engine has ended
                    selector.unregister(asking)
                    asking.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
