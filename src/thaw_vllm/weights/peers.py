"""A snapshot's bytes from another process that has them in its tensors already, of the same host or over TCP.

The taker opens its own file of the snapshot for header, index and chunk table, and reads the payload from the other
process's memory. Every chunk is held against the table where it has arrived, as after a read from storage: a lender
whose weights are other ones, or change meanwhile, is found out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import DeviceError, StorageError, ThawError, UnsupportedError, UsageError
from ..format.chunks import RAW
from ..format.index import Index, Tensor
from ..format.preamble import Preamble
from ..format.snapshot import Snapshot
from ..transport.borrowed_gpu import BorrowedGpu
from ..transport.lending import Lent, borrow
from ..transport.offers import PATIENCE, QUICK, Offer, asked, directory, offered, own
from ..transport.parallel import interruptible
from ..transport.peer_token import taker_token
from ..transport.source import Source
from ..transport.tcp_address import Address, peer_address, remote
from ..transport.tcp_source import TcpSource
from .ahead import kept
from .layout import settle
from .open import Opened
from .reading import RestoreOptions
from .restore import RestoreReport, as_it_lies, match, require_chunks, restore

AUTO = "auto"
"""As a peer: whoever offers these weights."""

_giving_back: list[threading.Thread] = []
os.register_at_fork(after_in_child=_giving_back.clear)  # they are the parent's


def offer(
    opened: Opened,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    refuse: Callable[[], str | None],
    place: Path | None = None,
) -> Offer:
    """Lend tensors that hold what a snapshot does to processes of this user that ask for its content id.

    Args:
        opened: the snapshot; its chunk table is not needed, and the file may be closed afterwards.
        targets: by name, as for ``restore``; nothing of them is kept alive.
        required: as for ``restore``.
        refuse: asked for each borrower, in another thread: why the tensors are not to be lent, or None.
        place: the directory of offers; None for this user's.

    Returns:
        Lends until withdrawn. Whoever has the tensors withdraws it before they change, move or go.

    Raises:
        MismatchError: these are not the tensors of that snapshot.
        UnsupportedError: they do not lie as in it, or on several devices.
        DeviceError, StorageError: the driver lends no such memory; there is no place for a socket.
    """
    snapshot, name = opened.snapshot, opened.source.name
    match(snapshot, targets, required, name)
    owners = _owners(snapshot.index)
    for entry in owners.values():
        target = targets[entry.name]
        if entry.offset or not as_it_lies(entry, target):
            raise UnsupportedError(f"{entry.name!r} lies in another order than in {name!r}; its weights are not lent")
    devices = {targets[entry.name].device for entry in owners.values()}
    if len(devices) > 1:
        raise UnsupportedError(f"the weights are on {len(devices)} devices; they are lent from one")
    runs = [(targets[entry.name].data_ptr(), snapshot.index.storages[number]) for number, entry in owners.items()]
    lent = Lent(runs, next(iter(devices), torch.device("cpu")))

    def lend() -> tuple[dict[str, object], list[int]]:
        why = refuse()
        if why is not None:
            raise UnsupportedError(f"the weights of process {os.getpid()} are not lent: {why}")
        return lent.told()

    return Offer(place or directory(os.environ), snapshot.header.content, lend)


def take(
    opened: Opened,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    peer: str = AUTO,
    place: Path | None = None,
) -> RestoreReport:
    """``restore`` from a process that offers this snapshot's bytes. Every chunk is verified, whatever ``options`` say.

    Args:
        opened: the snapshot with its chunk table.
        targets, required: as for ``restore``; on one device.
        peer: AUTO, the socket of an offer, or ``tcp://HOST:PORT`` of a ``thaw lend``.
        place: the directory of offers; None for this user's.

    Returns:
        Its ``route`` names both sides, ``why`` the offer; ``seconds`` begin with ``borrow``: asking, and on a GPU
        mapping, while copies are under way. A GPU's memory may still be unmapped; see ``given_back``.

    Raises:
        StorageError: nobody offers them, or whoever did has ended; over TCP also: there is no token.
        CorruptionError: the bytes that came are not the snapshot's; the tensors must not be used.
        MismatchError, UnsupportedError, DeviceError: the lender refuses, or its memory cannot be reached; a part may
            have been copied.
    """
    require_chunks(opened.snapshot, opened.source.name)
    content = opened.snapshot.header.content
    if remote(peer):
        return _taken_over_tcp(opened, targets, required, options, peer_address(peer))
    if peer != AUTO:
        return _taken(opened, targets, required, options, Path(peer))
    last: ThawError | None = None
    for path in offered(place or directory(os.environ), content):
        if own(path):
            continue  # the driver maps nobody's own memory
        try:
            return _taken(opened, targets, required, options, path)
        except ThawError as error:
            last = error
    raise last or StorageError(f"nobody on this host offers the weights of {opened.source.name!r}")


def _taken(
    opened: Opened,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    path: Path,
) -> RestoreReport:
    start = time.perf_counter()
    snapshot, (preamble, places) = opened.snapshot, lay_out(opened.snapshot)
    device = _device(snapshot, targets)
    patience = PATIENCE if device.type == "cpu" else QUICK
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(asked(path, snapshot.header.content, patience))
        name = f"the weights of process {answer.process}"
        source = stack.enter_context(contextlib.closing(borrow(answer.told, answer.files, places, name, device)))
        over = "" if source.over is None else f" over {source.over}"
        way = f"{source.where} of process {answer.process}{over}", "it has these weights already, and offers them"
        if isinstance(source, BorrowedGpu):  # before chunks are looked at, which takes as long as some GB
            match(snapshot, targets, required, opened.source.name)
            settle(targets.values())
            source.begin(_into(snapshot.index, targets), preamble.chunks, kept(device).kernels.sums(device.index or 0))
        report = _filled(
            opened, source, plain(snapshot, preamble, places), targets, required, options, device, *way, start
        )
        if isinstance(source, BorrowedGpu):
            _give_back(stack.pop_all())
        return report


def _give_back(loan: contextlib.ExitStack) -> None:
    """In a thread: to unmap 16 GB of 150 tensors takes 11 ms, and the bytes are in place."""
    thread = threading.Thread(target=_closed, args=(loan,), name="thaw-give-back")  # which the process's end waits for
    try:
        thread.start()
    except RuntimeError:  # no thread to be had
        _closed(loan)
        return
    _giving_back.append(thread)
    for other in [*_giving_back]:
        if not other.is_alive():
            _forget(other)


def _closed(loan: contextlib.ExitStack) -> None:
    try:
        loan.close()
    except DeviceError as error:  # the bytes have been verified all the same
        logging.getLogger(__name__).warning("memory of another process could not be unmapped: %s", error)


def given_back() -> None:
    """Wait until everything that this process has taken is given back: nothing is unmapped after that.

    Called by who captures CUDA graphs next, during which other threads may not.
    """
    for thread in [*_giving_back]:
        thread.join()
        _forget(thread)


def _forget(thread: threading.Thread) -> None:
    with contextlib.suppress(ValueError):  # another thread has
        _giving_back.remove(thread)


def _taken_over_tcp(
    opened: Opened,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    address: Address,
) -> RestoreReport:
    start = time.perf_counter()
    preamble, places = lay_out(opened.snapshot)
    snapshot = plain(opened.snapshot, preamble, places)
    device, token = _device(snapshot, targets), taker_token(os.environ)
    begin, count = preamble.payload_at, sum(size for _, size in places)
    source = TcpSource(address, token, snapshot.header.content, begin, count)
    way = f"{address} over TCP", "an engine there has these weights already, and offers them"
    with contextlib.closing(source), interruptible(source.abandon):
        return _filled(opened, source, snapshot, targets, required, options, device, *way, start)


def _filled(
    opened: Opened,
    source: Source,
    snapshot: Snapshot,
    targets: Mapping[str, torch.Tensor],
    required: Collection[str],
    options: RestoreOptions,
    device: torch.device,
    where: str,
    why: str,
    start: float,
) -> RestoreReport:
    """``restore`` from a lender's bytes; everything since ``start`` is counted."""
    borrowed = time.perf_counter() - start
    options = replace(options, verify=True, route="auto", processes=False)
    report = restore(source, snapshot, targets, required, options)
    seconds = {"borrow": borrowed} | report.seconds | {"total": borrowed + report.seconds["total"]}
    into = "host memory" if device.type == "cpu" else str(device)
    route = f"peer: {where} → {into}"
    return replace(report, path=opened.source.name, seconds=seconds, route=route, why=why)


def _device(snapshot: Snapshot, targets: Mapping[str, torch.Tensor]) -> torch.device:
    """The one that all of them are on."""
    owners = _owners(snapshot.index)
    devices = {targets[entry.name].device for entry in owners.values() if entry.name in targets}
    if len(devices) > 1:
        raise UsageError(f"weights are taken from another process to one device, not to {len(devices)}")
    return next(iter(devices), torch.device("cpu"))


def lay_out(snapshot: Snapshot) -> tuple[Preamble, list[tuple[int, int]]]:
    """Where what is lent of a snapshot would be in a file: tensors' storages one after the other.

    Returns:
        The preamble of such a file, and for each storage its place and bytes.
    """
    owners = _owners(snapshot.index)
    preamble = replace(snapshot.preamble, chunks=sum(chunk.storage in owners for chunk in snapshot.chunks))
    places, end = [], preamble.payload_at
    for storage in owners:
        places.append((end, snapshot.index.storages[storage]))
        end += snapshot.index.storages[storage]
    return preamble, places


def plain(snapshot: Snapshot, preamble: Preamble, places: Sequence[tuple[int, int]]) -> Snapshot:
    """A snapshot as it is lent: laid out as ``lay_out`` says, uncompressed, without carried files."""
    begins = {
        storage: at - preamble.payload_at for storage, (at, _) in zip(_owners(snapshot.index), places, strict=True)
    }
    chunks = [
        replace(chunk, stored_at=begins[chunk.storage] + chunk.at, stored=chunk.length, codec=RAW)
        for chunk in snapshot.chunks
        if chunk.storage in begins
    ]
    chunks.sort(key=lambda chunk: chunk.stored_at)
    return replace(snapshot, preamble=preamble, chunks=tuple(chunks))


def _into(index: Index, targets: Mapping[str, torch.Tensor]) -> list[int | None]:
    """For each storage that is lent the address of its tensor here, if that lies as in the storage."""
    found: list[int | None] = []
    for entry in _owners(index).values():
        target = targets[entry.name]
        found.append(target.data_ptr() if as_it_lies(entry, target) else None)
    return found


def _owners(index: Index) -> dict[int, Tensor]:
    """The tensor that covers each storage of tensors, in the order in which they are lent."""
    found: dict[int, Tensor] = {}
    for entry in index.tensors:
        if entry.storage is not None:
            found.setdefault(entry.storage, entry)
    return dict(sorted(found.items()))
