"""Caches that travel: what becomes of a file, and with a whole engine, that what is in it is not compiled again."""

import json
import os
import shutil
from pathlib import Path

import pytest

from thaw_vllm.caches import archive, machine, packing, places, trust, unpacking
from thaw_vllm.engines.vllm import caches, fresh
from thaw_vllm.engines.vllm import packing as starts
from thaw_vllm.engines.vllm.fast_start import BUNDLE
from thaw_vllm.errors import ExistsError, StorageError, UsageError

ARGS = {"max_model_len": 128, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": False}
KERNEL = "vllm/torch_compile_cache/torch_aot_compile/thaw-" + "a" * 64 + "/inductor_cache/triton/0/K/k.cubin"


@pytest.fixture
def environment(tmp_path):
    return {"HOME": str(tmp_path / "home"), "THAW_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def packed(tmp_path, environment):
    """A file with one kernel, packed by this user for this machine."""
    source = tmp_path / "k.cubin"
    source.write_bytes(b"kernel")
    path = tmp_path / f"w{caches.SUFFIX}"
    packing.pack(path, [(KERNEL, source)], machine.key(), {"variables": {BUNDLE: "1"}})
    trust.note_own(archive.read(path).sha256, environment)
    return path


def unpacked(environment):
    return Path(environment["HOME"], ".cache", KERNEL)


def test_unpacked_for_a_start(packed, environment, tmp_path):
    found = caches.bring(packed, "own", environment, report=str(tmp_path / "report"))
    assert found.used and found.counts == {"written": 1, "present": 0, "bytes": 6}
    assert found.environment == {BUNDLE: "1"}
    assert unpacked(environment).read_bytes() == b"kernel"
    noted = json.loads((tmp_path / "report" / caches.BROUGHT).read_text())
    assert noted.pop("at") > 0
    assert noted == {"file": str(packed), "used": True, "said": found.said, "written": 1, "present": 0, "bytes": 6}
    again = caches.bring(packed, "own", environment | {BUNDLE: "0"})
    assert again.used and again.environment == {}, "who chose is not overruled"


def refused(packed, environment, trusted="own"):
    found = caches.bring(packed, trusted, environment)
    assert not found.used and found.environment == {} and found.counts == {}
    assert not Path(environment["HOME"]).exists()
    return found.said


def test_what_is_not_trusted_is_said(packed, environment):
    assert "was not trusted" in refused(packed, environment, None)
    assert "is not the file that was trusted" in refused(packed, environment, "0" * 64)
    environment["THAW_STATE_DIR"] += "-of-another"
    assert "not one that you have packed here" in refused(packed, environment)


def test_another_machine_is_said(packed, environment, monkeypatch):
    monkeypatch.setattr(machine, "key", lambda: {"engine": "vllm 99"})
    assert "for another machine or other libraries: engine (vllm" in refused(packed, environment)


def test_no_file_and_a_damaged_one_are_said(packed, environment, tmp_path):
    assert "cannot be read: No such file" in refused(tmp_path / "none", environment)
    packed.write_bytes(packed.read_bytes()[:-9])
    trust.note_own(archive.fetch(packed).sha256, environment)
    assert "is no file of caches" in refused(packed, environment)


def test_a_full_disk_is_said(packed, environment, monkeypatch):
    real = os.statvfs

    def full(path):
        found = list(real(path))
        found[4] = 0  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", full)
    found = caches.bring(packed, "own", environment)
    assert not found.used and "0.00 GB free" in found.said
    assert found.environment == {BUNDLE: "1"}, "what is there may be enough"
    assert not unpacked(environment).exists()


def test_no_home(packed, environment):
    environment["HOME"] = "nowhere"
    assert "there is no home directory" in caches.bring(packed, "own", environment).said


def test_a_word_that_trusts_nothing_is_an_error(packed, environment):
    with pytest.raises(UsageError, match="takes 'own'"):
        caches.bring(packed, "yes", environment)


@pytest.mark.parametrize(
    ("snapshot", "file"),
    [("w.thaw", "w.thawcaches"), ("d/llama", "d/llama.thawcaches"), ("a.b.thaw", "a.b.thawcaches")],
)
def test_beside_a_snapshot(snapshot, file):
    assert caches.beside(snapshot) == Path(file)


def test_which_file_a_start_means(tmp_path, packed):
    assert caches.chosen_file(packed, "w.thaw", None) == str(packed)
    assert caches.chosen_file(None, "w.thaw", "own") == "w.thawcaches"
    assert caches.chosen_file(None, "w.thaw", None) is None
    for wrong in (
        {"caches": ""},
        {"caches": tmp_path / "none"},
        {"trusted": "own"},
        {"trusted": "x", "caches": packed},
    ):
        with pytest.raises((UsageError, StorageError)):
            caches.chosen_file(wrong.get("caches"), None, wrong.get("trusted"))


@pytest.mark.parametrize(
    "words", [["--load-format", "auto"], ["--port=1"], ["--model-loader-extra-config", "{}"], ["--api-k", "x"]]
)
def test_what_packing_sets_itself(tmp_path, words):
    with pytest.raises(UsageError, match="packing sets --"):
        starts.pack(tmp_path / "x", "M", words=words)
    assert not list(tmp_path.iterdir())


def test_packing_replaces_nothing(packed):
    before = packed.read_bytes()
    with pytest.raises(ExistsError):
        starts.pack(packed, "M")
    assert packed.read_bytes() == before


def test_secrets_are_not_told():
    given = {"api_k": "k", "hf_tok": "t", "kv_transfer_config": "p", "dtype": "a b", "max_model_len": "128"}
    assert starts._shown(given) == dict.fromkeys(given, "(given)") | {"max_model_len": "128"}


def test_kernels_are_where_both_look(tmp_path):
    usual, beside = tmp_path / "a", tmp_path / "b"
    found = dict(starts._kernels_elsewhere({"triton/A/a": usual, KERNEL: beside, "vllm/modelinfos/m.json": usual}))
    assert found == {KERNEL.replace("K/k.cubin", "A/a"): usual, "triton/K/k.cubin": beside}


def test_triton_finds_what_was_unpacked(tmp_path, environment, monkeypatch):
    """Its own list of a kernel's files, written through a link as vLLM's names are, and read elsewhere."""
    cache = pytest.importorskip("triton.runtime.cache", reason="Triton is not installed")
    root = tmp_path / "packing" / "triton"
    (root / "real").mkdir(parents=True)
    (root / "named").symlink_to("real")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(root / "named"))
    manager = cache.FileCacheManager("KEY")
    manager.put_group("k.json", {name: manager.put(b"x" + name.encode(), name) for name in ("k.json", "k.cubin")})
    here = places.places({"HOME": str(tmp_path), "TRITON_CACHE_DIR": str(root / "real")})[places.TRITON]
    path = tmp_path / "w.thawcaches"
    packing.pack(path, places.files(here), machine.key(), {})
    shutil.rmtree(tmp_path / "packing")
    unpacking.unpack(archive.read(path), places.places(environment))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(cache.knobs.cache, "home_dir", environment["HOME"])
    found = cache.FileCacheManager("KEY").get_group("k.json")
    assert {name: Path(file).read_bytes() for name, file in found.items()} == {
        "k.json": b"xk.json",
        "k.cubin": b"xk.cubin",
    }


def packed_and_moved(model, folder, patch, args, more=dict):
    """Pack a model's caches, move it, and start it for another home with nothing but these.

    Args:
        more: gives further variables of that start.

    Returns:
        What was packed, the answer of the start, and its home.
    """
    patch.setenv("THAW_STATE_DIR", str(folder / "state"))
    first, second = folder / "model", folder / "elsewhere" / "the-model"
    shutil.copytree(model, first)
    patch.setenv("HOME", str(folder / "home"))
    done = starts.pack(folder / "w.thawcaches", str(first), offline=args)
    second.parent.mkdir()
    first.rename(second)
    home = folder / "another home"
    answer = fresh.run(
        "ask",
        model=str(second),
        snapshot=None,
        engine_args=args | {"load_format": "thaw"},
        questions=[starts._prompt(n) for n in starts._PROMPTS if n + 16 < args["max_model_len"]],
        max_tokens=16,
        environment={"HOME": str(home), "THAW_START_REPORT": str(folder / "report")} | more(),
        removed=[*places.empty(folder), *places.UNSET, "XDG_CACHE_HOME"],
        caches=done.path,
    )
    return done, answer, home


@pytest.mark.vllm
@pytest.mark.slow
def test_nothing_is_compiled_again(checkpoints, tmp_path, monkeypatch):
    """A whole vLLM, compiled for whatever runs it here: packed at one path, for one home, and used with others."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done, answer, home = packed_and_moved(checkpoints("tied"), tmp_path, monkeypatch, ARGS)
    assert done.compiled == 1
    (first_found,) = done.answer["compiled"]
    assert [one["state"] for one in first_found["parts"]] == ["new"]
    (found,) = answer["compiled"]
    assert [one | {"state": "found", "why": ""} for one in first_found["parts"]] == found["parts"]
    assert found["kernels"] == []
    assert answer["outputs"] == done.answer["outputs"], "tokens and log-probabilities"
    packed = {Path(m.path).name for m in done.manifest.members}
    compiled = {path.name for path in home.rglob("*.so")}
    assert compiled and compiled <= packed, "C++ that was compiled again"
