"""Messages among the ranks of one engine, over vLLM's own gloo group: bytes in a tensor, nothing pickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed

from ...errors import ReplacedError, ThawError, named
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


def told(exchange: Exchange, said: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, by rank: plain values, of MAX_MESSAGE bytes at most."""
    message = json.dumps(said, ensure_ascii=False).encode(errors="replace")
    return [json.loads(answer) for answer in exchange(message)]


class Together:
    """The step of a thaw before anything is written: every rank of an engine has found its file right, or none writes.

    Every rank enters it, and calls it within when it is ready; a rank that leaves it otherwise fails all of them.
    """

    def __init__(self, snapshot: str, exchange: Exchange | None = None) -> None:
        self._snapshot, self._exchange, self._told = snapshot, exchange or world_exchange(), False

    def __enter__(self) -> Together:
        return self

    def __call__(self, opened: str | None) -> None:
        """Go on when all do.

        Args:
            opened: tells the set of files, which has to be the same in all ranks.

        Raises:
            ThawError: of a rank's own kind, naming it: it cannot thaw.
            ThawError: a rank has died.
            ReplacedError: ranks have opened different sets; all of them raise it.
        """
        try:
            answers = self._tell({"opened": opened})
        except RuntimeError as error:
            raise ThawError(f"ranks have lost each other before {self._snapshot!r} was thawed: {error}") from error
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise (named(answer["error"]) or ThawError)(
                    f"rank {rank} cannot thaw {self._snapshot!r}: {answer['message']}; nothing was copied"
                )
        require_one_set_of_all((answer["opened"] for answer in answers), self._snapshot)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not self._told:
            with contextlib.suppress(RuntimeError):  # the others are gone; this rank's own error is the one to see
                self._tell({"error": type(error).__name__, "message": str(error)[: MAX_MESSAGE // 8]})

    def _tell(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        self._told = True
        return told(self._exchange, said)


def require_one_set_of_all(opened: Iterable[str | None], snapshot: str) -> None:
    """Refuse files of several sets: each rank has opened its own by the manifest, which may have been replaced.

    Raises:
        ReplacedError: ranks have opened different sets.
    """
    if len(set(opened)) > 1:
        raise ReplacedError(f"{snapshot!r} was replaced by another set while the ranks opened it; start again")
