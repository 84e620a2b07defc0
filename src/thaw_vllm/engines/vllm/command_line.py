"""Engine arguments of vLLM as the command line of its server has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def options(engine_args: Mapping[str, Any]) -> list[str]:
    """Flags for true and false, lists as several words, and what is no text in JSON."""
    found = []
    for name, value in engine_args.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        found += [flag, *map(_word, value if isinstance(value, list) else [value])]
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
