import json

import pytest
import torch

from thaw_vllm.bench import record
from thaw_vllm.bench import restore as measuring
from thaw_vllm.errors import SpaceError

FIELDS = {
    *("work", "system", "route", "bytes", "seconds", "gb_per_s", "cache", "verified", "equal", "peak_host_mib", "run"),
    *("machine", "versions", "command", "date"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors of a few kilobytes, several chunks of reading still."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.setattr(measuring, "SHAPES", ((64, 64), (64,), (3, 5)))
    monkeypatch.setattr(measuring, "TASK", 4096)


def test_restore(thaw, tmp_path):
    (tmp_path / "one").mkdir()
    ran = thaw("bench", "restore", "--size-mb", 1, "--dir", tmp_path, "--dir", tmp_path / "one", "--rounds", 2)
    assert ran.code == 0, ran.err
    assert ran.out.count("thaw, unverified / safetensors: ") == 2
    assert ran.out.count("thaw verify / plain reads") == 2
    assert f"{tmp_path / 'one'}: 1 MB, 2 rounds" in ran.out
    assert [p.name for p in tmp_path.iterdir()] == ["one"] and not list((tmp_path / "one").iterdir())


def test_json_and_records(thaw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = thaw(
        "bench", "restore", "--size-mb", 1, "--dir", tmp_path, "--rounds", 3, "--workers", 2, "--json", "--record"
    )
    assert ran.code == 0
    (comparison,) = ran.document
    assert comparison["directory"] == str(tmp_path)
    records = comparison["records"]
    assert {(r["work"], r["system"], r["verified"]) for r in records} == {
        ("restore-cpu", "thaw", False),
        ("restore-cpu", "thaw", True),
        ("restore-cpu", "safetensors", False),
        ("restore-cpu", "limit", False),
        ("verify", "thaw", True),
        ("verify", "limit", False),
    }
    for found in records:
        assert set(found) >= FIELDS and len(found["seconds"]) == 3 and found["run"] == record.RUN
    assert {r["equal"] for r in records if r["system"] in ("thaw", "safetensors") and r["work"] != "verify"} == {True}
    for ratio in comparison["ratios"]:
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert file.suffix == ".jsonl" and str(file.relative_to(tmp_path)) in ran.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [r["seconds"] for r in records]
    record.append([])
    assert len(file.read_text().splitlines()) == len(lines)


def test_wrong_bytes_are_no_measurement(tmp_path, monkeypatch):
    original = measuring.restore_model

    def wrong(model, path, **options):
        original(model, path, **options)
        with torch.no_grad():
            next(model.parameters()).view(torch.int16)[0] ^= 1

    monkeypatch.setattr(measuring, "restore_model", wrong)
    with pytest.raises(AssertionError, match="other bytes"):
        measuring.compare(tmp_path, 10**6, 1)
    assert not list(tmp_path.iterdir())


def test_no_room(tmp_path):
    with pytest.raises(SpaceError, match="--size-mb"):
        measuring.compare(tmp_path, 10**18, 1)


def test_all_benchmarks_without_a_name(thaw, monkeypatch):
    ran = []
    monkeypatch.setattr(measuring, "compare", lambda *arguments: ran.append(arguments) or pytest.skip("asked for"))
    with pytest.raises(BaseException, match="asked for"):
        thaw("bench")
    assert ran


def test_median_and_speed():
    found = record.Record("restore-cpu", "thaw", "tmpfs", 2 * 10**9, [1.0, 4.0, 2.0], "warm", True, True)
    assert found.median == 2.0 and found.gb_per_s == 1.0
