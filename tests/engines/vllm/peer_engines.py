"""Engines that take their weights from one another: peer_engines.py ASKED.json ANSWER.json.

Asked for are ``model``, ``snapshot``, that of ``second`` weights, and ``engine_args``. The first engine offers its
weights, the second takes them; then the first has others, and a third finds nobody. With ``lend`` the second offers
them, too, and the third takes them from there, over TCP. The answer has reports, process ids and digests of each rank.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from tests.engines.vllm.swap_engine import ask


def weights_of(llm):
    """Of each rank: of every tensor, or where the model is compiled of those with names of their own. Others are found
    by way of what was compiled, which an engine that compiles reaches otherwise than one that finds it in a cache."""
    compiled = not llm.llm_engine.vllm_config.model_config.enforce_eager
    asked = "thaw_test_weights" if compiled else "thaw_test_digests"
    return [{path: digest for path, (_, digest) in of.items()} for of in llm.collective_rpc(asked)]


@contextlib.contextmanager
def lending():
    """``thaw lend``; the address that it prints."""
    command = [sys.executable, "-c", "from thaw_vllm.cli.main import main; main(['lend', '--listen', '127.0.0.1:0'])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[2].rstrip(";")
        finally:
            process.kill()


def main(asked):
    from vllm import LLM

    import thaw_vllm

    engines = []

    def start(**options):
        extra = {"snapshot": asked["snapshot"]} | options
        args = {"load_format": "thaw", "model_loader_extra_config": extra} | asked["engine_args"]
        engines.append(LLM(asked["model"], **args))

    start(offer=True)
    start(peer="auto", offer=asked.get("lend", False))
    found = {"answers": [ask(llm)["answers"] for llm in engines], "digests": [weights_of(llm) for llm in engines]}
    thaw_vllm.swap_weights(engines[0], asked["second"])
    found["swapped"] = ask(engines[0])["answers"]
    with lending() if asked.get("lend") else contextlib.nullcontext("auto") as peer:
        start(peer=peer)
    found["peer"] = peer
    found["answers"].append(ask(engines[2])["answers"])
    found["digests"].append(weights_of(engines[2]))
    found["reports"] = [llm.collective_rpc("thaw_report") for llm in engines]
    found["pids"] = [llm.collective_rpc("thaw_test_pid") for llm in engines]
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
