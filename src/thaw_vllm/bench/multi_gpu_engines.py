"""``thaw bench multi-gpu --model``: vLLM's own engines over as many GPUs, started, and their KV frozen and restored."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.vllm import fresh
from ..errors import ThawError
from . import ceilings, cold_start, kv
from .outcome import Missed, Outcome, Say

FREEZE = "freeze"
LOADERS = (cold_start.DEFAULT, cold_start.SNAPSHOT)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a model directory.
        ranks: tensor-parallel ranks.
        directory: where the snapshot and KV files go; removed afterwards.
        runs: starts of each kind, and restores of KV.
        engine_args: further ones of vLLM.
        limits: how limits are measured.
    """

    model: Path
    ranks: int
    directory: Path
    runs: int
    engine_args: dict[str, Any]
    limits: ceilings.Settings


def measure(settings: Settings, say: Say) -> Outcome:
    """A set is frozen; engines start from it and by vLLM's own loader, in forks of a zygote; then their KV.

    Raises:
        StorageError: there is no such model, or no room.
    """
    args = settings.engine_args | {"tensor_parallel_size": settings.ranks}
    gpu = settings.limits.device != "cpu"
    outcome = Outcome()
    with tempfile.TemporaryDirectory(
        prefix="thaw-bench-", dir=settings.directory, ignore_cleanup_errors=True
    ) as folder:
        snapshot = Path(folder, "weights.thaw")
        try:
            found = fresh.run(FREEZE, model=str(settings.model), snapshot=snapshot, engine_args=args)
        except ThawError as error:
            say(f"{FREEZE}: {error}")
            return Outcome(missed=[Missed(FREEZE, "thaw", "", str(error))])
        size = sum(report["bytes"] for report in found["reports"])
        say(f"{FREEZE}: {size / 1e9:.2f} GB of {settings.ranks} ranks, {found['seconds']['freeze']:.1f} s with loading")
        starts = cold_start.Settings(
            settings.model,
            snapshot,
            ("graphs" if gpu else "eager",),
            tuple(loader + cold_start.FORKED for loader in LOADERS),
            settings.runs,
            args,
            zygote=True,
        )
        outcome += cold_start.measure(starts, say)
        if not outcome.interrupted:
            asked = kv.Settings(settings.model, (), Path(folder), settings.runs, None, args, settings.limits)
            try:
                outcome += kv.measure(asked, say)
            except ThawError as error:  # what was measured before is worth something all the same
                say(f"{kv.FREEZE}: {error}")
                outcome.missed.append(Missed(kv.FREEZE, "thaw", "", str(error)))
    own = [record for record in outcome.records if record.system != "limit"]  # limits are of one link
    outcome.records = [dataclasses.replace(one, extra=one.extra | {"ranks": settings.ranks}) for one in own]
    return outcome
