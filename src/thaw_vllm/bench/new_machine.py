"""Starts of engines on a machine that has compiled nothing, with caches from a file; ``cold_start`` measures them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..caches import places
from ..engines.vllm.caches import SUFFIX
from ..engines.vllm.packing import Packed, pack


@dataclass
class NewMachine:
    """Places for what engines compile, empty before each start but for what a file brings.

    Attributes:
        folder: that holds them, and the files.
        packed: by whether the preset was used.
    """

    folder: Path
    packed: dict[bool, Packed] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """Of every start, and of a zygote that is forked."""
        return places.empty(self.folder / "places")

    def pack(
        self,
        model: Path,
        snapshot: Path | None,
        args: dict[str, Any],
        questions: list[Any],
        max_tokens: int,
        fast: bool,
    ) -> Packed:
        """Compile with empty caches, elsewhere, and keep that as a file.

        Raises:
            ThawError: see ``caches.pack``.
        """
        path = self.folder / f"{'fast' if fast else 'usual'}{SUFFIX}"
        self.packed[fast] = pack(
            path,
            str(model),
            snapshot,
            quick=fast,
            offline=args,
            questions=questions,
            max_tokens=max_tokens,
            force=True,
        )
        return self.packed[fast]

    def empty(self) -> None:
        """Remove what the start before has left."""
        shutil.rmtree(self.folder / "places", ignore_errors=True)

    def file(self, fast: bool) -> str:
        """The file that such a start is given."""
        return self.packed[fast].path
