"""One reader for many: rank 0 of a process group reads a snapshot, and all others get its bytes from it.

In pieces, each sent as soon as it is in rank 0's tensors, while the next one is read: over NCCL among GPUs, over gloo
among processes without. Every rank holds what has arrived against the chunk table of the file, of which all but rank 0
read nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ..errors import MismatchError, ThawError, UsageError, named
from ..format.snapshot import Snapshot
from ..transport.collector import collection_paused
from ..transport.source import FileSource
from .capture import fillable, persistent_buffers
from .layout import settle
from .module import require_module, restore_model, restore_opened
from .open import sections
from .pieces import PIECE, Checks, Piece, Wire, pieces
from .reading import RestoreOptions
from .restore import RestoreReport, match

_MESSAGE = 4096
"""Bytes of what ranks tell each other."""


def restore_model_broadcast(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> RestoreReport:
    """``restore_model`` in every process of a group, of which one reads. All of them call it.

    Args:
        model: of the same names, shapes, dtypes and ties in each; on one device: for NCCL a GPU, this process's.
        path: the file, the same one for all. Rank 0 reads it; the others its header, index and chunk table.
        group: of ``torch.distributed``; None for the default one.
        options: as for ``restore_model``, the same on each rank.

    Returns:
        Of this rank.

    Raises:
        UsageError: ``torch.distributed`` has no such group; a model on several devices.
        MismatchError: the file is for another module, or the ranks have opened different ones; nothing was copied.
        ThawError: this rank's own failure, or the first one of another rank, with its kind. When bytes were copied, no
            rank's model may be used.

    Notes:
        Costs about one read where the link among the ranks is faster than reading. A rank that is killed ends the
        others as soon as its connection breaks, or by the group's own time limit.
    """
    try:
        return _broadcast(model, path, group, options)
    except _Lost as error:
        raise ThawError(str(error)) from None


def _broadcast(
    model: torch.nn.Module, path: str | os.PathLike[str], group: dist.ProcessGroup | None, options: dict[str, Any]
) -> RestoreReport:
    start = time.perf_counter()
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError("there is no process group; call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise UsageError("this process is not in the group; call it in those that are")
    if dist.get_world_size(group) == 1:
        return restore_model(model, path, **options)
    chosen = RestoreOptions(**options)
    ranks = _Ranks(group)
    with collection_paused(), contextlib.ExitStack() as stack:
        prepared: list[_Fan] = []

        def prepare() -> dict[str, Any]:
            source = stack.enter_context(FileSource(path))
            nccl = ranks.device if ranks.device.type == "cuda" else None
            prepared.append(_Fan(model, source, sections(source), chosen, nccl))
            return prepared[0].said

        answers = ranks.step(prepare, "nothing was copied")
        if any(answer != answers[0] for answer in answers):
            other = next(rank for rank, answer in enumerate(answers) if answer != answers[0])
            raise MismatchError(f"rank {other} has opened another snapshot than rank 0; give all ranks the same file")
        (fan,) = prepared
        reports: list[RestoreReport] = []

        def work() -> dict[str, Any]:
            reports.append(fan.lead(ranks, start) if ranks.rank == 0 else fan.follow(ranks, start))
            return {}

        ranks.step(work, "the models must not be used")
        return reports[0]


class _Fan:
    """One rank's part.

    Attributes:
        said: what has to be equal on all ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        source: FileSource,
        snapshot: Snapshot,
        options: RestoreOptions,
        nccl: torch.device | None,
    ) -> None:
        """
        Args:
            nccl: the GPU to which NCCL is bound, where there is nothing else to send by.

        Raises:
            MismatchError, UsageError: see ``restore_model_broadcast``.
        """
        self._model, self._source, self._snapshot, self._options = model, source, snapshot, options
        self._targets, parameters = fillable(model)
        require_module(snapshot, source.name)
        match(snapshot, self._targets, parameters | persistent_buffers(model), source.name)
        used = {entry.name: self._targets[entry.name] for entry in snapshot.index.tensors}
        devices = {target.device for target in used.values()}
        if len(devices) > 1:
            raise UsageError(f"the model is on {len(devices)} devices; a broadcast fills one in each process")
        self._pieces = pieces(snapshot, PIECE)
        self._wire = Wire(snapshot, used, self._pieces)
        if nccl is not None and self._wire.device != nccl:
            raise UsageError(
                f"the model is on {self._wire.device}, and NCCL has {nccl} of this process; move the model there, or "
                "call torch.cuda.set_device first"
            )
        self.said = {
            "content": snapshot.header.content,
            "chunks": snapshot.preamble.chunks_digest.hex(),
            "verify": options.verify,
        }

    def lead(self, ranks: _Ranks, start: float) -> RestoreReport:
        """Read, and send what has arrived."""
        ready = _Ready(self._pieces, self._snapshot.preamble.payload_at)
        lost: list[BaseException] = []

        def send() -> None:
            try:
                with self._on_device():
                    for number, piece in enumerate(self._pieces):
                        arrived = ready.wait(number)
                        ranks.send(torch.tensor([int(arrived)], dtype=torch.uint8, device=ranks.device))
                        if not arrived:
                            return
                        self._wire.gather(piece)
                        for view in self._wire.views(piece):
                            ranks.send(view)
                    if self._wire.device.type == "cuda":
                        torch.cuda.current_stream(self._wire.device).synchronize()
            except BaseException as error:
                lost.append(error)

        settle(self._targets.values())
        sender = threading.Thread(target=send, name="thaw-fan-out", daemon=True)
        sender.start()
        try:
            report = restore_opened(
                self._model, self._source, self._options, start, self._snapshot, landed=ready.landed
            )
        except BaseException:
            ready.fail()
            raise
        finally:
            read = time.perf_counter()
            sender.join()
        if lost:
            raise lost[0]
        end = time.perf_counter()
        seconds = report.seconds | {"broadcast": end - read, "total": end - start}
        return replace(
            report, seconds=seconds, route=f"{report.route}, and on to {ranks.world - 1} ranks by {ranks.by}"
        )

    def follow(self, ranks: _Ranks, start: float) -> RestoreReport:
        """Receive, and check."""
        opened = time.perf_counter()
        snapshot, wire, verify = self._snapshot, self._wire, self._options.verify
        failure: ThawError | None = None
        total, done = sum(piece.bytes for piece in self._pieces), 0
        settle(self._targets.values())
        with (
            self._on_device(),
            Checks(self._source.name, wire.device, snapshot.preamble.payload_at, len(snapshot.chunks)) as checks,
        ):
            for piece in self._pieces:
                if not ranks.receive(torch.zeros(1, dtype=torch.uint8, device=ranks.device)).item():
                    break
                for view in wire.views(piece):
                    ranks.receive(view)
                if wire.device.type == "cuda":
                    torch.cuda.current_stream(wire.device).synchronize()
                try:  # what is wrong is told when all is there: the others go on sending
                    if verify and failure is None:
                        checks.check(list(wire.chunks(piece)))
                    wire.scatter(piece)
                except ThawError as error:
                    failure = error
                done += piece.bytes
                if self._options.progress is not None:
                    self._options.progress(done, total)
        settle(self._targets.values())
        if failure is not None:
            raise failure
        end = time.perf_counter()
        return RestoreReport(
            self._source.name,
            done,
            len(snapshot.index.tensors),
            checks.kind if verify else "none",
            {"open": opened - start, "receive": end - opened, "total": end - start},
            self._source.replaced,
            f"rank 0 by {ranks.by} → {'host memory' if wire.device.type == 'cpu' else wire.device}",
            f"rank 0 reads for {ranks.world} ranks",
            stored=done,
        )

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = self._wire.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Ready:
    """Which pieces are in rank 0's tensors."""

    def __init__(self, planned: list[Piece], payload_at: int) -> None:
        self._piece = {
            payload_at + chunk.stored_at: number
            for number, piece in enumerate(planned)
            for span in piece.spans
            for chunk in span.chunks
        }
        self._left = [sum(len(span.chunks) for span in piece.spans) for piece in planned]
        self._changed, self._failed = threading.Condition(), False

    def landed(self, offset: int) -> None:
        """The chunk at this place of the file is there; in any thread."""
        with self._changed:
            number = self._piece[offset]
            self._left[number] -= 1
            if not self._left[number]:
                self._changed.notify_all()

    def fail(self) -> None:
        """There will be no more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def wait(self, number: int) -> bool:
        """Whether the piece is there; waits until that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or not self._left[number])
            return not self._failed


class _Ranks:
    """What the processes of a group tell each other.

    Attributes:
        rank, world: of the group.
        by: its backend's name.
        device: where the tensors of messages are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group, self.by = group, str(dist.get_backend(group))
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        alone = "nccl" in self.by and "gloo" not in self.by
        self.device = torch.device("cuda", torch.cuda.current_device()) if alone else torch.device("cpu")
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    def send(self, view: torch.Tensor) -> None:
        """From rank 0 to all."""
        with _together():
            dist.broadcast(view, self._first, group=self._group)

    def receive(self, view: torch.Tensor) -> torch.Tensor:
        """On all others, as often; gives the same tensor."""
        self.send(view)
        return view

    def step(self, work: Callable[[], dict[str, Any]], outcome: str) -> list[dict[str, Any]]:
        """What each rank's ``work`` gives; raises on all of them where one failed, saying the outcome."""
        failure: BaseException | None = None
        try:
            answer = work()
        except _Lost:
            raise
        except BaseException as error:  # Ctrl-C, too: the others wait for this rank's answer
            failure, answer = error, {"error": type(error).__name__, "message": str(error)[:800]}
        try:
            answers = self._exchange(answer)
        except _Lost:
            if failure is not None:
                raise failure from None
            raise
        if failure is not None:
            raise failure
        for rank, said in enumerate(answers):
            if "error" in said:
                kind = named(said["error"]) or ThawError
                raise kind(f"rank {rank} could not thaw: {said['error']}: {said['message']}; {outcome}")
        return answers

    def _exchange(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        body = json.dumps(answer, ensure_ascii=False).encode(errors="replace")
        ours = torch.zeros(_MESSAGE, dtype=torch.uint8)
        framed = len(body).to_bytes(4, "little") + body
        ours[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        everyone = [torch.empty_like(ours, device=self.device) for _ in range(self.world)]
        with _together():
            dist.all_gather(everyone, ours.to(self.device), group=self._group)
        found = []
        for tensor in everyone:
            data = tensor.cpu().numpy().tobytes()
            found.append(json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")]))
        return found


class _Lost(ThawError):
    """The ranks have lost each other, so nothing can be told any more."""


@contextlib.contextmanager
def _together() -> Any:
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise _Lost(f"the ranks have lost each other ({text}); start all of them again") from None
