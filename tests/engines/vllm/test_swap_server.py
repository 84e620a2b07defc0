"""vLLM's own server whose weights are swapped by ``thaw swap``, asked through the openai client.

Packing of weights is left out, as in test_swap.py; parking needs a GPU, and is refused here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.engines.vllm.test_kv_server import PROMPT, Server, plugins
from tests.engines.vllm.test_swap import SWAP_SAFE

pytest.importorskip("openai", reason="openai is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_server_answers_with_the_weights_it_was_given(
    checkpoints: Callable, load: Callable, thaw_args: Callable, tmp_path: Path
):
    first = Path(shutil.copytree(checkpoints("tied"), tmp_path / "a"))
    snapshots = tmp_path / "snapshots"
    snapshots.mkdir()

    def frozen(directory: Path) -> None:
        load(directory, **thaw_args(snapshots / f"{directory.name}.thaw", mode="freeze"))

    frozen(first)
    extra = json.dumps({"snapshot": str(snapshots / "a.thaw")})
    variables = {
        "VLLM_PLUGINS": f"{plugins()},swap_safe_cpu",
        "THAW_SNAPSHOT_DIR": str(snapshots),
        "PYTHONPATH": os.pathsep.join([str(SWAP_SAFE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    options = ("--load-format", "thaw", "--model-loader-extra-config", extra)
    server = Server(first, snapshots, tmp_path / "log.txt", *options, variables=variables)
    try:
        second = Path(shutil.copytree(first, tmp_path / "b"))  # meanwhile the server starts
        other = Path(shutil.copytree(first, tmp_path / "c"))
        for directory in (second, other):
            for file in directory.glob("*.safetensors"):
                changed = {name: tensor * 1.25 + 0.01 for name, tensor in load_file(file).items()}
                save_file(changed, file, metadata={"format": "pt"})
        (other / "chat_template.jinja").write_text("{{ other }}")
        frozen(second)
        frozen(other)
        server.wait()
        before, cached = server.ask(PROMPT)
        assert server.ask(PROMPT)[1] > cached == 0
        swapped = server.thaw("swap", "b.thaw", "--json")
        assert swapped.returncode == 0, swapped.stderr
        told = json.loads(swapped.stdout)
        assert told["model"].startswith("tensors-blake3:") and told["aborted"] == 0
        after, cached = server.ask(PROMPT)
        assert after != before and cached == 0, "nothing of the old weights is used"
        refused = server.thaw("swap", "c.thaw")
        assert refused.returncode == 4 and "chat_template.jinja" in refused.stderr
        missing = server.thaw("swap", "d.thaw")
        assert missing.returncode == 6 and "d.thaw" in missing.stderr
        wrong = server.thaw("swap", "a.thaw", token="another token of some length")
        assert wrong.returncode == 2 and "THAW_ADMIN_TOKEN" in wrong.stderr
        parked = server.thaw("park")
        assert parked.returncode == 2 and "sleep mode" in parked.stderr
        assert server.thaw("wake").returncode == 2
        assert server.ask(PROMPT)[0] == after, "refusals leave it as it was"
        assert server.thaw("swap", "a.thaw", "--deadline", "0").returncode == 0
        assert server.ask(PROMPT)[0] == before
    finally:
        server.stop()
