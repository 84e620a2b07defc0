"""Answers cut at random tokens and resumed on a GPU, by three proofs: blocks, the same engine, another process.

    python tests/gpu/session_cuts.py MODEL SNAPSHOT [--cuts 20] [--length 64] [--seed N] [--engine-args JSON]

Each kind of sampling parameters gets one answer, kept as a session and cut at so many random tokens. Every cut is
resumed in the engine that made it and in another process: tokens and log-probabilities must be equal to the last bit,
blocks byte for byte. With VLLM_BATCH_INVARIANT=1 they must also be those of the answer that was not interrupted;
without it, where the tokens differ two were as good as tied. Prints a JSON document; exit status 1 where something is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.engines.vllm.session_cuts import KINDS, cuts, prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("snapshot")
    parser.add_argument("--cuts", type=int, default=20, help="of each kind")
    parser.add_argument("--length", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--vocabulary", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    asked = prompts(rng, given.prompt, given.vocabulary)
    at = {kind: sorted(rng.sample(range(1, given.length - 1), given.cuts)) for kind in KINDS}
    args = {"model": given.model, "snapshot": given.snapshot, "max_model_len": 2048, **given.engine_args}
    with tempfile.TemporaryDirectory() as folder:
        invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        found = cuts(Path(folder), asked, KINDS, at, given.length, invariant, **args)
    print(json.dumps({"seed": given.seed} | found))
    return 1 if found["wrong"] or not found["v2"] else 0


if __name__ == "__main__":
    sys.exit(main())
