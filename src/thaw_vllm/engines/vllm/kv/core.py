"""The engine core's part: which blocks are cached, and making thawed ones known; called through vLLM's utility calls.

Runs in the core's busy loop, between two steps: the pool does not change meanwhile, and the workers do what is asked of
them after the steps that were asked before, so that pages are whole. Arguments and results are plain values.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .... import __version__, errors
from ....errors import MismatchError, ThawError, UnsupportedError, UsageError
from ....format.identity import Identity, require
from ....format.kv import Group, Layout, require_layout
from ....kv.read import read_table
from ....kv.table import NONE, Builder, Table
from ....weights.open import open_rank
from .. import versions
from . import recorder

_LEAVE = 0.25
"""Share of a pool's blocks that a freeze beside requests leaves free; else the engine waits for it."""
PAUSE = 0.02
"""Seconds between two questions about a job."""
METHODS = ("thaw_kv_info", "thaw_kv_freeze", "thaw_kv_job", "thaw_kv_restore")


def install() -> None:
    """Give the engine core its methods and the pool its memory, where this process has them; again does nothing."""
    core = versions.engine_core()
    if core is None:
        return
    recorder.install()
    for name, action in {
        "add_request": lambda core, *_: _reap(core),
        "collective_rpc": _note_call,
        "pause_scheduler": lambda core, *_: _settle(core),
        "reset_prefix_cache": lambda core, *_: _settle(core),
        "sleep": _note_sleep,
    }.items():
        versions.before(name, action)
    for name, work in zip(METHODS, (info, freeze, job, restore), strict=True):
        if not hasattr(core, name):
            setattr(core, name, _answering(work))


_HARMLESS = frozenset(
    [
        "add_lora",
        "check_health",
        "execute_dummy_batch",
        "list_loras",
        "pin_lora",
        "profile",
        "remove_lora",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "sleep",
        "wake_up",
    ]
)
"""What workers can be asked through ``collective_rpc`` that leaves their weights alone, beside thaw's own methods."""
_CHANGED = "_thaw_weights_changed"


def _note_call(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Any other call may change weights (``reload_weights``, ``update_weights``, a function of the user's)."""
    method = args[0] if args else kwargs.get("method")
    if not (isinstance(method, str) and (method in _HARMLESS or method.startswith("thaw_"))):
        setattr(core, _CHANGED, True)


def _note_sleep(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Level 2 drops the weights, and somebody has to bring them back."""
    level = args[0] if args else kwargs.get("level", 1)
    if not isinstance(level, int) or level > 1:
        setattr(core, _CHANGED, True)
    _settle(core)


def _settle(core: Any) -> None:
    """Wait for freezes in the background: their blocks are in use, which a reset would answer with a refusal."""
    while any(not job.answers for job in _jobs(core).values()):
        _reap(core)
        time.sleep(PAUSE)


def _reap(core: Any) -> None:
    """Let go of what freezes hold that have ended, whether or not anybody asks about them."""
    for name, found in _jobs(core).items():
        if not found.answers:
            _look(core, name, keep=True)


def _answering(work: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(work)
    def answer(core: Any, options: dict[str, Any]) -> dict[str, Any]:
        try:
            return work(core, options)
        except ThawError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # vLLM would say only that a call failed
            return {"error": "ThawError", "message": f"unexpected {type(error).__name__}: {error}"}

    return answer


def raised(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer, or the error that it tells of."""
    if "error" in answer:
        kind = getattr(errors, answer["error"], ThawError)
        raise kind(answer["message"])
    return answer


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
        "model": _model(core, options.get("model"), required=False),
    }


def freeze(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Write cached blocks to a file.

    Args:
        options: ``path``, ``force``, ``model``; ``prefixes``: a list of ``{"tokens": [...], "salt": text or None}``,
            None for everything; ``request``: the id of a running request, in place of prefixes; ``background``: let the
            engine go on meanwhile.

    Returns:
        ``bytes``, ``blocks``, ``prefixes``, ``tokens`` (of the longest), ``skipped`` (reason to number of blocks),
        ``seconds``, ``files``; or ``{"job": id}``, which ``job`` is to be asked about until it has these.

    Notes:
        A block that is cached is full and is never written to again. So once its reference is held, which keeps it from
        being given to somebody else, its pages can be read at any time after the steps that were asked for before.
    """
    start = time.perf_counter()
    pool = versions.block_pool(core)
    _awake(core)
    _describe(core, pool)  # what a rank refuses, it refuses before the others wait for it
    _reap(core)
    layout = _layout(core, pool)
    model = _model(core, options.get("model"), required=True)
    prefixes = options.get("prefixes")
    if options.get("request") is not None:
        prefixes = [_of_request(core, options["request"])]
    selection = _Selection(core, pool, layout)
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
    found = _Job(held, options["path"], table, selection.skipped, start)
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
                },
            ),
        )
    except BaseException:
        pool.free_blocks(reversed(held))
        raise
    if any("running" in answer for answer in answers):
        _jobs(core)[name] = found
        return {"job": name}
    pool.free_blocks(reversed(held))
    return found.report(answers)


def job(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What ``freeze`` gives, of one in the background; ``{"job": id}`` while it goes on.

    Args:
        options: ``job``: the id.
    """
    if options["job"] not in _jobs(core):
        raise UsageError(f"there is no job {options['job']!r}; it was asked about before, or never begun")
    return _look(core, options["job"])


@dataclass
class _Job:
    """A freeze; ``answers`` once the workers have ended theirs and nobody has asked yet."""

    held: list[Any]
    path: str
    table: Table
    skipped: dict[str, int]
    start: float
    answers: list[dict[str, Any]] = field(default_factory=list)

    def report(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        reports = [raised(answer) for answer in sorted(answers, key=lambda a: "rank " in a.get("message", ""))]
        leaves = self.table.leaves()
        return {
            "path": self.path,
            "bytes": sum(report["bytes"] for report in reports),
            "blocks": len(self.table.blocks),
            "prefixes": len(leaves),
            "tokens": self.table.depths()[leaves[0]] * self.table.block_size,
            "skipped": self.skipped,
            "files": [report["path"] for report in reports],
            "seconds": time.perf_counter() - self.start,
        }


def _jobs(core: Any) -> dict[str, _Job]:
    found: dict[str, _Job] | None = getattr(core, "_thaw_jobs", None)
    if found is None:
        found = core._thaw_jobs = {}
    return found


def _look(core: Any, name: str, *, keep: bool = False) -> dict[str, Any]:
    """Ask the workers about a job and let go of its blocks when they have ended; ``keep`` leaves the report there."""
    found = _jobs(core)[name]
    if not found.answers:
        answers = core.model_executor.collective_rpc("thaw_kv_job", args=({"job": name},))
        if any("running" in answer for answer in answers):
            return {"job": name}
        found.answers = answers
        held, found.held = found.held, []
        versions.block_pool(core).free_blocks(reversed(held))
    if keep:
        return {"job": name}
    del _jobs(core)[name]
    return found.report(found.answers)


class _Selection:
    """Cached blocks of prefixes, and a slot for each physical block among them.

    A group with a window keeps the pages of a prefix's end only. Groups without need all of them: a block is worth
    nothing once one before it is gone.
    """

    def __init__(self, core: Any, pool: Any, layout: Layout) -> None:
        self._core, self._pool, self._groups = core, pool, len(layout.groups)
        self._whole = [number for number, group in enumerate(layout.groups) if group.window is None]
        self.builder = Builder(pool.hash_block_size, self._groups)
        self.ids: list[int] = []
        self.skipped: dict[str, int] = {}
        self._slots: dict[int, int] = {}

    def prefix(self, tokens: list[int], salt: str | None) -> None:
        """As far as it is cached."""
        hashed, size = versions.block_hasher(self._core), self._pool.hash_block_size
        found: list[tuple[tuple[int, ...], bytes, str | None]] = []
        name, last = None, 0
        for at in range(0, len(tokens) - size + 1, size):
            ids = tuple(tokens[at : at + size])
            own = salt if at == 0 else None
            name = hashed(name, ids, own)
            if self._broken(name):
                break
            found.append((ids, name, own))
            last = len(found) if self._cached(name) else last
        parent = NONE
        for ids, name, own in found[:last]:
            parent = self.builder.add(parent, ids, self._slots_of(name), name, own)

    def everything(self) -> None:
        """Every cached block whose prefix is known from its first token on."""
        entries, placed = recorder.known(self._pool), dict[bytes, int]()
        seen = set[bytes]()
        for block in versions.cached_blocks(self._pool):
            name = versions.hash_of(block)
            if name in seen:
                continue
            seen.add(name)
            chain, at = list[bytes](), name
            why = ""
            while at not in placed:
                entry = entries.get(at)
                if entry is None:
                    why = "of which the tokens are not known: cached before thaw was there, or moved since"
                    break
                if entry.foreign or self._broken(at):
                    why = entry.foreign or "whose prefix is cached no more"
                    break
                chain.append(at)
                if entry.parent is None:
                    break
                at = entry.parent
            if why:
                self.skipped[why] = self.skipped.get(why, 0) + 1
                continue
            for name in reversed(chain):
                entry = entries[name]
                parent = NONE if entry.parent is None else placed[entry.parent]
                ids = tuple(array("i", entry.tokens))
                placed[name] = self.builder.add(parent, ids, self._slots_of(name), name, entry.salt)

    def _cached(self, name: bytes) -> bool:
        keys = (versions.block_key(name, group) for group in range(self._groups))
        return any(versions.cached_block(self._pool, key) is not None for key in keys)

    def _broken(self, name: bytes) -> bool:
        """Whether a group that needs the block does not have it."""
        keys = (versions.block_key(name, group) for group in self._whole)
        return any(versions.cached_block(self._pool, key) is None for key in keys)

    def _slots_of(self, name: bytes) -> tuple[int, ...]:
        found = []
        for group in range(self._groups):
            block = versions.cached_block(self._pool, versions.block_key(name, group))
            if block is None:
                found.append(NONE)
                continue
            if block.block_id not in self._slots:
                self._slots[block.block_id] = len(self.ids)
                self.ids.append(block.block_id)
            found.append(self._slots[block.block_id])
        return tuple(found)


def restore(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Bring blocks of a file into the pool, so that the next request with such a prefix finds them.

    Nothing that is in use is touched, and nothing that is cached makes room unless ``evict`` says so.

    Args:
        options: ``path``, ``model``, ``evict``.

    Returns:
        ``blocks`` thawed, ``present`` before, ``left_out`` for want of room; ``prefixes``, and ``tokens`` of the
        longest that is whole in the cache now; ``bytes``, ``seconds``.
    """
    start = time.perf_counter()
    _awake(core)
    pool, path = versions.block_pool(core), options["path"]
    layout = _layout(core, pool)
    model = _model(core, options.get("model"), required=True)
    described = _describe(core, pool)
    wanted = Identity.from_json(described["identity"] | {"model": model})
    table = _read_table(path, wanted, layout)
    hashed = versions.block_hasher(core)
    names: list[bytes] = []
    for block in table.blocks:
        parent = None if block.parent == NONE else names[block.parent]
        names.append(hashed(parent, block.tokens, block.salt))
    missing: list[tuple[int, int, int]] = []  # block, group, slot
    present = []
    for number, block in enumerate(table.blocks):
        for group, slot in enumerate(block.slots):
            if slot == NONE:
                continue
            there = versions.cached_block(pool, versions.block_key(names[number], group))
            if there is None:
                missing.append((number, group, slot))
            else:
                present.append(there)
    pool.touch(present)  # they must not make room for the others
    blocks: list[Any] = []
    moved, depths = 0, table.depths()
    try:
        room = pool.get_num_free_blocks() if options.get("evict") else versions.uncached_free(pool)
        chosen, left_out = _choose(table, missing, room)
        if chosen:
            blocks = pool.get_new_blocks(len(chosen))
            answers = core.model_executor.collective_rpc(
                "thaw_kv_fill",
                args=(
                    {
                        "path": path,
                        "model": model,
                        "blocks": pool.num_gpu_blocks,
                        "layout": layout.to_json(),
                        "slots": [slot for _, _, slot in chosen],
                        "ids": [block.block_id for block in blocks],
                    },
                ),
            )
            moved = sum(raised(answer)["bytes"] for answer in answers)
            for (number, group, _), block in zip(chosen, blocks, strict=True):
                key = versions.block_key(names[number], group)
                versions.insert_block(pool, key, block, depths[number] * table.block_size)
                source = table.blocks[number]
                parent = None if source.parent == NONE else names[source.parent]
                recorder.note(pool, names[number], parent, source.tokens, source.salt)
    finally:
        # The ends of prefixes go first, should room be needed.
        pool.free_blocks(reversed(blocks))
        pool.free_blocks(reversed(present))
    whole = [
        all(
            slot == NONE or versions.cached_block(pool, versions.block_key(names[number], group)) is not None
            for group, slot in enumerate(block.slots)
        )
        for number, block in enumerate(table.blocks)
    ]
    reached: list[int] = []
    for number, block in enumerate(table.blocks):
        before = 0 if block.parent == NONE else reached[block.parent]
        reached.append(before + 1 if whole[number] and before == depths[number] - 1 else before)
    return {
        "path": path,
        "blocks": len(chosen),
        "present": len(present),
        "left_out": left_out,
        "prefixes": len(table.leaves()),
        "tokens": max(reached, default=0) * table.block_size,
        "bytes": moved,
        "seconds": time.perf_counter() - start,
    }


def _choose(table: Table, missing: list[tuple[int, int, int]], room: int) -> tuple[list[tuple[int, int, int]], int]:
    """What fits of what is missing: whole prefixes, the longest first, and of the last one its beginning."""
    if len(missing) <= room:
        return missing, 0
    of_block: dict[int, list[tuple[int, int, int]]] = {}
    for item in missing:
        of_block.setdefault(item[0], []).append(item)
    chosen: list[tuple[int, int, int]] = []
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


def _read_table(path: str, wanted: Identity, layout: Layout) -> Table:
    """Rank 0's table of blocks, verified, once the file is known to be of these weights and this layout."""
    with open_rank(path, 0) as opened:
        header = opened.snapshot.header
        if header.kv is None:
            raise MismatchError(f"{path!r} holds weights, not KV blocks; thaw_vllm.load(..., snapshot=...) thaws those")
        require(header.identity, wanted, path)
        if header.identity.model is None:
            raise MismatchError(f"{path!r} does not say which weights made it; freeze again")
        # Regions differ between ranks, and each holds its own against its file.
        require_layout(header.kv, layout, path, regions=False)
        return read_table(opened)


def _layout(core: Any, pool: Any) -> Layout:
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


def _awake(core: Any) -> None:
    if versions.is_sleeping(core):
        raise UsageError("the engine is asleep or paused, and its cache may be gone; wake it up first")


def _describe(core: Any, pool: Any) -> dict[str, Any]:
    answers = core.model_executor.collective_rpc("thaw_kv_describe", args=({"blocks": pool.num_gpu_blocks},))
    first, *_ = [raised(answer) for answer in answers]
    return first


def _model(core: Any, given: str | None, *, required: bool) -> str | None:
    """The model id: what the workers' loader knew, or what the caller says.

    Raises:
        UsageError: neither.
        MismatchError: they differ.
    """
    known = {answer for answer in core.model_executor.collective_rpc("thaw_model_id") if answer is not None}
    if getattr(core, _CHANGED, False):
        known = set()
    if given is not None and known - {given}:
        raise MismatchError(f"the engine holds the model {known.pop()}, not {given}; leave the model id out")
    found = known.pop() if known else given
    if found is None and required:
        raise UsageError(
            "it is not known which weights this engine holds (they may have been changed), and KV blocks are worth "
            "nothing without: ask "
            "'thaw id MODEL' and pass what it says (model_id=...), or start the engine from a snapshot"
        )
    return found


def _of_request(core: Any, request: str) -> dict[str, Any]:
    """Tokens of a live request, by its id or by how that begins (vLLM adds to the ids that it is given)."""
    live = core.scheduler.requests
    found = [live[request]] if request in live else [r for name, r in live.items() if name.startswith(f"{request}-")]
    if len(found) != 1:
        names = ", ".join([*live][:5]) + (f" and {len(live) - 5} more" if len(live) > 5 else "") or "none"
        raise UsageError(f"{len(found)} running requests are called {request!r}; running are: {names}")
    return {"tokens": list(found[0].all_token_ids), "salt": found[0].cache_salt}


def path_of(path: str | os.PathLike[str]) -> str:
    """A path that means the same in every process of an engine."""
    return os.path.abspath(os.fspath(path))
