"""The cache of one prompt: written from a transformers model's cache object, and made again for the same model."""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import __version__
from ...errors import MismatchError, UnsupportedError, UsageError
from ...format.dtypes import ITEM_SIZE
from ...format.header import Header
from ...format.identity import Identity, require
from ...format.kv import MAX_BLOCK_SIZE, PAGES, Group, Layout, Region
from ...kv.read import count_slots, read_table
from ...kv.table import NONE, Block, Table
from ...transport.collector import collection_paused
from ...transport.writer import check_target
from ...weights.capture import Named, capture
from ...weights.freeze import FreezeOptions, FreezeReport, write_snapshot
from ...weights.layout import dtype_name
from ...weights.open import Opened, open_snapshot
from ...weights.reading import RestoreOptions
from ...weights.restore import restore
from .identity import checked_id, model_device, model_identity, own_id

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, StaticCache

KIND = "full_attention"
"""What transformers calls layers that keep every token, in its configs' ``layer_types``."""
PARTS = ("key", "value")

logger = logging.getLogger(__name__)


def freeze_cache(
    model: PreTrainedModel,
    cache: DynamicCache | StaticCache,
    token_ids: Sequence[int] | torch.Tensor,
    path: str | os.PathLike[str],
    *,
    model_id: str | None = None,
    force: bool = False,
) -> FreezeReport:
    """Write a prompt's keys and values to a ``.thawkv`` file.

    Args:
        model: that made the cache, on one device.
        cache: of one sequence without padding; must not change until this returns.
        token_ids: of every token in the cache, ``(tokens,)`` or ``(1, tokens)``. After ``generate`` that is all but
            the last one. That they made this cache is the caller's word.
        path: the file; it appears whole or not at all.
        model_id: which weights these are (``thaw id``), to be given again when restoring. By default it is computed
            from the model's tensors, at the price of hashing them all.
        force: replace an existing file.

    Raises:
        UsageError: token ids that cannot be this cache's.
        UnsupportedError: a model or a cache that a file does not hold exactly: several sequences, sliding windows,
            recurrent states, quantised or offloaded layers.
        ExistsError, SpaceError, StorageError: nothing was written; what was there before is untouched.

    Notes:
        The file holds the token ids, so the prompt, in the clear; its mode is 0600.
    """
    identity = model_identity(model)
    given = None if model_id is None else checked_id(model_id)
    ids = _token_ids(token_ids)
    layers = _layers(cache, _layer_count(model))
    check_target(Path(path), force)
    named: list[Named] = []
    for name, (dtype, shape, data) in Table(len(ids), 1, (Block(NONE, ids, (0,)),)).encode().items():
        named.append((name, "tensor", torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)))
    shapes = []
    for number, layer in enumerate(layers):
        for part, tensor in zip(PARTS, _held(layer, number, len(ids), str(identity.dtype)), strict=True):
            shapes.append(tuple(tensor.shape))
            pages = tensor.detach().contiguous().view(torch.uint8).view(1, -1)
            named.append((f"{PAGES}{_layer(number)}.{part}", "tensor", pages))
    captured = capture(named)
    if captured.index.ties:
        raise UnsupportedError("layers of this cache share memory; give a copy (copy.deepcopy) of it")
    header = Header(
        identity=replace(identity, model=given or own_id(model)),
        writer=f"thaw {__version__}",
        kv=_layout(len(ids), str(identity.dtype), shapes),
    )
    return write_snapshot(path, header, captured, FreezeOptions(force=force))


def restore_cache(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    cache: StaticCache | None = None,
    model_id: str | None = None,
) -> tuple[DynamicCache | StaticCache, list[int]]:
    """Make a frozen cache again, bit for bit, on the model's device.

    Args:
        model: with the weights, config and dtype of the one that made it.
        path: the file.
        cache: filled in place, whatever it held; without one a DynamicCache is made.
        model_id: as given when freezing, and only then.

    Returns:
        The cache, and the token ids that it stands for. The caller owns both.

    Raises:
        MismatchError: the cache of another model, of another engine, or no cache.
        UsageError: ``cache`` has no room for it.
        UnsupportedError: as for ``freeze_cache``.
        FormatError, CorruptionError, StorageError: the file is unsound. ``cache`` is as it was, whatever was raised.
    """
    own = model_identity(model)
    given = None if model_id is None else checked_id(model_id)
    count, device = _layer_count(model), model_device(model)
    if cache is not None:
        _require_static(cache, count)
    with collection_paused(), open_snapshot(path) as opened:
        header, name = opened.snapshot.header, opened.source.name
        require(header.identity, replace(own, config=None), name)
        _require_config(header.identity, own, name)
        ids = _prefix(opened)
        layout = _require_layout(header.kv, count, str(own.dtype), name)
        if cache is not None:
            _require_room(cache, layout, device)
        _require_model(header.identity, given or own_id(model), name)
        _warn_of_version(header.identity, own, name)
        targets = {
            tensor.name: torch.empty(
                tensor.shape,
                dtype=getattr(torch, tensor.dtype),
                device=device if tensor.name.startswith(PAGES) else "cpu",
            )
            for tensor in opened.snapshot.index.tensors
        }
        restore(opened.source, opened.snapshot, targets, set(targets), RestoreOptions())
    pages = [
        targets[PAGES + region.name].view(-1).view(getattr(torch, region.dtype)).view(region.shape)
        for region in layout.regions
    ]
    return _fill(cache, pages), ids


def _fill(cache: Any, pages: list[torch.Tensor]) -> Any:
    from transformers import DynamicCache

    # What was allocated in inference mode can be written in it only, and the other way round.
    old = cache is not None and any(layer.is_initialized and layer.keys.is_inference() for layer in cache.layers)
    with torch.inference_mode() if old else torch.no_grad():
        if cache is None:
            cache = DynamicCache()  # with a config, layers could be of another kind than those that were frozen
        else:
            cache.reset()
        for number in range(len(pages) // 2):
            cache.update(pages[2 * number], pages[2 * number + 1], number)
    return cache


def _token_ids(given: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    if isinstance(given, torch.Tensor):
        if given.dim() == 2 and given.shape[0] > 1:
            raise UnsupportedError(f"token ids of {given.shape[0]} sequences; a file holds one, freeze each by itself")
        given = given[0].tolist() if given.dim() == 2 and given.shape[0] else given.tolist()
    try:
        found = tuple(operator.index(token) for token in given)
    except TypeError:
        raise UsageError("token_ids must be integers: a flat list, or a tensor (tokens,) or (1, tokens)") from None
    if not found:
        raise UsageError("there is nothing to freeze: token_ids is empty")
    if min(found) < 0 or max(found) >= 1 << 31:
        raise UsageError("token_ids must be from 0 to 2^31 - 1")
    if len(found) > MAX_BLOCK_SIZE:
        raise UnsupportedError(f"{len(found)} tokens; in this version a file holds a cache of at most {MAX_BLOCK_SIZE}")
    return found


def _layer_count(model: PreTrainedModel) -> int:
    """Layers that a cache of this model has.

    Raises:
        UnsupportedError: a version of transformers whose caches are made in another way.
    """
    import transformers

    try:
        found = transformers.DynamicCache(config=model.config).layers
        if hasattr(transformers, "StaticCache") and hasattr(transformers.cache_utils, "StaticLayer"):
            return len(found)
    except (AttributeError, TypeError):
        pass
    raise UnsupportedError(
        f"transformers {transformers.__version__} keeps caches in a way that is not known here; use 4.56 or a later one"
    )


def _layers(cache: Any, count: int) -> list[Any]:
    """The layers of a cache that keeps every token as it was computed.

    Raises:
        UsageError: some are missing.
        UnsupportedError: it is of another kind.
    """
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicLayer, StaticLayer

    # Exactly these: what derives from them computes or keeps something else.
    if type(cache) not in (DynamicCache, StaticCache):
        raise UnsupportedError(
            f"a {type(cache).__name__} is not supported in this version; a DynamicCache or StaticCache is"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedError("a cache that is offloaded is not supported in this version; make it without offloading")
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise UnsupportedError(
                f"layer {number} of the cache is a {type(layer).__name__}; only layers that keep every token as it was "
                "computed (DynamicLayer, StaticLayer) are supported in this version"
            )
    if len(cache.layers) != count:
        raise UsageError(
            f"the cache has {len(cache.layers)} layers, the model's has {count}; run the model on it first"
        )
    return list(cache.layers)


def _held(layer: Any, number: int, tokens: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens: ``(1, heads, tokens, head size)`` each."""
    if not layer.is_initialized or layer.keys is None:
        raise UsageError(f"layer {number} of the cache is empty; run the model on it first")
    for tensor in (layer.keys, layer.values):
        if tensor.dim() != 4 or not tensor.numel():
            raise UnsupportedError(f"layer {number} of the cache has the shape {list(tensor.shape)}, not known here")
        if tensor.shape[0] != 1:
            raise UnsupportedError(
                f"the cache holds {tensor.shape[0]} sequences and a file one; freeze each by itself "
                "(batch_select_indices picks one)"
            )
        if dtype_name(tensor.dtype) != dtype:
            raise UnsupportedError(
                f"layer {number} of the cache is {dtype_name(tensor.dtype)}, the model {dtype}; make the cache with "
                "the model as it is, without autocast"
            )
    held = int(layer.get_seq_length())
    if held != tokens:
        raise UsageError(
            f"layer {number} of the cache holds {held} tokens, token_ids are {tokens}; give the ids of exactly those "
            "in the cache (generate leaves its last token out of it)"
        )
    return layer.keys[:, :, :held], layer.values[:, :, :held]


def _layer(number: int) -> str:
    return f"layers.{number}"


def _layout(tokens: int, dtype: str, shapes: Sequence[tuple[int, ...]]) -> Layout:
    """One block that is the whole prefix. Shapes: of keys and values, layer after layer."""
    names = [_layer(number) for number in range(len(shapes) // 2)]
    regions = []
    for name, shape in zip([f"{n}.{part}" for n in names for part in PARTS], shapes, strict=True):
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        regions.append(Region(name, dtype, shape, stride, math.prod(shape) * ITEM_SIZE[dtype]))
    return Layout(tokens, dtype, (Group(KIND, None, tuple(names)),), tuple(regions))


def _prefix(opened: Opened) -> list[int]:
    """Token ids of a file that holds one block with one page: a whole cache."""
    table, slots = read_table(opened), count_slots(opened)
    if slots != 1 or [(b.parent, b.slots, b.salt) for b in table.blocks] != [(NONE, (0,), None)]:
        raise MismatchError(f"{opened.source.name!r} does not hold one cache, whole; give what freeze_cache wrote")
    return list(table.blocks[0].tokens)


def _require_layout(found: Layout | None, count: int, dtype: str, name: str) -> Layout:
    """A file's layout, once it is one that a cache of ``count`` layers has; heads and their size are the file's."""
    assert found is not None  # of the stage kv
    shapes = [region.shape for region in found.regions]
    fits = len(shapes) == 2 * count and all(
        len(shape) == 4 and shape[0] == 1 and shape[2] == found.block_size for shape in shapes
    )
    if not fits or replace(found, algorithm="", none_hash="") != _layout(found.block_size, dtype, shapes):
        raise MismatchError(
            f"{name!r} holds a cache of other layers, shapes or element type than this model's; freeze again with this "
            "version of transformers"
        )
    return found


def _require_config(found: Identity, own: Identity, name: str) -> None:
    if found.config != own.config:
        raise MismatchError(
            f"{name!r} holds config {found.config}, this model has {own.config}: a value of its config, the version of "
            "transformers or the element type of a buffer differs (model.to(dtype) rounds rotary tables, "
            "from_pretrained(dtype=...) does not); load the model as it was when freezing, or freeze again"
        )


def _require_model(found: Identity, own: str, name: str) -> None:
    if found.model != own:
        raise MismatchError(
            f"{name!r} holds a cache of the model {found.model}, this one is {own}; freeze again with these weights, "
            "or pass the model_id that was given when freezing"
        )


def _require_static(cache: Any, count: int) -> None:
    from transformers import StaticCache

    if type(cache) is not StaticCache:
        raise UsageError(f"cache is a {type(cache).__name__}; give a StaticCache, or none to get a DynamicCache")
    _layers(cache, count)


def _require_room(cache: Any, layout: Layout, device: torch.device) -> None:
    """Hold a StaticCache against what will be put into it."""
    for number, layer in enumerate(cache.layers):
        if layer.max_cache_len < layout.block_size:
            raise UsageError(
                f"the StaticCache has room for {layer.max_cache_len} tokens, the file holds {layout.block_size}; make "
                "it with a larger max_cache_len"
            )
        if not layer.is_initialized:
            continue
        for region, tensor in zip(layout.regions[2 * number :], (layer.keys, layer.values), strict=False):
            wanted = (*region.shape[:2], layer.max_cache_len, region.shape[3])
            if (tuple(tensor.shape), dtype_name(tensor.dtype), tensor.device) != (wanted, region.dtype, device):
                raise UsageError(
                    f"layer {number} of the StaticCache is {dtype_name(tensor.dtype)} {list(tensor.shape)} on "
                    f"{tensor.device}, and {region.dtype} {list(wanted)} on {device} is needed; make a new one"
                )


def _warn_of_version(found: Identity, own: Identity, name: str) -> None:
    ours, theirs = (str(i.engine_version).split(".")[:2] for i in (found, own))
    if ours != theirs:
        logger.warning("%r was frozen with transformers %s, this is %s", name, found.engine_version, own.engine_version)
