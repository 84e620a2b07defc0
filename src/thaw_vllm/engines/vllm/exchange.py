"""Messages among the ranks of one engine, over vLLM's own gloo group: bytes in a tensor, nothing pickled."""

from __future__ import annotations

import torch
import torch.distributed

from ...errors import ReplacedError
from ...format.header import Header
from ...weights.ranks import MAX_MESSAGE, Exchange, alone
from .versions import cpu_group


def world_exchange() -> Exchange:
    """The all-gather of this engine's ranks; ``alone`` when there is one."""
    group, size = cpu_group()
    if size == 1:
        return alone

    def gather(message: bytes) -> list[bytes]:
        if len(message) > MAX_MESSAGE:
            raise AssertionError(f"a message of {len(message)} bytes is longer than {MAX_MESSAGE}")
        framed = len(message).to_bytes(4, "little") + message
        ours = torch.zeros(MAX_MESSAGE + 4, dtype=torch.uint8, device="cpu")
        ours[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        everyone = [torch.zeros_like(ours) for _ in range(size)]
        torch.distributed.all_gather(everyone, ours, group=group)
        found = []
        for tensor in everyone:
            data = tensor.numpy().tobytes()
            found.append(data[4 : 4 + int.from_bytes(data[:4], "little")])
        return found

    return gather


def require_one_set_of_all(header: Header, snapshot: str) -> None:
    """Refuse files of several sets: each rank has opened its own by the manifest, which may have been replaced.

    Every rank calls it; all of them raise.

    Raises:
        ReplacedError: ranks have opened different sets.
    """
    if header.set_id is not None and len(set(world_exchange()(header.set_id.encode()))) > 1:
        raise ReplacedError(f"{snapshot!r} was replaced by another set while the ranks opened it; start again")
