"""Whether an engine's weights may be swapped in place, and by which snapshot: proved, or refused with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ....errors import MismatchError, UnsupportedError
from ....format.identity import require
from ....transport.collector import collection_paused
from ....weights.capture import fillable
from ....weights.open import Opened, open_rank
from ....weights.restore import match
from .. import versions
from ..audit import digest, numbers
from .filled import Filled, covered, hooks, noted, unknown
from .front import require_files
from .pins import pinned
from .reach import uncovered

OTHER_WAYS = "start another engine with the snapshot: thaw_vllm.load(), or thaw serve, in seconds beside a zygote"


def check(worker: Any, path: str, *, quick: bool = False) -> dict[str, Any]:
    """Hold this worker's engine and a snapshot against everything that a swap relies on; nothing is changed.

    Args:
        path: the snapshot.
        quick: leave out what an earlier check of this engine has found, and a later one will: that nothing of what the
            model holds, however deep, would outlive the weights.

    Returns:
        ``bytes`` and ``tensors`` that would be filled, the snapshot's ``model`` id, its ``content`` id, and the id of
        the ``set`` that it belongs to.

    Raises:
        UnsupportedError: this engine's weights cannot be swapped, whatever the snapshot.
        MismatchError: not by this snapshot.
        FormatError, CorruptionError, StorageError: it is unsound, or cannot be read.
    """
    model = worker.get_model()
    with collection_paused(), opened_for(worker, path) as opened:
        found = swappable(worker, quick=quick)
        header, index = opened.snapshot.header, opened.snapshot.index
        require_known(opened, path, found)
        require(header.identity, found.identity, path)
        require_alike(opened, path, model, found)
        if found.identity.parallel.rank == 0:
            require_files(opened, path, found.files, OTHER_WAYS)
        storages = {tensor.storage for tensor in index.tensors if tensor.storage is not None}
        return {
            "bytes": sum(index.storages[storage] for storage in storages),
            "tensors": len(index.tensors),
            "model": header.identity.model,
            "content": header.content,
            "set": opened.snapshot.header.set_id,
        }


@contextlib.contextmanager
def opened_for(worker: Any, path: str) -> Iterator[Opened]:
    """This rank's file, from page-locked memory where it is held there."""
    held = pinned(path)
    if held is not None:
        yield held
        return
    with open_rank(path, worker.rank) as opened:
        yield opened


def swappable(worker: Any, *, quick: bool = False) -> Filled:
    """What the engine was filled with.

    Args:
        quick: as of ``check``.

    Raises:
        UnsupportedError: it may not be filled with anything else.
    """
    model, config = worker.get_model(), worker.vllm_config
    why = why_not(model, config)
    found = noted(model)
    if why is None and found is not None:
        if quick:
            return found
        cache = [tensor for layer in versions.kv_tensors(worker).values() for tensor in layer]
        why = changed(model, config, found, cache + versions.call_inputs(model))
        if why is None:
            return found
    raise UnsupportedError(f"this engine's weights cannot be swapped in place: {why}; {OTHER_WAYS}")


def why_not(model: torch.nn.Module, config: Any) -> str | None:
    """Why this engine's weights cannot be swapped whatever by; None where nothing speaks against it yet.

    Args:
        config: vLLM's, of the engine.
    """
    return versions.identity_processing(model) or versions.swap_obstacle(model, config) or unknown(model)


def changed(model: torch.nn.Module, config: Any, found: Filled, passing: list[torch.Tensor]) -> str | None:
    """Why what no snapshot fills speaks against a swap; None if it does not.

    What loading left as it was initialised depends on the configuration alone, which must be equal; as long as nobody
    has changed it since.

    Args:
        passing: tensors that nothing of the weights outlives a swap in: the KV cache, which it empties, and what is
            written anew for each call.
    """
    left = sorted({name for name, _ in model.named_parameters(remove_duplicate=False)} - found.names)
    if left:
        return f"{left[0]!r} was not filled when the engine was loaded"
    constants = {id(tensor) for tensor in versions.attention_constants(config)}
    known = {id(tensor) for tensor, _ in found.others.values()}
    stray = [
        path
        for path, tensor in uncovered(model, [*covered(model), *passing], (*versions.graph_entries(), Filled))
        if id(tensor) not in constants & known
    ]
    if stray:
        more = f" (as are {len(stray) - 1} others)" if len(stray) > 1 else ""
        return f"{stray[0]!r} is a tensor that is neither a parameter nor a buffer, and would keep what it holds{more}"
    for name, buffer in model.named_buffers():
        if name not in found.names and id(buffer) not in known:
            return f"the buffer {name!r} came after loading"
    for path, (tensor, then) in found.others.items():
        if digest(tensor) != then:
            return f"{path!r} was changed after loading, perhaps to what belongs to the weights before"
    if hooks(model) != found.hooks:
        return "functions have been hung on its modules since loading (hooks), which may change what they compute"
    now = numbers(model)
    for key in sorted(now.keys() | found.numbers.keys()):
        if versions.made_late(key):
            continue
        before, after = (repr(values[key]) if key in values else "nothing" for values in (found.numbers, now))
        if before != after:
            name = key.replace("|", ".")
            return f"{name!r} was changed after loading, from {before} to {after}, perhaps by the weights before"
    return None


def require_known(opened: Opened, path: str, found: Filled) -> None:
    """A configuration that one side does not know is equal to none; and vLLM's version is the engine's.

    Raises:
        MismatchError: one is not known, or another minor version of vLLM has frozen it.
    """
    theirs = opened.snapshot.header.identity
    for which, known in ((f"{path!r}", theirs.config), ("the engine", found.identity.config)):
        if known is None:
            raise MismatchError(f"the configuration of {which} is not known, so it cannot be swapped in; {OTHER_WAYS}")
    versions_of = [str(one.engine_version).split(".")[:2] for one in (theirs, found.identity)]
    if versions_of[0] != versions_of[1]:
        raise MismatchError(
            f"{path!r} was frozen by vLLM {theirs.engine_version}, this is {found.identity.engine_version}, which may "
            "load other tensors; freeze it again"
        )


def require_alike(opened: Opened, path: str, model: torch.nn.Module, found: Filled) -> None:
    """The snapshot fills what loading filled, in the same shapes, and sets the same plain values.

    Raises:
        MismatchError: by name.
    """
    targets, required = fillable(model)
    match(opened.snapshot, targets, required, path)
    held = {tensor.name for tensor in opened.snapshot.index.tensors}
    differing = sorted(held ^ found.names)
    if differing:
        side = "fills" if differing[0] in held else "does not fill"
        raise MismatchError(
            f"{path!r} {side} {differing[0]!r}, other than what the engine was loaded from; {OTHER_WAYS}"
        )
    theirs = opened.snapshot.header.attributes
    for key in sorted(theirs.keys() | found.attributes.keys()):
        ours, other = (repr(side[key]) if key in side else "nothing" for side in (found.attributes, theirs))
        if ours != other:
            raise MismatchError(
                f"{path!r} sets {key.replace('|', '.')!r} to {other}, the engine has {ours}, which may be part of its "
                f"compiled code; {OTHER_WAYS}"
            )
