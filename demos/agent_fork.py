#!/usr/bin/env python3
"""A conversation that builds a long context and forks into hypotheses; one is chosen, and the context rewound.

    python demos/agent_fork.py --model M [--snapshot W] [--store DIR] [--full-cycle]

With ``--full-cycle`` the engine is then gone, and another process takes the chosen branch up from files. What each step
does is in ``thaw_vllm/engines/vllm/sessions/showing.py``, which ``thaw demo fork`` runs, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from thaw_vllm.cli.demo_fork import demo_fork
from thaw_vllm.engines.vllm.api import check_model, require_vllm_installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with weights, config and tokenizer")
    parser.add_argument("--snapshot", type=Path, help="a .thaw of it, for a quick start")
    parser.add_argument("--store", type=Path, help="keep the sessions in this directory")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--full-cycle", action="store_true", help="end the engine, and go on in another process")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    require_vllm_installed()
    check_model(given.model)
    demo_fork(given.model, given.snapshot, given.max_tokens, given.store, given.json, given.full_cycle)


if __name__ == "__main__":
    main()
