"""How much memory processes have for themselves, and how much they share, as the kernel counts it."""

from __future__ import annotations

_NAMES = {"Rss": "resident", "Pss": "proportional", "Private_Clean": "private", "Private_Dirty": "private"}


def resident(processes: list[int]) -> dict[str, int]:
    """Bytes of all of them together, from ``smaps_rollup``.

    ``resident``: pages counted once for each process that has them. ``proportional``: a page that n processes have
    counts 1/n for each. ``private``: pages that no other process has. Processes that have ended count nothing.
    """
    found = {"resident": 0, "proportional": 0, "private": 0}
    for process in processes:
        try:
            with open(f"/proc/{process}/smaps_rollup") as file:
                lines = file.readlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in _NAMES and rest.split()[1:] == ["kB"]:
                found[_NAMES[name]] += int(rest.split()[0]) * 1024
    return found
