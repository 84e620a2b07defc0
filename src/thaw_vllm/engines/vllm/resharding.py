"""A snapshot that one number of tensor-parallel ranks has written, thawed by another number."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import MismatchError, UnsupportedError
from ...format.header import Header
from ...format.identity import Identity, Parallel
from ...weights.capture import fillable
from ...weights.open import Opened, open_rank, open_snapshot, require_one_set
from ...weights.reading import RestoreOptions
from ...weights.reshard import Plan, Ranks, check, fill, plan
from . import audit
from .divisions import divisions

if TYPE_CHECKING:
    import os

    import torch

    from ...transport.kept_helpers import KeptHelpers
    from ...weights.restore import RestoreReport


def other_size(snapshot: str | os.PathLike[str], ours: Parallel) -> int | None:
    """How many tensor-parallel ranks have written a set, if not as many as there are here.

    Raises:
        As ``open_snapshot``.
    """
    with open_snapshot(snapshot, with_chunks=False) as opened:
        theirs = opened.snapshot.header.identity.parallel
    return theirs.tp_size if theirs.tp_size != ours.tp_size and theirs.rank == 0 else None


def thaw(
    model: torch.nn.Module,
    identity: Identity,
    snapshot: str,
    written: int,
    options: RestoreOptions,
    kept: KeptHelpers | None,
    checked: Callable[[Opened, Identity], Header],
    begin: Callable[[str | None], None],
) -> tuple[RestoreReport, str | None]:
    """Fill a model from the files of ``written`` tensor-parallel ranks; also gives the model id.

    Args:
        identity: this rank's.
        kept: whose helpers and kernels to borrow.
        checked: gives the header of a file, which is held against the identity that it should have.
        begin: called before anything is written, with what tells the set.

    Raises:
        MismatchError: the set is not this model's, or cannot be divided otherwise; nothing was copied.
        ReplacedError: it was replaced by another one meanwhile; nothing was copied.
        CorruptionError, StorageError, ReplacedError: part of the bytes may have been copied; do not use the model.
    """
    targets, required = fillable(model)
    ours = identity.parallel
    theirs = [dataclasses.replace(ours, tp_size=written, tp_rank=rank) for rank in range(written)]
    with contextlib.ExitStack() as stack:
        files = {rank: stack.enter_context(open_rank(snapshot, one.rank)) for rank, one in enumerate(theirs)}
        headers = [checked(one, dataclasses.replace(identity, parallel=theirs[rank])) for rank, one in files.items()]
        require_one_set(files.values(), snapshot)
        if any(header.attributes != headers[0].attributes for header in headers):
            raise MismatchError(f"the ranks of {snapshot!r} set different values on the model; thaw it by as many")
        held = {tensor.name for one in files.values() for tensor in one.snapshot.index.tensors}
        found = _planned(
            model, identity, snapshot, Ranks(written, ours.tp_size, ours.tp_rank), sorted(held & set(targets))
        )
        owners = audit.attribute_owners(model, headers[0].attributes)
        check(found, files, targets, required)
        begin(headers[0].set_id or headers[0].content)
        report = fill(found, {rank: files[rank] for rank in found.files}, targets, options, kept)
        audit.apply_attributes(owners, headers[0].attributes)
    return report, headers[0].identity.model


def _planned(model: torch.nn.Module, identity: Identity, snapshot: str, ranks: Ranks, names: list[str]) -> Plan:
    try:
        if identity.quantization is not None:
            raise UnsupportedError("its weights are quantised")
        if identity.parallel.ep_size != 1:
            raise UnsupportedError("its experts are divided among ranks")
        return plan(divisions(model, names), ranks)
    except UnsupportedError as error:
        raise MismatchError(
            f"{snapshot!r} was frozen with tensor_parallel_size={ranks.old}, this engine has {ranks.new}, and it "
            f"cannot be divided otherwise: {error}; pass tensor_parallel_size={ranks.old}, or freeze again with "
            f"tensor_parallel_size={ranks.new}"
        ) from None
