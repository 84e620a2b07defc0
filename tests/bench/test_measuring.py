"""Every benchmark once, small, on the host."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from thaw_vllm.bench import record, rivals, weights
from thaw_vllm.bench.rivals import RIVALS, system
from thaw_vllm.bench.summary import general

SMALL = ("--size-gb", 0.01)


@pytest.fixture(autouse=True)
def _host(cpu):
    """No GPU."""


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if weights.ceilings.on_memory(place):
        pytest.skip("the tests' directory is in memory")
    return place


def kept(tmp_path):
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_limits(thaw, disk, memory_path, tmp_path):
    places = ("--dir", memory_path, "--dir", disk)
    ran = thaw("bench", "limits", "--size-gb", 0.03, "--runs", 2, *places, "--threads", 2, "--record")
    assert ran.code == 0, ran.err
    lines = kept(tmp_path)
    assert [(line["work"], line["route"]) for line in lines] == [
        ("tmpfs-write", "pwrite"),
        ("tmpfs-write", "mapping"),
        ("memory-read", "preadv, 1 MiB"),
        ("disk-write", "direct, 8 MiB, fsync"),
        ("disk-read", "direct, 8 MiB"),
        ("memory-read", "preadv, 1 MiB"),
    ]
    for line in lines:
        assert set(record.FIELDS) <= set(line) and len(line["seconds"]) == 2 and line["bytes"] >= 24 << 20
        assert line["system"] == "limit" and line["machine"]["file_system"] and line["threads"] == 2
    assert "h2d, d2h: limit: needs a GPU" in ran.out and "is memory, not a disk" in ran.out
    assert not list(memory_path.iterdir()) and not list(disk.iterdir())


def test_weights_by_every_route(thaw, disk, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    systems = [f"--system={name}" for name in ("thaw", "safetensors", "instanttensor")]
    arguments = ("--dir", disk, "--runs", 2, "--cold-runs", 1, "--limit-gb", 0.01, *systems, "--record", "--json")
    ran = thaw("bench", "weights", *SMALL, *arguments)
    assert ran.code == 0, ran.err
    found = [r for r in ran.document["records"] if r["system"] != "limit"]
    assert [(r["medium"], r["system"], r["verified"], r["cache"], len(r["seconds"])) for r in found] == [
        ("pagecache", "thaw", True, "warm", 2),
        ("pagecache", "thaw", False, "warm", 2),
        ("pagecache", "safetensors", False, "warm", 2),
        ("disk", "thaw", True, "cold", 1),
        ("disk", "safetensors", False, "cold", 1),
        ("pinned", "thaw", True, "warm", 2),
        ("pinned", "thaw", False, "warm", 2),
    ]
    for line in found:
        assert line["work"] == "restore-cpu" and line["equal"] is True and line["run"] == record.RUN
        assert line["machine"]["file_system"] and line["of_limit"] > 0
        cold = line["medium"] == "disk"
        assert all(share <= 0.01 if cold else share >= 0.99 for share in line["residency"])
    assert found[0]["of_best_rival"] > 0 and "of_best_rival" not in found[2] and found[5]["pin_seconds"]
    assert {m["system"] for m in ran.document["missed"]} == {"instanttensor"}
    assert [line["seconds"] for line in kept(tmp_path)] == [r["seconds"] for r in ran.document["records"]]
    assert not list(disk.iterdir())


def test_weights_on_tmpfs_and_files_kept(thaw, memory_path):
    arguments = ("--dir", memory_path, "--runs", 1, "--system", "thaw", "--limit-gb", 0.01, "--work", "restore-tmpfs")
    ran = thaw("bench", "weights", *SMALL, *arguments, "--keep")
    assert ran.code == 0, ran.err
    assert "restore-cpu tmpfs" in ran.out and "thaw, verified" in ran.out and "yes" in ran.out
    (folder,) = memory_path.iterdir()
    before = (folder / "model.thaw").stat().st_mtime_ns
    again = thaw("bench", "weights", *SMALL, *arguments, "--keep")
    assert again.code == 0 and "making" in ran.err and "making" not in again.err
    assert (folder / "model.thaw").stat().st_mtime_ns == before


def test_other_bytes_are_told(thaw, memory_path, monkeypatch):
    """The source's digests are changed, so everything restored is wrong."""
    original = weights.opened

    def changed(*arguments):
        files = original(*arguments)
        return files and replace(files, digests=files.digests | {"model.norm.weight": "other"})

    monkeypatch.setattr(weights, "opened", changed)
    arguments = ("--dir", memory_path, "--runs", 1, "--system", "thaw", "--limit-gb", 0.01, "--work", "restore-tmpfs")
    ran = thaw("bench", "weights", *SMALL, *arguments)
    assert ran.code == 1
    assert "NO" in ran.out and "NOT EQUAL: restore-cpu, thaw" in ran.err and "model.norm.weight" in ran.err


def test_a_rival_that_fails_stops_nothing(thaw, memory_path, monkeypatch):
    """It counts as installed here, and cannot be imported in its process."""
    if find_spec("fastsafetensors") is not None:
        pytest.skip("fastsafetensors is installed")
    monkeypatch.setattr(type(system("fastsafetensors")), "installed", lambda self: "1.0")
    arguments = ("--runs", 2, "--limit-gb", 0.01, "--work", "restore-tmpfs", "--dir", memory_path)
    ran = thaw("bench", "weights", *SMALL, *arguments, "--system", "fastsafetensors", "--system", "thaw")
    assert ran.code == 0
    assert "restore-cpu: fastsafetensors: ModuleNotFoundError: No module named 'fastsafetensors'" in ran.out
    assert ran.out.count("thaw, ") == 2


@pytest.mark.parametrize("medium", ["memory", "disk"])
def test_freeze(thaw, medium, memory_path, disk):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    place = memory_path if medium == "memory" else disk
    arguments = ("--dir", place, "--runs", 1, "--limit-gb", 0.01, "--json")
    ran = thaw("bench", "freeze", *SMALL, *arguments)
    assert ran.code == 0, ran.err
    small = {True: "thaw-compressed"}
    found = {
        small.get(r["work"].endswith("-compressed"), r["system"]): r
        for r in ran.document["records"]
        if r["system"] != "limit"
    }
    assert set(found) == {"thaw", "thaw-compressed", "safetensors"}
    assert found["thaw-compressed"]["file_size"] < 0.7 * found["thaw"]["file_size"]
    for line in found.values():
        assert general(line["work"]) == ("freeze-tmpfs" if medium == "memory" else "freeze-disk")
        assert line["equal"] is True and line["bytes"] > 0 and line["of_limit"] > 0
        assert (line["file_size"] < line["bytes"]) == (line is found["thaw-compressed"])
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["limits", "--work", "nothing"], 2, "there is no work 'nothing'; there are h2d"),
        (
            ["weights", "--system", "magic"],
            2,
            "there is no system 'magic'; there are thaw, thaw-compressed, thaw-expected, thaw-compressed-expected, ",
        ),
        (["weights", "--work", "restore"], 2, "restore-tmpfs"),
        (["weights", "--dir", "nowhere"], 6, "there is no directory 'nowhere'"),
        (["weights", "--device", "tpu"], 2, "--device takes cuda, cuda:N or cpu"),
        (["weights", "--device", "cuda"], 2, "there is no device 'cuda' here"),
        (["freeze", "--system", "magic"], 2, "there is no system"),
        (["limits", "--runs", "0"], 2, "runs"),
        (["limits", "--size-gb", "1e9", "--dir", "."], 6, "--size-gb"),
        (["weights", "--size-gb", "1e4", "--dir", ".", "--system", "thaw"], 6, "--size-gb"),
        (["freeze", "--size-gb", "1e4", "--dir", "."], 6, "--size-gb"),
        (["cold-start"], 2, "--model"),
        (["report", "--output", "nowhere/page.md"], 6, "there is no directory 'nowhere'"),
    ],
)
def test_wrong_options(thaw, arguments, code, says):
    ran = thaw("bench", *arguments)
    assert ran.code == code and says in ran.err and ran.err.count("error: ") == 1


def test_no_system_that_can(thaw, memory_path):
    ran = thaw("bench", "weights", "--system", "thaw-expected", "--device", "cpu", "--dir", memory_path)
    assert "restores to cuda only" in ran.out and "unexpected" not in ran.err
    assert not list(memory_path.iterdir())


def test_registry_is_the_folder():
    folder = {path.stem for path in Path(rivals.__file__).parent.glob("*.py")} - {"__init__"}
    assert folder == set(RIVALS.values())


FILES = ("safetensors", "thaw", "thaw-compressed", "native")


@pytest.mark.parametrize("name", weights.ALL_SYSTEMS)
def test_every_system_says_what_it_is(name):
    found = system(name)
    assert found.name == name and found.package and found.devices and found.files in FILES
    assert found.pins <= found.in_place
    if found.installed() is not None and "cpu" in found.devices:
        found.prepare(torch.device("cpu"))


def test_missing_rivals_have_the_install_line(monkeypatch):
    for name in RIVALS:
        monkeypatch.setattr(type(system(name)), "installed", lambda self: None)
    present, missed = weights.present(weights.ALL_SYSTEMS, "cpu")
    assert [s.name for s in present] == ["thaw", "thaw-compressed"]
    assert missed == {name: f"not installed: pip install {name}" for name in RIVALS} | dict.fromkeys(
        ("thaw-expected", "thaw-compressed-expected"), "restores to cuda only"
    )
