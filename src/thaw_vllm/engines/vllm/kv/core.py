"""The engine core's part: which blocks are cached, and making thawed ones known; called through vLLM's utility calls.

Runs in the core's busy loop, between two steps: the pool does not change meanwhile, and the workers do what is asked of
them after the steps that were asked before, so that pages are whole. Arguments and results are plain values.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from .... import __version__
from ....errors import MismatchError, UnsupportedError, UsageError
from ....format.identity import Identity, require
from ....format.kv import Group, Layout, require_layout
from ....kv.read import freeze_of, read_table
from ....kv.table import NONE, Table
from ....transport.collector import collection_paused
from ....weights.open import Opened, open_rank
from ....weights.waterfall import Phases
from .. import versions
from ..answers import all_raised, answering
from . import recorder, watch
from .jobs import Job, jobs, look, reap, slowest
from .lent import lending
from .selection import Selection

_LEAVE = 0.25
"""Share of a pool's blocks that a freeze beside requests leaves free; else the engine waits for it."""
METHODS = ("thaw_kv_info", "thaw_kv_freeze", "thaw_kv_job", "thaw_kv_expect", "thaw_kv_restore")


def install() -> None:
    """Give the engine core its methods and the pool its memory, where this process has them; again does nothing."""
    core = versions.engine_core()
    if core is None:
        return
    recorder.install()
    watch.install()
    for name, work in zip(METHODS, (info, freeze, job, expect, restore), strict=True):
        if not hasattr(core, name):
            setattr(core, name, answering(work))


def info(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What the cache holds: blocks, those whose tokens are known, and which weights made them."""
    pool = versions.block_pool(core)
    cached = versions.cached_blocks(pool)
    entries = recorder.known(pool)
    with_tokens = sum(versions.hash_of(block) in entries for block in cached)
    return {
        "blocks": pool.num_gpu_blocks,
        "free": pool.get_num_free_blocks(),
        "cached": len(cached),
        "known": with_tokens,
        "block_size": pool.hash_block_size,
        "model": model_of(core, options.get("model"), required=False),
    }


def freeze(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write cached blocks to a file.

    Args:
        options: ``path``, ``force``, ``model``; ``prefixes``: a list of ``{"tokens": [...], "salt": text or None}``,
            None for everything; ``request``: the id of a running request, in place of prefixes; ``background``: let the
            engine go on meanwhile.

    Returns:
        ``bytes``, ``blocks``, ``prefixes``, ``tokens`` (of the longest), ``skipped`` (reason to number of blocks),
        ``seconds``, ``phases``, ``files``; or ``{"job": id}``, which ``job`` is to be asked about until it has these.

    Notes:
        A block that is cached is full and is never written to again. So once its reference is held, which keeps it from
        being given to somebody else, its pages can be read at any time after the steps that were asked for before.
    """
    phases = Phases()
    pool = versions.block_pool(core)
    require_awake(core)
    describe(core, pool)  # what a rank refuses, it refuses before the others wait for it
    reap(core)
    layout = core_layout(core, pool)
    model = model_of(core, options.get("model"), required=True)
    phases.end("identify")
    prefixes = options.get("prefixes")
    if options.get("request") is not None:
        live = live_request(core, options["request"])
        prefixes = [{"tokens": list(live.all_token_ids), "salt": live.cache_salt}]
    selection = Selection(core, pool, layout)
    if prefixes is None:
        selection.everything()
    else:
        for prefix in prefixes:
            selection.prefix(prefix["tokens"], prefix.get("salt"))
    table = selection.builder.table()
    if not table.blocks:
        told = ", ".join(f"{count} {why}" for why, count in selection.skipped.items())
        raise UsageError(
            "there is nothing to freeze: none of these tokens fills a cached block"
            + (f" ({told})" if told else "")
            + f"; a block is {table.block_size} tokens, and the prompt must have been run here before"
        )
    held = versions.blocks_of(pool, selection.ids)
    phases.end("select")
    found = Job(held, options["path"], table, selection.skipped, phases)
    name = secrets.token_hex(8)
    pool.touch(held)
    # Beside requests only while they have room: what is held cannot be given to them.
    background = options.get("background") and pool.get_num_free_blocks() >= _LEAVE * pool.num_gpu_blocks
    try:
        answers = core.model_executor.collective_rpc(
            "thaw_kv_freeze",
            args=(
                {
                    "path": options["path"],
                    "force": bool(options.get("force")),
                    "blocks": pool.num_gpu_blocks,
                    "ids": selection.ids,
                    "layout": layout.to_json(),
                    "model": model,
                    "table": table.encode(),
                    "writer": f"thaw {__version__}",
                    "job": name if background else None,
                    "busy": versions.is_busy(core),
                },
            ),
        )
    except BaseException:
        pool.free_blocks(reversed(held))
        raise
    if any("running" in answer for answer in answers):
        jobs(core)[name] = found
        return {"job": name}
    pool.free_blocks(reversed(held))
    return found.report(answers)


def job(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``freeze`` gives, of one in the background; ``{"job": id}`` while it goes on.

    Args:
        options: ``job``: the id.
    """
    if options["job"] not in jobs(core):
        raise UsageError(f"there is no job {options['job']!r}; it was asked about before, or never begun")
    return look(core, options["job"])


def expect(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Have the workers make ready what a restore needs, which then takes less long; it may come, or not."""
    asked = {"blocks": versions.block_pool(core).num_gpu_blocks}
    all_raised(core.model_executor.collective_rpc("thaw_kv_expect", args=(asked,)))
    return {}


@collection_paused()
def restore(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Bring blocks of a file into the pool, so that the next request with such a prefix finds them.

    Nothing that is in use is touched, and nothing that is cached makes room unless ``evict`` says so.

    Args:
        options: ``path``, ``model``, ``evict``.

    Returns:
        ``blocks`` thawed, ``present`` before, ``left_out`` for want of room; ``prefixes``, and ``tokens`` of the
        longest that is whole in the cache now; ``bytes``, ``seconds``, ``phases``.
    """
    phases = Phases()
    require_awake(core)
    pool, path = versions.block_pool(core), options["path"]
    layout = core_layout(core, pool)
    described = describe(core, pool, _size(path))
    model = model_of(core, options.get("model"), required=True)
    phases.end("identify")
    wanted = Identity.from_json(described["identity"] | {"model": model})
    with open_rank(path, 0) as opened, lending(opened) as lent:
        table = _table(opened, path, wanted, layout)
        asked = {
            "path": path,
            "opened": lent,
            "model": model,
            "freeze": freeze_of(opened.snapshot.header),
            "blocks": pool.num_gpu_blocks,
            "layout": layout.to_json(),
        }
        phases.end("table")
        return {"path": path} | bring_in(core, pool, table, asked, bool(options.get("evict")), phases)


def bring_in(
    core: Any, pool: Any, table: Table, asked: dict[str, Any], evict: bool, phases: Phases, fill: str = "thaw_kv_fill"
) -> dict[str, Any]:
    """Have the workers fill blocks with what a table lists and is not cached, and make it known.

    Args:
        asked: of the workers, with ``slots`` of the table and ``ids`` of blocks added.
        evict: let cached blocks that nobody uses make room.
        fill: the workers' method.

    Returns:
        As ``restore``, but for the path.
    """
    names, key = _names(core, table), versions.block_keys()
    missing: list[_Page] = []
    present = []
    for number, block in enumerate(table.blocks):
        for group, slot in enumerate(block.slots):
            if slot == NONE:
                continue
            known_as = key(names[number], group)
            there = versions.cached_block(pool, known_as)
            if there is None:
                missing.append((number, group, slot, known_as))
            else:
                present.append(there)
    pool.touch(present)  # they must not make room for the others
    blocks: list[Any] = []
    moved, depths = 0, table.depths()
    try:
        room = pool.get_num_free_blocks() if evict else versions.uncached_free(pool, len(missing))
        chosen, left_out = _choose(table, missing, room)
        phases.end("choose")
        if chosen:
            blocks = pool.get_new_blocks(len(chosen))
            pages = {"slots": [slot for _, _, slot, _ in chosen], "ids": [block.block_id for block in blocks]}
            filled = all_raised(core.model_executor.collective_rpc(fill, args=(asked | pages,)))
            moved = sum(answer["bytes"] for answer in filled)
            phases.add(slowest(filled), "workers")
            for (number, _, _, known_as), block in zip(chosen, blocks, strict=True):
                versions.insert_block(pool, known_as, block, depths[number] * table.block_size)
            entries = recorder.known(pool)
            for number in dict.fromkeys(number for number, *_ in chosen):
                source = table.blocks[number]
                parent = None if source.parent == NONE else names[source.parent]
                recorder.note(entries, names[number], parent, source.tokens, source.salt)
    finally:
        # The ends of prefixes go first, should room be needed.
        pool.free_blocks(reversed(blocks))
        pool.free_blocks(reversed(present))
        phases.end("insert")
    absent = {number for number, *_ in set(missing) - set(chosen)} if left_out else set()
    return {
        "blocks": len(chosen),
        "present": len(present),
        "left_out": left_out,
        "prefixes": len(table.leaves()),
        "tokens": _reached(table, absent) * table.block_size,
        "bytes": moved,
        "seconds": phases.total,
        "phases": phases.seconds,
    }


_Page = tuple[int, int, int, bytes]
"""A page of a table: block, group, slot, and under which key the pool knows it."""


def _size(path: str) -> int:
    """Bytes of a file; 0 where there is none, which others find out."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _names(core: Any, table: Table) -> list[bytes]:
    """What this engine calls each block."""
    hashed = versions.block_hasher(core)
    names: list[bytes] = []
    for block in table.blocks:
        parent = None if block.parent == NONE else names[block.parent]
        names.append(hashed(parent, block.tokens, block.salt))
    return names


def _reached(table: Table, absent: set[int]) -> int:
    """Blocks of the longest prefix of which every page that the file holds is cached, all but ``absent`` blocks'."""
    depths = table.depths()
    if not absent:
        return max(depths, default=0)
    reached: list[int] = []
    for number, block in enumerate(table.blocks):
        before = 0 if block.parent == NONE else reached[block.parent]
        reached.append(before + 1 if number not in absent and before == depths[number] - 1 else before)
    return max(reached, default=0)


def _choose(table: Table, missing: list[_Page], room: int) -> tuple[list[_Page], int]:
    """What fits of what is missing: whole prefixes, the longest first, and of the last one its beginning."""
    if len(missing) <= room:
        return missing, 0
    of_block: dict[int, list[_Page]] = {}
    for item in missing:
        of_block.setdefault(item[0], []).append(item)
    chosen: list[_Page] = []
    done: set[int] = set()
    for leaf in table.leaves():
        for number in table.chain(leaf):
            if number in done:
                continue
            items = of_block.get(number, [])
            if len(chosen) + len(items) > room:
                break
            done.add(number)
            chosen += items
    return sorted(chosen), len(missing) - len(chosen)


def _table(opened: Opened, path: str, wanted: Identity, layout: Layout) -> Table:
    """Of rank 0's file, verified, once it is known to be of these weights and this layout."""
    header = opened.snapshot.header
    if header.kv is None:
        raise MismatchError(f"{path!r} holds weights, not KV blocks; thaw_vllm.load(..., snapshot=...) thaws those")
    require(header.identity, wanted, path)
    if header.identity.model is None:
        raise MismatchError(f"{path!r} does not say which weights made it; freeze again")
    # Regions differ between ranks, and each holds its own against its file.
    require_layout(header.kv, layout, path, regions=False)
    return read_table(opened)


def core_layout(core: Any, pool: Any) -> Layout:
    """The core's share of the layout; the workers know the regions."""
    config = core.vllm_config
    groups = []
    for number, group in enumerate(versions.kv_groups(core)):
        spec = group.kv_cache_spec
        kind = type(spec).__name__
        if not getattr(spec, "prefix_cacheable", True):
            raise UnsupportedError(f"KV group {number} ({kind}) is not cached by prefix; not in this version")
        if "Mamba" in kind or "State" in kind:
            raise UnsupportedError(f"KV group {number} ({kind}) keeps states, not keys and values; not in this version")
        if spec.block_size != pool.hash_block_size:
            raise UnsupportedError(
                f"KV group {number} ({kind}) has blocks of {spec.block_size} tokens and hashes of "
                f"{pool.hash_block_size}; groups of different block sizes are not in this version"
            )
        window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
        groups.append(Group(kind, window, tuple(group.layer_names)))
    algorithm = str(config.cache_config.prefix_caching_hash_algo)
    cache_dtype = config.cache_config.cache_dtype
    dtype = str(config.model_config.dtype).removeprefix("torch.") if cache_dtype == "auto" else str(cache_dtype)
    return Layout(
        pool.hash_block_size,
        dtype,
        tuple(groups),
        (),
        algorithm,
        # Where it is drawn for each process it protects that process's weaker hashes, and is nobody's business.
        versions.none_hash().hex() if algorithm.startswith("sha256") else "",
    )


def require_awake(core: Any) -> None:
    """Raises:
    UsageError: its cache may be gone.
    """
    if versions.is_sleeping(core):
        raise UsageError("the engine is asleep or paused, and its cache may be gone; wake it up first")


def describe(core: Any, pool: Any, moved: int | None = None) -> dict[str, Any]:
    """Rank 0's identity, once every rank has said that it understands its memory.

    Args:
        moved: bytes of the restore that this begins, so that what it needs is made ready meanwhile; None: of none.
    """
    options = {"blocks": pool.num_gpu_blocks, "moved": moved}
    answers = core.model_executor.collective_rpc("thaw_kv_describe", args=(options,))
    return all_raised(answers)[0]


def model_of(core: Any, given: str | None, *, required: bool) -> str | None:
    """The model id: what the workers' loader knew, or what the caller says.

    Raises:
        UsageError: neither.
        MismatchError: they differ.
    """
    known = {answer for answer in core.model_executor.collective_rpc("thaw_model_id") if answer is not None}
    if watch.weights_changed(core):
        known = set()
    if given is not None and known - {given}:
        raise MismatchError(f"the engine holds the model {known.pop()}, not {given}; leave the model id out")
    found = known.pop() if known else given
    if found is None and required:
        raise UsageError(
            "it is not known which weights this engine holds (they may have been changed), and KV blocks are worth "
            "nothing without: ask 'thaw id MODEL' and pass what it says (model_id=...), or start the engine from a "
            "snapshot"
        )
    return found


def live_request(core: Any, request: str) -> Any:
    """A live request of the scheduler's, by its id or by how that begins (vLLM adds to the ids that it is given).

    Raises:
        UsageError: there is none of that id, or there are several.
    """
    live = core.scheduler.requests
    found = [live[request]] if request in live else [r for name, r in live.items() if name.startswith(f"{request}-")]
    if len(found) != 1:
        names = ", ".join([*live][:5]) + (f" and {len(live) - 5} more" if len(live) > 5 else "") or "none"
        raise UsageError(f"{len(found)} running requests are called {request!r}; running are: {names}")
    return found[0]


def path_of(path: str | os.PathLike[str]) -> str:
    """A path that means the same in every process of an engine."""
    return os.path.abspath(os.fspath(path))
