import json
import os
import subprocess
from pathlib import Path

import pytest

from thaw_vllm.caches import archive
from thaw_vllm.cli.freeze import parse_engine_arg
from thaw_vllm.engines.vllm import api, packing
from thaw_vllm.errors import ExistsError, UsageError
from thaw_vllm.weights.freeze import FreezeReport


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("max_num_seqs=4", ("max_num_seqs", 4)),
        ("max-num-seqs=4", ("max_num_seqs", 4)),
        ("--max-num-seqs=4", ("max_num_seqs", 4)),
        ("enforce_eager=true", ("enforce_eager", True)),
        ("gpu_memory_utilization=0.5", ("gpu_memory_utilization", 0.5)),
        ('hf_overrides={"a": {"b": [1, null]}}', ("hf_overrides", {"a": {"b": [1, None]}})),
        ("revision=main", ("revision", "main")),
        ("tokenizer=some/where-else_1.0", ("tokenizer", "some/where-else_1.0")),
        ('tokenizer="a=b c"', ("tokenizer", "a=b c")),
        ("seed=null", ("seed", None)),
    ],
)
def test_engine_argument(text, parsed):
    assert parse_engine_arg(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "seed", "=3", "a b=3", "seed=True", "seed=None", "a={'b': 1}", "a=two words", "a="]
)
def test_engine_argument_that_is_none(thaw, text):
    ran = thaw("freeze", "--model", "m", "--output", "o.thaw", "--engine-arg", text)
    assert ran.code == 2 and "--engine-arg" in ran.err


@pytest.fixture
def freezing(monkeypatch):
    """Stands for vLLM: remembers what it was called with, and is as noisy."""
    calls = []

    def freeze_checkpoint(model, path, **arguments):
        calls.append((model, Path(path), arguments))
        print("INFO something that a library prints")
        size = arguments.get("tensor_parallel_size", 1)
        return [
            FreezeReport(f"{path}.{rank}", 10**9, 10**9 + 5, 3, f"{rank}" * 64, "m", {"total": 0.5})
            for rank in range(size)
        ]

    monkeypatch.setattr(api, "freeze_checkpoint", freeze_checkpoint)
    for name in ("VLLM_LOGGING_LEVEL", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_defaults_are_the_engines(thaw, freezing):
    ran = thaw("freeze", "--model", "M", "--output", "w.thaw")
    assert ran.code == 0
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    quiet = {"force": False, "compress": False, "source_format": "auto", "use_tqdm_on_load": False}
    assert freezing == [("M", Path("w.thaw"), sizes | quiet)]
    assert "w.thaw.0" in ran.out and "2.00 GB/s" in ran.out and "0" * 64 in ran.out
    assert "INFO" not in ran.out and "INFO something" in ran.err


def test_every_option_reaches_the_engine(thaw, freezing):
    options = [
        "--tensor-parallel-size",
        2,
        "--pipeline-parallel-size",
        3,
        "--enable-expert-parallel",
        "--dtype",
        "float16",
        "--quantization",
        "fp8",
    ]
    options += [
        "--max-model-len",
        128,
        "--trust-remote-code",
        "--source-format",
        "safetensors",
        "--force",
        "--compress",
    ]
    options += ["--engine-arg", "seed=7", "--engine-arg", "use-tqdm-on-load=true"]
    assert thaw("freeze", "--model", "M", "--output", "w.thaw", *options).code == 0
    ((_, _, arguments),) = freezing
    assert arguments == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "enable_expert_parallel": True,
        "dtype": "float16",
        "quantization": "fp8",
        "max_model_len": 128,
        "compress": True,
        "trust_remote_code": True,
        "source_format": "safetensors",
        "force": True,
        "seed": 7,
        "use_tqdm_on_load": True,
    }


def test_json_is_alone_on_standard_output(thaw, freezing):
    ran = thaw("freeze", "--model", "M", "--output", "w.thaw", "--tensor-parallel-size", 2, "--json")
    assert ran.code == 0
    assert [rank["path"] for rank in ran.document["ranks"]] == ["w.thaw.0", "w.thaw.1"]
    assert ran.document["model"] == "m" and ran.document["content"] == "0" * 64


@pytest.mark.parametrize(("flags", "level"), [([], "CRITICAL"), (["--verbose"], None)])
def test_engine_is_quiet_unless_asked(thaw, freezing, flags, level):
    assert thaw("freeze", "--model", "M", "--output", "w.thaw", *flags).code == 0
    assert os.environ.get("VLLM_LOGGING_LEVEL") == level


def test_level_that_is_set_stays(thaw, freezing, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    thaw("freeze", "--model", "M", "--output", "w.thaw")
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_existing_snapshot(thaw, tmp_path):
    (tmp_path / "w.thaw").write_text("mine")
    ran = thaw("freeze", "--model", "M", "--output", tmp_path / "w.thaw")
    assert ran.code == ExistsError.exit_code and "--force" in ran.err and ran.out == ""
    assert (tmp_path / "w.thaw").read_text() == "mine"


def test_missing_vllm(spawn, tmp_path):
    (tmp_path / "hidden" / "vllm").mkdir(parents=True)
    (tmp_path / "hidden" / "vllm" / "__init__.py").write_text("raise ImportError('no vLLM here')")
    environment = {"PYTHONPATH": str(tmp_path / "hidden")}
    ran = spawn("freeze", "--model", "M", "--output", "w.thaw", env=environment)
    assert ran.code == 7 and "no vLLM here" in ran.err and "pip install vllm" in ran.err


@pytest.mark.vllm
@pytest.mark.slow
def test_real_engine(spawn, tmp_path):
    """The whole way: vLLM loads a tiny checkpoint, the answer is one JSON document, the file is sound."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.engines.vllm.models import KINDS

    (tmp_path / "model").mkdir()
    model = KINDS[next(iter(KINDS))](tmp_path / "model")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ran = spawn("freeze", "--model", model, "--output", "w.thaw", "--json", env=environment)
    assert ran.code == 0, ran.err
    assert [Path(rank["path"]).name for rank in json.loads(ran.out)["ranks"]] == ["w.thaw"]
    assert spawn("verify", "w.thaw", "--content").code == 0
    assert spawn("id", "w.thaw", "--json").document["model"] == spawn("id", model, "--json").document["model"]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".thaw-part")]


@pytest.mark.parametrize("name", ["model", "path"])
def test_engine_arg_cannot_say_what_an_option_says(thaw, freezing, name):
    ran = thaw("freeze", "--model", "M", "--output", "w.thaw", "--engine-arg", f"{name}=x")
    assert ran.code == 2 and f"cannot set {name}" in ran.err and not freezing


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["load_format", "model_loader_extra_config"])
def test_what_freezing_sets_itself(name, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(UsageError, match=name):
        api.freeze_checkpoint("M", tmp_path / "w.thaw", **{name: True})


@pytest.mark.parametrize(
    ("name", "cure"),
    [("w.thaw", "give --snapshot another name"), ("folder", "is a directory"), ("absent/w.thaw", "make it first")],
)
def test_demo_says_what_its_target_is(name, cure, thaw, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    (tmp_path / "w.thaw").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    ran = thaw("demo", "--model", tmp_path, "--snapshot", tmp_path / name)
    assert ran.code != 0 and cure in ran.err and "--force" not in ran.err


def test_the_conversation_of_a_demo_is_its_own(thaw, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    ran = thaw("demo", "fork", "--model", tmp_path, "--question", "Why?")
    assert ran.code == 2 and "leave --question out" in ran.err


def test_demo_keeps_what_is_there(thaw, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    (tmp_path / "w.thaw").write_text("mine")
    ran = thaw("demo", "--model", tmp_path, "--snapshot", tmp_path / "w.thaw")
    assert ran.code != 0 and "exists" in ran.err
    assert (tmp_path / "w.thaw").read_text() == "mine"


class TestWithCaches:
    """``--with-caches``: freezing is a process of its own, and what is packed afterwards is served likewise."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """What was run and packed; neither is."""
        found = {}

        def run(command, **options):
            found["command"] = command[3:]
            document = {"ranks": [{"path": "W.thaw", "file_size": 9, "tensors": 1, "gb_per_s": 1.0, "model": "m"}]}
            document["ranks"][0]["content"] = "c"
            return subprocess.CompletedProcess(command, found.get("code", 0), json.dumps(document).encode())

        def pack(path, model, snapshot, words, *, force, say):
            found["packed"] = (str(path), model, str(snapshot), words, force)
            if "error" in found:
                raise found["error"]
            manifest = archive.Manifest({}, {}, ())
            return packing.Packed(str(path), "5ha", 7, manifest, 1.0)

        monkeypatch.setattr("thaw_vllm.cli.freeze.subprocess.run", run)
        monkeypatch.setattr(packing, "pack", pack)
        return found

    def test_both_are_given_what_was_given(self, thaw, asked, tmp_path):
        output = tmp_path / "W.thaw"
        more = ("--tensor-parallel-size", 2, "--trust-remote-code", "--compress", "--force", "--engine-arg", "seed=3")
        ran = thaw("freeze", "--model", "M", "--output", output, "--with-caches", *more)
        assert ran.code == 0, ran.err
        file = str(tmp_path / "W.thawcaches")
        assert asked["command"][:5] == ["freeze", "--model", "M", "--output", str(output)]
        frozen = asked["command"][5:]
        for words in (["--tensor-parallel-size", "2"], ["--engine-arg", "seed=3"]):
            at = frozen.index(words[0])
            assert frozen[at : at + 2] == words
        assert {"--trust-remote-code", "--compress", "--force", "--json"} <= set(frozen)
        assert "--with-caches" not in frozen
        served = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--trust-remote-code", "--seed", "3"]
        assert asked["packed"] == (file, "M", str(output), served, True)
        assert f"{file} (7 bytes, 0 compiled parts)" in ran.out and "5ha" in ran.out

    def test_json(self, thaw, asked, tmp_path):
        ran = thaw("freeze", "--model", "M", "--output", tmp_path / "W.thaw", "--with-caches", "--json")
        assert ran.document["caches"] == {"path": str(tmp_path / "W.thawcaches"), "sha256": "5ha", "bytes": 7}
        assert ran.document["ranks"][0]["model"] == "m"

    def test_nothing_is_frozen_where_caches_are_in_the_way(self, thaw, asked, tmp_path):
        (tmp_path / "W.thawcaches").touch()
        ran = thaw("freeze", "--model", "M", "--output", tmp_path / "W.thaw", "--with-caches")
        assert ran.code == 6 and "exists" in ran.err and not asked

    def test_a_freeze_that_failed_says_so_itself(self, thaw, asked, tmp_path):
        asked["code"] = 5
        ran = thaw("freeze", "--model", "M", "--output", tmp_path / "W.thaw", "--with-caches")
        assert ran.code == 5 and "packed" not in asked

    def test_the_snapshot_stays_where_packing_fails(self, thaw, asked, tmp_path):
        asked["error"] = UsageError("there is nothing to pack")
        ran = thaw("freeze", "--model", "M", "--output", tmp_path / "W.thaw", "--with-caches")
        assert ran.code == 2 and "was frozen, but its caches were not packed: there is nothing to pack" in ran.err
