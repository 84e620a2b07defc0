"""The dashboard in docs/: it asks for metrics that a pool has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.serve.served import Served
from tests.serve.test_router import model, play

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
NAME = re.compile(r"\b(thaw_[a-z_]+|vllm:[a-z_]+)\{([a-z_]+)")


def asked() -> dict[str, set[str]]:
    """Metrics by their names, and labels that are asked for."""
    found: dict[str, set[str]] = {}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for name, label in NAME.findall(target["expr"]):
                found.setdefault(name, set()).add(label)
    return found


def test_panels_are_apart_and_named():
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({p["title"] for p in DASHBOARD["panels"]})
    assert all(NAME.search(t["expr"]) for p in DASHBOARD["panels"] for t in p["targets"])


def test_a_pool_has_the_metrics_of_thaws(tmp_path: Path):
    served = Served(tmp_path, model("a"), model("b"), given={"swappable": True})

    async def work(client: aiohttp.ClientSession) -> str:
        for name in "ab":
            async with client.post("/v1/x", json={"model": name}) as answer:
                assert answer.status == 200
        async with client.get("/metrics") as answer:
            return await answer.text()

    text = play(served, work)
    for name, labels in asked().items():
        if name.startswith("thaw_"):
            assert re.search(rf"^# TYPE {re.sub('_(bucket|count|sum)$', '', name)} ", text, re.M), name
            assert labels == {"model"}


def test_vllm_has_the_others():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm

    folder = Path(vllm.__file__).parent / "v1" / "metrics"
    there: Any = {name for path in folder.glob("*.py") for name in re.findall(r'"(vllm:[a-z_]+)"', path.read_text())}
    for name in asked():
        if name.startswith("vllm:"):
            assert re.sub("_(bucket|total)$", "", name) in there, name
