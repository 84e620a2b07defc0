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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        UsageError: ``torch.distributed`` has no such group; a model on several devices, or on one that the group does
            not reach, or reaches by another backend than rank 0's.
        MismatchError: the file is for another module, or the ranks have opened different ones; nothing was copied.
        ThawError: this rank's own failure, or the first one of another rank, with its kind. When bytes were copied, no
            rank's model may be used.

        What else fails in this rank, Ctrl-C included, is raised when all ranks know of it.

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
    ranks = _Ranks(group)
    with collection_paused(), contextlib.ExitStack() as stack:
        prepared: list[_Fan] = []

        def prepare() -> dict[str, Any]:
            source = stack.enter_context(FileSource(path))
            fan = _Fan(model, source, sections(source), RestoreOptions(**options), ranks)
            stack.enter_context(fan.able())
            prepared.append(fan)
            return fan.said

        answers = ranks.step(prepare, "nothing was copied")
        if any(answer != answers[0] for answer in answers):
            other = next(rank for rank, answer in enumerate(answers) if answer != answers[0])
            if (by := answers[other]["by"]) != answers[0]["by"]:
                raise UsageError(
                    f"rank {other}'s model is reached by {by}, rank 0's by {answers[0]['by']}; have all of them on "
                    "GPUs, or none"
                )
            raise MismatchError(f"rank {other} has opened another snapshot than rank 0; give all ranks the same file")
        (fan,) = prepared
        reports: list[RestoreReport] = []

        def work() -> dict[str, Any]:
            reports.append(fan.lead(start) if ranks.rank == 0 else fan.follow(start))
            return {}

        ranks.step(work, "the models must not be used")
        return reports[0]


class _Fan:
    """One rank's part.

    A rank that left the row of broadcasts would have the others wait until the group's time limit. So what they need is
    there before the first; they are done in a thread, where Ctrl-C raises nothing; and what fails between them is told
    after the last.

    Attributes:
        said: what has to be equal on all ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        source: FileSource,
        snapshot: Snapshot,
        options: RestoreOptions,
        ranks: _Ranks,
    ) -> None:
        """
        Raises:
            MismatchError, UsageError: see ``restore_model_broadcast``.
        """
        self._model, self._source, self._snapshot, self._options, self._ranks = model, source, snapshot, options, ranks
        self._targets, parameters = fillable(model)
        require_module(snapshot, source.name)
        match(snapshot, self._targets, parameters | persistent_buffers(model), source.name)
        used = {entry.name: self._targets[entry.name] for entry in snapshot.index.tensors}
        devices = {target.device for target in used.values()}
        if len(devices) > 1:
            raise UsageError(f"the model is on {len(devices)} devices; a broadcast fills one in each process")
        self._pieces = pieces(snapshot, PIECE)
        self._wire = Wire(snapshot, used, self._pieces)
        device = self._wire.device
        if ranks.device.type == "cuda" and device != ranks.device:
            raise UsageError(
                f"the model is on {device}, and NCCL has {ranks.device} of this process; move the model there, or "
                "call torch.cuda.set_device first"
            )
        if device.type not in ranks.backends:
            raise UsageError(f"the model is on {device}, for which the process group has no backend")
        self._by = ranks.backends[device.type]
        self._more = torch.zeros(1, dtype=torch.uint8, device=ranks.device)  # whether rank 0 sends another piece
        self._checks = Checks(source.name, device, snapshot.preamble.payload_at, len(snapshot.chunks))
        self._thread = ThreadPoolExecutor(1, "thaw-fan-out")
        self.said = {
            "content": snapshot.header.content,
            "chunks": snapshot.preamble.chunks_digest.hex(),
            "verify": options.verify,
            "by": self._by,
        }

    @contextlib.contextmanager
    def able(self) -> Iterator[None]:
        """With all that ``lead`` and ``follow`` need.

        Raises:
            DeviceError, RuntimeError: it is not to be had.
        """
        with contextlib.ExitStack() as stack:
            if self._ranks.rank:
                stack.enter_context(self._checks)
            stack.enter_context(self._thread).submit(settle, self._targets.values()).result()
            yield

    def lead(self, start: float) -> RestoreReport:
        """Read, and send what has arrived."""
        ready = _Ready(self._pieces, self._snapshot.preamble.payload_at)
        sender = self._thread.submit(self._send, ready)
        try:
            report = restore_opened(
                self._model, self._source, self._options, start, self._snapshot, landed=ready.landed
            )
        except BaseException:
            ready.fail()
            raise
        finally:
            read = time.perf_counter()
            failure = _failure(sender)
        if failure is not None:
            raise failure
        end = time.perf_counter()
        seconds = report.seconds | {"broadcast": end - read, "total": end - start}
        route = f"{report.route}, and on to {self._ranks.world - 1} ranks by {self._by}"
        return replace(report, seconds=seconds, route=route)

    @torch.inference_mode()
    def _send(self, ready: _Ready) -> None:
        with self._on_device():
            for number, piece in enumerate(self._pieces):
                views: list[torch.Tensor] | None = None
                try:
                    if ready.wait(number):
                        self._wire.gather(piece)
                        views = self._wire.views(piece)
                finally:
                    self._ranks.send(self._more.fill_(int(views is not None)))
                if views is None:
                    return
                for view in views:
                    self._ranks.send(view)
            if self._wire.device.type == "cuda":
                torch.cuda.current_stream(self._wire.device).synchronize()

    def follow(self, start: float) -> RestoreReport:
        """Receive, and check."""
        opened = time.perf_counter()
        receiver = self._thread.submit(self._receive)
        if (failure := _failure(receiver)) is not None:
            raise failure
        settle(self._targets.values())
        end, done, device = time.perf_counter(), receiver.result(), self._wire.device
        return RestoreReport(
            self._source.name,
            done,
            len(self._snapshot.index.tensors),
            self._checks.kind if self._options.verify else "none",
            {"open": opened - start, "receive": end - opened, "total": end - start},
            self._source.replaced,
            f"rank 0 by {self._by} → {'host memory' if device.type == 'cpu' else device}",
            f"rank 0 reads for {self._ranks.world} ranks",
            stored=done,
        )

    @torch.inference_mode()  # which is a mode of threads; the tensors may have been made in it
    def _receive(self) -> int:
        """Gives the bytes that have come."""
        failure: BaseException | None = None
        total, done = sum(piece.bytes for piece in self._pieces), 0
        with self._on_device():
            for piece in self._pieces:
                if not self._ranks.receive(self._more).item():
                    break
                for view in self._wire.views(piece):
                    self._ranks.receive(view)
                done += piece.bytes
                if failure is None:
                    try:
                        self._take(piece, done, total)
                    except BaseException as error:  # told when all is there: the others go on sending
                        failure = error
        if failure is not None:
            raise failure
        return done

    def _take(self, piece: Piece, done: int, total: int) -> None:
        if self._wire.device.type == "cuda":
            torch.cuda.current_stream(self._wire.device).synchronize()
        if self._options.verify:
            self._checks.check(list(self._wire.chunks(piece)))
        self._wire.scatter(piece)
        if self._options.progress is not None:
            self._options.progress(done, total)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = self._wire.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _failure(work: Future[Any]) -> BaseException | None:
    """What it has raised, or Ctrl-C meanwhile; waits for its end also then."""
    interrupted: BaseException | None = None
    while True:
        try:
            return work.exception() or interrupted
        except BaseException as error:
            interrupted = error


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
        backends: names of its backends, by the types of devices that they reach.
        device: where the tensors of messages are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
        self.backends = {device: name for device, name in pairs}
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        reaches_host = "cpu" in self.backends
        self.device = torch.device("cpu") if reaches_host else torch.device("cuda", torch.cuda.current_device())
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
            failure, answer = error, {"error": type(error).__name__, "message": str(error)[:600]}
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
