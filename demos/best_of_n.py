#!/usr/bin/env python3
"""A small task forked into N seeded answers: each kept as a session, rewarded, ranked, and recorded token by token.

    python demos/best_of_n.py --model M [--snapshot W] [--store DIR] [--records FILE] [--n 8]

The record can be looked at anywhere, without an engine: ``thaw demo rollouts --records FILE``. One that this made is in
``demos/records``. What the engine does is in ``thaw_vllm/engines/vllm/sessions/rolling.py``, which
``thaw demo rollouts --model M`` runs, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from thaw_vllm.cli.demo_rollouts import demo_rollouts
from thaw_vllm.engines.vllm.api import check_model, require_vllm_installed
from thaw_vllm.errors import ThawError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with weights, config and tokenizer")
    parser.add_argument("--snapshot", type=Path, help="a .thaw of it, for a quick start")
    parser.add_argument("--store", type=Path, help="keep the sessions in this directory")
    parser.add_argument("--records", type=Path, help="keep the record in this file")
    parser.add_argument("--n", type=int, default=8, help="how many answers")
    parser.add_argument("--seed", type=int, default=1, help="of the first one, from 0; the others have those after it")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of each answer, at most")
    parser.add_argument("--rank", type=int, default=1, help="which answer to show token by token")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    try:
        require_vllm_installed()
        check_model(given.model)
        demo_rollouts(
            given.model,
            given.snapshot,
            given.max_tokens,
            given.store,
            given.records,
            given.json,
            count=given.n,
            rank=given.rank,
            seed=given.seed,
        )
    except ThawError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
