"""Which blocks a prefix needs where layers look back over a window only; and what is left of a session without some."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..format.kv import Group
from .blocks import Name
from .context import Context
from .record import Session


def first_needed(group: Group, blocks: int, size: int) -> int:
    """The first block whose pages a group needs for a prefix of so many blocks to be found in an engine's cache.

    Args:
        size: tokens of a block.
    """
    if group.window is None:
        return 0
    if "Chunked" in group.kind:  # tokens look back to the beginning of their chunk
        return min(blocks, blocks * size // group.window * group.window // size)
    return max(0, blocks - -(-(group.window - 1) // size))


def usable(groups: Sequence[Group], blocks: int, size: int, there: Callable[[int, int], bool]) -> int:
    """The longest prefix, in blocks, up to ``blocks``, of which every group has all pages that it needs.

    Args:
        there: whether a block's pages of a group are there: ``there(number, group)``.
    """
    whole = [number for number, group in enumerate(groups) if group.window is None]
    longest = next((n for n in range(blocks) if not all(there(n, group) for group in whole)), blocks)
    for count in range(longest, 0, -1):
        if all(
            there(number, which)
            for which, group in enumerate(groups)
            if group.window is not None
            for number in range(first_needed(group, count, size), count)
        ):
            return count
    return 0


def kept_from(groups: Sequence[Group], blocks: int, size: int, there: Callable[[int, int], bool]) -> tuple[int, ...]:
    """For each group the first block to keep of a prefix that is usable.

    One more than the window needs, where it is there: a request whose prompt ends with a block's last token is given
    one block less, since its last token has to be computed.
    """
    found = []
    for which, group in enumerate(groups):
        first = first_needed(group, blocks, size)
        before = first_needed(group, max(0, blocks - 1), size)
        while first > before and there(first - 1, which):
            first -= 1
        found.append(first)
    return tuple(found)


def rest(
    session: Session, contexts: Sequence[Context], gone: Callable[[Name], bool]
) -> tuple[int, Callable[[int, int], bool], int]:
    """What is usable of a session where some of its blocks are gone.

    Args:
        contexts: of every rank.
        gone: asked once of each block that the record names.

    Returns:
        How many blocks; whether a block's pages of a group are there, of all ranks; how many files are gone.
    """
    head, lost = session.head, 0
    lacking = set[tuple[int, int]]()
    for context in contexts:
        for number, address in enumerate(context.addresses(session.tokens, head.salt, head.blocks)):
            for group, first in enumerate(head.kept):
                if number >= first and gone(Name(address, group)):
                    lacking.add((number, group))
                    lost += 1

    def there(number: int, group: int) -> bool:
        return number >= head.kept[group] and (number, group) not in lacking

    return usable(contexts[0].layout.groups, head.blocks, head.block_size, there), there, lost
