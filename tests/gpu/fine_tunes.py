"""A pool of three models made of one, for ``pool_soak.py``: itself, one with other weights, and another architecture.

    python tests/gpu/fine_tunes.py MODEL FOLDER [--kv-bytes 1073741824]

Writes model directories, their snapshots and pools' files to FOLDER, on tmpfs best: ``models.toml``, where one engine
has room at a time, and ``steady.toml``, where two have and the third model's stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from safetensors.torch import load_file, save_file
from tests.engines.vllm.pool_models import toml

SIZES = ["1", "2", "4", "8"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    models = {name: given.folder / name for name in ("first", "second", "other")}
    for name, place in models.items():
        shutil.copytree(given.model, place)
        if name != "first":
            for file in place.glob("*.safetensors"):
                factor = {"second": 1.05, "other": 0.95}[name]
                changed = {key: tensor * factor for key, tensor in load_file(file).items()}
                save_file(changed, file, metadata={"format": "pt"})
    config = models["other"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 250000.0}))  # so no swap to it
    snapshots = {name: given.folder / f"{name}.thaw" for name in models}
    command = [sys.executable, "-m", "thaw_vllm", "freeze"]
    processes = [
        subprocess.Popen([*command, "--model", models[name], "--output", path]) for name, path in snapshots.items()
    ]
    assert not any([process.wait() for process in processes])
    args = ["--max-model-len", "512", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(given.kv_bytes)]
    args += ["--cudagraph-capture-sizes", *SIZES]
    (given.folder / "models.toml").write_text(toml(models, snapshots, args, drain=30, deadline=300))
    own = {name: {"share": 0.5, "pinned": name == "other"} for name in models}
    (given.folder / "steady.toml").write_text(toml(models, snapshots, args, own, drain=30, deadline=300))


if __name__ == "__main__":
    main()
