"""The engine core's part: which blocks a session has, and making kept ones known again; between two steps."""

from __future__ import annotations

import os
from typing import Any

from .... import __version__
from ....errors import MismatchError, UnsupportedError
from ....format.identity import Identity, require
from ....format.kv import Layout, require_layout
from ....kv.table import NONE, Block, Table
from ....sessions.context import Context
from ....sessions.record import Session
from ....sessions.store import Store
from ....sessions.windows import kept_from, rest, usable
from ....transport.collector import collection_paused
from ....weights.waterfall import Phases
from .. import versions
from ..answers import all_raised, answering
from ..kv.core import bring_in, core_layout, describe, live_request, model_of, require_awake
from ..kv.jobs import reap, slowest
from ..kv.selection import Selection
from . import sampling

METHODS = ("thaw_session_keep", "thaw_session_restore")


def install() -> None:
    """Give the engine core its methods, where this process has it; again does nothing."""
    core = versions.engine_core()
    if core is None:
        return
    for name, work in zip(METHODS, (keep, restore_session), strict=True):
        if not hasattr(core, name):
            setattr(core, name, answering(work))
    versions.rebuild_requests(sampling.generated, sampling.whole)


def keep(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Have the workers write the blocks of a session that a store lacks. The caller holds the store's ``use``.

    Args:
        options: ``store``; ``tokens`` and ``salt``, or ``request``: the id of a running one; ``model``.

    Returns:
        What the record needs: ``tokens``, ``salt``, ``prompt`` (of a running request; else None), ``sampling``
        (likewise), ``model``, ``block_size``, ``blocks``, ``kept``, ``contexts``; and ``added`` blocks, ``bytes``
        written, ``seconds``, ``phases``.
    """
    phases = Phases()
    pool = versions.block_pool(core)
    require_awake(core)
    describe(core, pool)
    reap(core)
    layout = core_layout(core, pool)
    model = model_of(core, options.get("model"), required=True)
    found = _asked(core, options)
    phases.end("identify")
    selection = Selection(core, pool, layout)
    selection.prefix(found["tokens"], found["salt"])
    found_blocks = selection.builder.table().blocks

    def there(number: int, group: int) -> bool:
        return found_blocks[number].slots[group] != NONE

    count = usable(layout.groups, len(found_blocks), layout.block_size, there)
    blocks, kept = found_blocks[:count], kept_from(layout.groups, count, layout.block_size, there)
    pages = [(number, group) for group, first in enumerate(kept) for number in range(first, len(blocks))]
    ids = [selection.ids[blocks[number].slots[group]] for number, group in pages]
    held = versions.blocks_of(pool, [*dict.fromkeys(ids)])
    phases.end("select")
    pool.touch(held)  # nobody else is given them while they are read
    try:
        asked = {
            "store": options["store"],
            "blocks": pool.num_gpu_blocks,
            "layout": layout.to_json(),
            "model": model,
            "tokens": found["tokens"][: len(blocks) * layout.block_size],
            "salt": found["salt"],
            "pages": pages,
            "ids": ids,
        }
        answers = all_raised(core.model_executor.collective_rpc("thaw_session_write", args=(asked,)))
    finally:
        pool.free_blocks(reversed(held))
    phases.add(slowest(answers), "workers")
    return found | {
        "model": model,
        "block_size": layout.block_size,
        "blocks": len(blocks),
        "kept": list(kept),
        "contexts": [answer["context"] for answer in answers],
        "source": _source(str(core.vllm_config.model_config.tokenizer)),
        "writer": f"thaw {__version__}",
        "added": sum(answer["added"] for answer in answers),
        "bytes": sum(answer["bytes"] for answer in answers),
        "seconds": phases.total,
        "phases": phases.seconds,
    }


@collection_paused()
def restore_session(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Bring the blocks of a session into the pool. The caller holds the store's ``use``.

    Args:
        options: ``store``, ``session``: the id; ``model``, ``evict``; ``exact``: names by which a request would not go
            on exactly unless it is rebuilt, empty where that is no matter.

    Returns:
        As ``kv.core.restore``; ``lost``: blocks that the record names and the store lacks; ``rebuilds``: whether this
        engine rebuilds requests.

    Raises:
        UnsupportedError: ``exact``, and it does not.
    """
    rebuilds = versions.rebuilds(core)
    if options.get("exact") and not rebuilds:
        raise UnsupportedError(
            f"going on would not be exact by {', '.join(options['exact'])}: this engine's runner begins those anew; "
            "leave out exact, or pass sampling_params"
        )
    phases = Phases()
    require_awake(core)
    pool = versions.block_pool(core)
    layout = core_layout(core, pool)
    store = Store(options["store"])
    session = store.read(options["session"])
    contexts = store.contexts(session.head)
    phases.end("record")
    described = describe(core, pool, session.head.files * contexts[0].page)
    model = model_of(core, options.get("model"), required=True)
    phases.end("identify")
    what = f"the session {options['session'][:12]}"
    require_context(contexts, Identity.from_json(described["identity"] | {"model": model}), layout, what)
    table, pages, lost = _table(store, session, contexts)
    phases.end("table")
    asked = {
        "store": os.fspath(store.directory),
        "contexts": list(session.head.contexts),
        "what": what,
        "blocks": pool.num_gpu_blocks,
        "layout": layout.to_json(),
        "model": model,
        "tokens": session.tokens[: len(table.blocks) * table.block_size].tolist(),
        "salt": session.head.salt,
        "pages": pages,
    }
    evict = bool(options.get("evict"))
    told = bring_in(core, pool, table, asked, evict, phases, "thaw_session_fill")
    return told | {"lost": lost, "rebuilds": rebuilds}


def require_context(contexts: list[Context], identity: Identity, layout: Layout, what: str) -> None:
    """Hold what a session's blocks were made with against an engine; regions are each rank's own business.

    Raises:
        MismatchError: blocks of other weights, of another configuration or layout.
    """
    if len(contexts) != identity.parallel.world:
        raise MismatchError(f"{what} was kept by {len(contexts)} ranks, this engine has {identity.parallel.world}")
    require(contexts[0].identity, identity, what)
    require_layout(contexts[0].layout, layout, what, regions=False)


def _source(tokenizer: str) -> str:
    """A directory as any process finds it; a name on the hub as it is."""
    return os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else tokenizer


def _asked(core: Any, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("request") is None:
        return {"tokens": options["tokens"], "salt": options.get("salt"), "prompt": None, "sampling": None}
    live = live_request(core, options["request"])
    more = [getattr(live, name, None) is not None for name in ("lora_request", "prompt_embeds")]
    if any(more) or getattr(live, "mm_features", None):
        raise UnsupportedError(
            "a request with an adapter, embeddings, images or sound is more than its tokens; not in this version"
        )
    params, tokens, prompt = live.sampling_params, list(live.all_token_ids), list(live.prompt_token_ids)
    before = sampling.generated(params, prompt)
    return {
        "tokens": tokens,
        "salt": live.cache_salt,
        "prompt": len(prompt) - before,
        "sampling": sampling.to_json(sampling.whole(params, before) if before else params),
    }


def _table(store: Store, session: Session, contexts: list[Context]) -> tuple[Table, list[tuple[int, int]], int]:
    """Blocks as a table, of which number and group each slot is, and how many of the record's are not there.

    What follows a block that is missing is of no use, nor is what a window would need of one.
    """
    head, groups = session.head, contexts[0].layout.groups
    directory = os.fspath(store.blocks)
    count, there, lost = rest(session, contexts, lambda name: not os.access(f"{directory}/{name.file}", os.F_OK))
    kept = kept_from(groups, count, head.block_size, there)
    pages = [(number, group) for number in range(count) for group in range(len(groups)) if number >= kept[group]]
    slots = {page: slot for slot, page in enumerate(pages)}
    blocks = tuple(
        Block(
            number - 1 if number else NONE,
            tuple(session.tokens[number * head.block_size : (number + 1) * head.block_size]),
            tuple(slots.get((number, group), NONE) for group in range(len(head.kept))),
            salt=head.salt if number == 0 else None,
        )
        for number in range(count)
    )
    return Table(head.block_size, len(head.kept), blocks), pages, lost
