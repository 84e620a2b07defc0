"""What ``--snapshot`` means for a start: a file, the cache of snapshots, or none; needs no vLLM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...transport.tcp_address import peer_address, remote
from .command_line import given
from .fast_start import among

AUTO, NONE = "auto", "none"
"""Words of ``--snapshot``; a file of such a name is ``./auto``."""
_OWN = ("load_format", "model_loader_extra_config")
_ELSEWHERE = {
    *("data_parallel_address", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local"),
    *("data_parallel_hybrid_lb", "data_parallel_external_lb", "headless"),
    *("dpa", "dpn", "dpr", "dpl", "dph", "dpe", "hl"),
}
"""Options of replicas that may be on several machines."""
_IN_A_FILE = re.compile(r"^\s*[\"']?(load[-_]format|model[-_]loader[-_]extra[-_]config)\b", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """What a start is to do about its weights.

    Attributes:
        extra: the loader's configuration; None: the loader that vLLM would choose.
        file: the snapshot that was named.
        said: why there is none, where one could have been expected.
    """

    extra: dict[str, Any] | None = None
    file: str | None = None
    said: str | None = None


def choose(
    snapshot: str | None, model: str, words: Sequence[str], directory: str | os.PathLike[str] | None, gigabytes: object
) -> Choice:
    """What ``--snapshot`` comes to.

    Args:
        snapshot: AUTO, NONE, or a file; None is AUTO, which then steps back for whoever has chosen a loader.
        words: further options, of vLLM.
        directory: ``--cache-dir``.
        gigabytes: ``--cache-gb``.

    Raises:
        UsageError: options that exclude each other.
    """
    chosen = given(words)
    taken = next((name for name in _OWN if among(chosen, {name})), None)
    if snapshot == NONE:
        return Choice()
    if snapshot == "":
        raise UsageError(f"--snapshot is empty; give a file, {AUTO} or {NONE}")
    if snapshot is not None and taken is not None:
        option = "--" + taken.replace("_", "-")
        raise UsageError(f"--snapshot sets {option} itself; leave {option} out")
    if snapshot not in (None, AUTO):
        file = os.path.abspath(snapshot)
        return Choice({"snapshot": file}, file)
    if taken is not None:
        return Choice(said=f"no snapshot is thawed or kept: --{taken.replace('_', '-')} is given")
    why = _not_for_snapshots(model, chosen, os.environ)
    if why is None:
        try:
            return Choice(cached(directory, gigabytes))
        except RuntimeError as error:  # no home
            why = f"there is no cache directory ({error}); --cache-dir names one"
    return Choice(said=f"no snapshot is thawed or kept: {why}")


def among_engines(choice: Choice, peer: str | None, offer: bool) -> Choice:
    """The same with weights taken from another engine of the host, or lent to others.

    Args:
        peer: ``--peer``: AUTO, an offer's socket, or ``tcp://HOST:PORT``.
        offer: ``--offer-weights``.

    Raises:
        UsageError: there is no snapshot, by which engines find each other; the address is none.
    """
    if peer is None and not offer:
        return choice
    if choice.extra is None:
        why = f" ({choice.said})" if choice.said else ""
        raise UsageError(f"--peer and --offer-weights are for weights of a snapshot; give --snapshot a file{why}")
    if peer == "":
        raise UsageError(f"--peer is empty; give {AUTO}, the socket of an offer or tcp://HOST:PORT")
    if peer is not None and remote(peer):
        peer_address(peer)
    elif peer not in (None, AUTO):
        peer = os.path.abspath(peer)
    named = {} if peer is None else {"peer": peer}
    return replace(choice, extra=choice.extra | named | ({"offer": True} if offer else {}))


def cached(directory: str | os.PathLike[str] | None = None, gigabytes: object = None) -> dict[str, Any]:
    """The loader's configuration for snapshots in the cache.

    Raises:
        UsageError: ``gigabytes``, or the variable in its place, is no size.
        RuntimeError: there is no home directory.
    """
    from ...weights.cache import limit, snapshots_directory

    most = limit(gigabytes)
    extra: dict[str, Any] = {"mode": "auto", "cache": str(snapshots_directory(directory))}
    return extra if most is None else extra | {"cache_bytes": most}


def _not_for_snapshots(model: str, chosen: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    """Why a start with ``load_format="thaw"`` might fail where vLLM's own would not."""
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "thaw" not in allowed.split(","):
        return "VLLM_PLUGINS keeps thaw's loader out; add thaw to it"
    if not metadata.entry_points(group="vllm.general_plugins", name="thaw"):
        return "thaw is not installed as a plugin of vLLM; install it, rather than run it from its sources"
    if "://" in model:
        return "vLLM has loaders of its own for object stores"
    several = chosen.get("nnodes", chosen.get("n", "1")) not in ("", "1")
    several = several or among(chosen.keys() - {"data_parallel_size"}, _ELSEWHERE)
    if chosen.get("distributed_executor_backend") == "ray" or several:
        return "the ranks may be on several machines, each with a cache of its own"
    if among(chosen, {"enable_elastic_ep"}) or chosen.get("data_parallel_backend") == "ray":
        return "engines may be added later, by loaders that take no configuration"
    if "config" in chosen:
        try:
            text = Path(chosen["config"]).read_text(encoding="utf-8")
        except (OSError, ValueError):  # vLLM will say so
            return None
        if (found := _IN_A_FILE.search(text)) is not None:
            return f"{chosen['config']!r} names {found[1]}"
    return None
