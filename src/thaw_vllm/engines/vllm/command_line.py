"""Engine arguments of vLLM as the command line of its server has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .fast_start import among

_PARALLEL = {
    **{"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"},
    **{"dp": "data_parallel_size", "ep": "enable_expert_parallel"},
}


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


def given(words: Sequence[str]) -> dict[str, str]:
    """What a command line gives, by names in Python or short names: ``-cc.mode=3`` is ``cc``, with the value ``3``.

    vLLM takes shortened names as well (``--enforce``); they are given as they are. An argument without a value has an
    empty one, of several words it has the first. Of one that is given twice the last counts, and stands last.
    """
    found: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], "-"], strict=False):
        if word.startswith("-") and word.strip("-"):
            before, is_whole, value = word.partition("=")
            name = before.lstrip("-").split(".")[0].replace("-", "_")
            if not word.startswith("--") and name[:1] == "O":  # -O1
                name, value, is_whole = "O", value or name[1:], "="
            found.pop(name, None)
            found[name] = value if is_whole else "" if following.startswith("-") else following
    return found


def parallel(chosen: Mapping[str, str]) -> dict[str, Any]:
    """Which ranks ``given`` options ask for, as engine arguments."""
    found: dict[str, Any] = {}
    for name, value in chosen.items():
        whole = _PARALLEL.get(name) or next((full for full in _PARALLEL.values() if among([name], {full})), None)
        if whole == _PARALLEL["ep"]:
            found[whole] = True
        elif whole is not None and value.isdigit():
            found[whole] = int(value)
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
