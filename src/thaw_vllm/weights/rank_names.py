"""What the files of a set are called: for people, and for who tidies up; reading goes by the manifest.

The ranks of a tensor-parallel engine are numbered: ``weights.5f0c31d2a7be.rank1.thaw``. Where pipeline or data
parallelism divides the model, too, they have their coordinates: ``weights.5f0c31d2a7be.pp1-tp0.thaw``,
``weights.5f0c31d2a7be.dp1-pp0-tp1.thaw``. A link without the set's id leads to each.
"""

from __future__ import annotations

from pathlib import Path

from ..format.identity import Parallel

LABEL = r"(?:rank[0-9]+|(?:dp[0-9]+-)?pp[0-9]+-tp[0-9]+)"
"""Pattern of what ``label`` gives; sets of pipeline stages were once named by ``rank``, too."""


def label(parallel: Parallel) -> str:
    """What a rank's file is called among those of its set."""
    stage = f"pp{parallel.pp_rank}-tp{parallel.tp_rank}"
    if parallel.dp_size > 1:
        return f"dp{parallel.dp_rank}-{stage}"
    return stage if parallel.pp_size > 1 else f"rank{parallel.tp_rank}"


def member_name(target: Path, set_id: str, parallel: Parallel) -> str:
    """Under which name the set's rank is stored beside its manifest."""
    return f"{target.stem}.{set_id[:12]}.{label(parallel)}{target.suffix}"


def link_name(target: Path, parallel: Parallel) -> str:
    """The name people expect a rank's file under."""
    return f"{target.stem}.{label(parallel)}{target.suffix}"
