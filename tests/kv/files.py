"""Files of KV blocks, sound ones and such as no writer of ours makes."""

import torch
from tests.data.make_golden import LAYOUT, MODEL, blocks

from thaw_vllm.format.header import Header, Member, RankSet
from thaw_vllm.format.identity import Identity, Parallel
from thaw_vllm.weights.capture import capture
from thaw_vllm.weights.freeze import FreezeOptions, SnapshotWriter, write_snapshot

__all__ = ["LAYOUT", "blocks", "table_tensors", "tensors", "write", "write_set"]


def table_tensors(table):
    """``blocks.*`` by name."""
    return {
        name: torch.tensor(list(data), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, data) in table.encode().items()
    }


def tensors(table=None, layout=LAYOUT):
    """Everything in a rank 0's file, by name."""
    table = table or blocks()
    pages = {
        f"pages.{region.name}": torch.arange(table.slots * region.page).to(torch.uint8).reshape(-1, region.page)
        for region in layout.regions
    }
    return table_tensors(table) | pages


def header(layout, rank=0, size=1, members=()):
    """Of one rank."""
    parallel = Parallel(tp_rank=rank, tp_size=size)
    identity = Identity("kv", engine="vllm", dtype="bfloat16", model=MODEL, parallel=parallel)
    return Header(identity, kv=layout, ranks=RankSet("0" * 32, members) if size > 1 else None)


def write(path, named, layout=LAYOUT, rank=0, size=1, kinds=None):
    """A file of ``named``; ``kinds``: those that are not plain tensors."""
    captured = capture([(name, (kinds or {}).get(name, "tensor"), tensor) for name, tensor in named.items()])
    write_snapshot(path, header(layout, rank, size), captured, FreezeOptions(force=True))
    return path


def write_set(path, pages, layout=LAYOUT):
    """The golden blocks as a manifest, and beside it rank 1's file of the tensors ``pages``."""
    name = f"{path.stem}.rank1{path.suffix}"
    own, other = (capture([(n, "tensor", t) for n, t in named.items()]) for named in (tensors(), pages))
    with SnapshotWriter(path.with_name(name), header(layout, 1, 2), other, FreezeOptions()) as writer:
        content = writer.write_payload()
        writer.seal(header(layout, 1, 2))
    members = (Member(name, writer.size, content),)
    write_snapshot(path, header(LAYOUT, 0, 2, members), own, FreezeOptions())
    return path
