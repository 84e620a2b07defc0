"""A fork pool on the GPU: one copy of the weights for all of its engines, which answer as with their own."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engines.vllm.models import BASE, with_tokenizer
from tests.engines.vllm.test_fork_pool import LONG_ANSWER, PARAMS, alike, answers
from tests.engines.vllm.test_kv import OTHER
from tests.zygote.running import alive, until

from thaw_vllm import ForkPool
from thaw_vllm.engines.vllm import fresh
from thaw_vllm.errors import MismatchError
from thaw_vllm.transport.shared import mapped
from thaw_vllm.weights.layout import byte_view
from thaw_vllm.weights.open import open_snapshot
from thaw_vllm.weights.shared import Held, views
from thaw_vllm.zygote import messages
from thaw_vllm.zygote.place import Place

ARGS = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
MODES = {"eager": {"enforce_eager": True}, "graphs": {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}}
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_key_value_heads": 4}
SHAPE |= {"head_dim": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose layers are large enough to be shared: 220 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**BASE | SHAPE, tie_word_embeddings=False, dtype=torch.bfloat16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return with_tokenizer(directory)


@pytest.fixture(scope="module")
def snapshot(model: Path, zygote: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.thaw"
    args = ARGS | MODES["eager"]
    fresh.run("freeze", model=str(model), snapshot=path, engine_args=args, zygote=zygote.name)
    return path


def held(pool: ForkPool, snapshot: Path) -> dict[str, torch.Tensor]:
    """What the pool's engines have mapped, mapped here as well."""
    weights = pool._shared.weights.there(Path(), Path(), 0.0)
    assert weights is not None
    with socket.socket(socket.AF_UNIX) as connection, open_snapshot(snapshot, with_chunks=False) as opened:
        connection.connect(weights["socket"])
        told = messages.receive(connection)
        assert told is not None
        return views(mapped(told[0]["memory"], torch.device("cuda", 0)), opened.snapshot.index)


def test_what_a_holder_has(snapshot: Path):
    """Every tensor is the snapshot's; another GPU's memory is not taken for this one's."""
    kept = Held(snapshot, torch.device("cuda", 0))
    with open_snapshot(snapshot, with_chunks=False) as opened:
        own = views(kept.made.tensor, opened.snapshot.index)
        host = Held(snapshot, torch.device("cpu"))
        theirs = views(host.made.tensor, opened.snapshot.index)
    assert kept.report.verified == "wordsum" and len(own) > 20
    for name, tensor in own.items():
        assert torch.equal(byte_view(tensor).cpu(), byte_view(theirs[name])), name
    del own, theirs, tensor
    with pytest.raises(MismatchError, match="this engine is on"):
        mapped(kept.made.told | {"gpu": "0000:ff:00.0"}, torch.device("cuda", 0))
    kept.made.close()
    host.made.close()


@pytest.mark.parametrize("mode", list(MODES))
def test_one_copy(mode: str, model: Path, snapshot: Path, zygote: Place, tmp_path: Path):
    options: dict[str, Any] = {"zygote": zygote.name, "batch": 1, **ARGS, **MODES[mode]}
    with ForkPool(model, snapshot, workers=2, share_weights=False, **options) as pool:
        own = answers(pool.fork(OTHER, 4, PARAMS))
        assert pool.weights_pid is None
    with ForkPool(model, snapshot, workers=2, log_dir=tmp_path, **options) as pool:
        assert pool.weights_pid is not None, "it is the default on a GPU"
        assert alike(answers(pool.fork(OTHER, 4, PARAMS)), own)
        for number in (0, 1):
            log = (tmp_path / f"worker-{number}.log").read_text(errors="replace")
            took = float(re.findall(r"Model loading took ([0-9.]+) GiB", log)[-1])
            assert "GB of another process" in log and took < 0.05, took
        assert len([*pool.fork(OTHER, 4, LONG_ANSWER)]) == 4
        now = held(pool, snapshot)
        host = Held(snapshot, torch.device("cpu"))
        with open_snapshot(snapshot, with_chunks=False) as opened:
            for name, tensor in views(host.made.tensor, opened.snapshot.index).items():
                assert torch.equal(byte_view(now[name]).cpu(), byte_view(tensor)), f"somebody has written to {name}"
        before = pool.weights_pid
        os.kill(before, signal.SIGKILL)
        until(lambda: all(one["starts"] > 1 for one in pool.workers()), "both to be started again", 300)
        until(lambda: {one["state"] for one in pool.workers()} == {"ready"}, "both to be ready", 300)
        assert pool.weights_pid not in (None, before)
        assert alike(answers(pool.fork(OTHER, 4, PARAMS)), own)
        last = pool.weights_pid
    assert last is not None and not alive(last)


def test_memory_is_shared_evenly_beside_the_weights(model: Path, snapshot: Path, zygote: Place, tmp_path: Path):
    """Where nothing is said; engines are started one by one then."""
    options = {"max_model_len": 512, "enforce_eager": True, "zygote": zygote.name, "log_dir": tmp_path}
    with ForkPool(model, snapshot, workers=2, **options) as pool:
        assert len(answers(pool.fork(OTHER, 2, PARAMS))) == 2
    sizes = []
    for number in (0, 1):
        log = (tmp_path / f"worker-{number}.log").read_text(errors="replace")
        sizes.append(float(re.findall(r"Available KV cache memory: ([0-9.]+) GiB", log)[-1]))
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert sum(sizes) < 0.9 * total and min(sizes) > 0.35 * total, sizes
