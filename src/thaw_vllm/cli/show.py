"""``thaw show``: one session."""

from __future__ import annotations

import json

from .output import Json, document, pairs, plain, size
from .sessions import (
    SessionArgument,
    ShowText,
    StoreOption,
    Tokenizer,
    decoder,
    expiry_row,
    opened,
    print_text,
    state,
    when,
)

EXAMPLES = """
thaw show 3f2a91c0
thaw show trunk --show-text --tokenizer ./Llama-3.1-8B-Instruct
"""


def show(
    session: SessionArgument,
    show_text: ShowText = False,
    tokenizer: Tokenizer = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Show one session and what is kept of it.

    The whole record is read and held against its id; blocks are not read (thaw fsck does that).
    """
    from ..sessions.diff import size as size_of

    place = opened(store)
    id_ = place.find(session)
    found = place.read(id_)
    head, (blocks, kept) = found.head, size_of(place, found)
    text = decoder(tokenizer, head) if show_text else None
    tokens = found.tokens.tolist()
    parts = {"prompt": tokens[: head.prompt], "generated": tokens[head.prompt :]}
    texts = {} if text is None else {f"{name}_text": text(part) for name, part in parts.items()}
    pinned = place.pinned(id_)
    if as_json:
        document(head.shown(id_) | {"pinned": pinned, "block_files": blocks, "bytes": kept} | texts)
        return
    rows = [("session", id_), ("made", f"{when(head.created)} by {plain(head.writer)}")]
    rows += expiry_row(head.expires)
    if head.parent is not None:
        rows.append(("branches off", f"{head.parent} after {head.fork} tokens"))
    rows += [("label", plain(label)) for label in head.labels]
    rows += [
        ("tokens", f"{head.count}: {head.prompt} given, {head.count - head.prompt} generated"),
        ("state", state(head) + (", pinned" if pinned else "")),
        ("model", head.model),
        ("source", plain(head.source) if head.source is not None else "not known"),
        ("kept", f"{head.blocks * head.block_size} tokens in {blocks} blocks, {size(kept)}"),
        ("sampling", "not known" if head.sampling is None else plain(json.dumps(head.sampling, sort_keys=True))),
    ]
    if head.salt is not None:
        rows.append(("salted", "yes"))
    pairs(rows)
    for name in texts:
        print_text(name.removesuffix("_text"), texts[name])
