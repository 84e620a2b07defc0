"""``thaw caches``, and ``thaw serve`` with a file of them: what is unpacked, and what is refused and why."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from thaw_vllm.caches import machine, packing, places, trust
from thaw_vllm.engines.vllm.fast_start import BUNDLE, CACHES

AOT = "vllm/torch_compile_cache/torch_aot_compile/thaw-" + "a" * 64
MODEL = f"{AOT}/rank_0_0/model"
FILES = {MODEL: b"compiled" * 200, "triton/K/k.cubin": b"kernel", "triton/K/k.json": b"{}"}
LOOKED_FOR = {name: name.replace("vllm/", ".cache/vllm/").replace("triton/", ".triton/cache/") for name in FILES}
SIZE = sum(map(len, FILES.values()))
MADE = {"thaw": "1.0", "model": "llama", "variables": {BUNDLE: "1"}}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Where everything is kept, for a user who has chosen nothing."""
    for name in (*places.empty(tmp_path), *places.UNSET, *CACHES, "XDG_CACHE_HOME", "XDG_STATE_HOME", BUNDLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "snapshots"))
    return tmp_path / "home"


def packed(path, made=MADE, **key):
    """A file of caches for this machine, but for what is said of its key."""
    source = path.parent / "source"
    for name, data in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    packing.pack(path, [(name, source / name) for name in FILES], machine.key() | key, made)
    return path


@pytest.fixture
def file(tmp_path):
    return packed(tmp_path / "a.thawcaches")


@pytest.fixture
def own(file):
    trust.note_own(digest(file), os.environ)
    return file


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpacked(home):
    """What is where a start looks."""
    return {name: (home / where).read_bytes() for name, where in LOOKED_FOR.items() if (home / where).exists()}


class TestUnpack:
    def test_without_trust(self, thaw, file, home, tmp_path):
        """Both cures are named, and nothing is made."""
        for more in ([], ["--json"], ["--cache-dir", tmp_path / "new"]):
            ran = thaw("caches", "unpack", file, *more)
            assert (ran.code, ran.out) == (2, "")
            assert "--trust-caches own" in ran.err and f"--trust-caches {digest(file)}" in ran.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.thawcaches", "source"]

    def test_own(self, thaw, own, home):
        ran = thaw("caches", "unpack", own, "--trust-caches", "own")
        assert ran.code == 0 and ran.err == "", ran.err
        assert ran.out.splitlines() == [
            "unpacked         3 files (1.6 kB), 0 were there",
            f"start vLLM with  {BUNDLE}=1",
        ]
        assert unpacked(home) == FILES

    def test_not_own(self, thaw, file, home):
        trust.note_own("0" * 64, os.environ)
        ran = thaw("caches", "unpack", file, "--trust-caches", "own")
        assert ran.code == 2 and "not one that you have packed here" in ran.err and digest(file) in ran.err
        assert not home.exists()

    @pytest.mark.parametrize("spelled", [str.lower, str.upper])
    def test_by_its_digest(self, thaw, file, home, spelled):
        ran = thaw("caches", "unpack", file, "--trust-caches", spelled(digest(file)), "--json")
        assert ran.code == 0 and ran.err == ""
        assert ran.document == {
            "sha256": digest(file),
            "written": 3,
            "present": 0,
            "bytes": SIZE,
            "unwanted": 0,
            "variables": {BUNDLE: "1"},
        }
        assert unpacked(home) == FILES

    @pytest.mark.parametrize(
        ("word", "said"),
        [("0" * 64, "is not the file that was trusted"), ("yes", "takes 'own'"), ("", "takes 'own'")],
    )
    def test_what_trusts_nothing(self, thaw, own, home, word, said):
        ran = thaw("caches", "unpack", own, "--trust-caches", word)
        assert (ran.code, ran.out) == (2, "") and said in ran.err and not home.exists()

    def test_what_is_there_stays(self, thaw, own, home):
        kept = home / ".triton/cache/K/k.cubin"
        kept.parent.mkdir(parents=True)
        kept.write_bytes(b"mine")
        for written, present in ((2, 1), (0, 3)):
            found = thaw("caches", "unpack", own, "--trust-caches", "own", "--json").document
            assert (found["written"], found["present"]) == (written, present)
        assert unpacked(home) == FILES | {"triton/K/k.cubin": b"mine"}

    def test_elsewhere(self, thaw, own, home, tmp_path):
        """Where a start with the same option looks."""
        new = tmp_path / "new"
        assert thaw("caches", "unpack", own, "--trust-caches", "own", "--cache-dir", new).code == 0
        assert (new / CACHES["TRITON_CACHE_DIR"] / "K/k.cubin").read_bytes() == b"kernel"
        assert (new / CACHES["VLLM_CACHE_ROOT"] / MODEL.partition("/")[2]).exists()
        assert not home.exists()

    def test_where_variables_say(self, thaw, own, home, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "t"))
        assert thaw("caches", "unpack", own, "--trust-caches", "own").code == 0
        assert (tmp_path / "t/K/k.cubin").exists() and list(unpacked(home)) == [MODEL]

    @pytest.mark.parametrize(
        ("made", "chosen", "told"),
        [
            ({BUNDLE: "0"}, None, {}),
            ({BUNDLE: "1"}, "0", {BUNDLE: "1"}),
            ({BUNDLE: "1"}, "1", {}),
            ({BUNDLE: "1; rm -rf /"}, None, {}),
            ({BUNDLE: 1}, None, {}),
            ({"LD_PRELOAD": "/evil.so"}, None, {}),
            (["LD_PRELOAD"], None, {}),
            (None, None, {}),
        ],
    )
    def test_variables_that_are_told(self, thaw, tmp_path, monkeypatch, made, chosen, told):
        path = packed(tmp_path / "b.thawcaches", {"variables": made})
        if chosen is not None:
            monkeypatch.setenv(BUNDLE, chosen)
        ran = thaw("caches", "unpack", path, "--trust-caches", digest(path), "--json")
        assert ran.code == 0 and ran.document["variables"] == told
        lines = thaw("caches", "unpack", path, "--trust-caches", digest(path)).out.splitlines()
        assert [line.split()[-1] for line in lines[1:]] == [f"{name}={value}" for name, value in told.items()]

    def test_for_another_machine(self, thaw, tmp_path, home):
        path = packed(tmp_path / "b.thawcaches", gpu="NVIDIA L4", torch="0.1")
        here = machine.key()
        ran = thaw("caches", "unpack", path, "--trust-caches", digest(path))
        assert (ran.code, ran.out) == (4, "") and not home.exists()
        assert f"gpu (NVIDIA L4, here {here['gpu']}); torch (0.1, here {here['torch']}); pack it here" in ran.err

    def test_on_another_machine(self, thaw, own, home, monkeypatch):
        there = machine.key()
        monkeypatch.setattr(machine, "key", lambda: there | {"driver": "580.1"})
        ran = thaw("caches", "unpack", own, "--trust-caches", "own")
        assert ran.code == 4 and not home.exists()
        assert f"driver ({there.get('driver', 'none')}, here 580.1)" in ran.err

    def test_trust_comes_first(self, thaw, tmp_path):
        """Whoever may not be believed is not asked what it is for."""
        assert thaw("caches", "unpack", packed(tmp_path / "b.thawcaches", gpu="NVIDIA L4")).code == 2

    def test_a_directory_that_will_not_do(self, thaw, own, tmp_path, home):
        (tmp_path / "file").touch()
        ran = thaw("caches", "unpack", own, "--trust-caches", "own", "--cache-dir", tmp_path / "file")
        assert ran.code == 6 and "no caches can be kept in" in ran.err
        ran = thaw("caches", "unpack", own, "--trust-caches", "own", "--cache-dir", "")
        assert ran.code == 2 and "--cache-dir is empty" in ran.err
        (home / ".triton/cache").mkdir(parents=True)
        (home / ".triton/cache").chmod(0o777)
        ran = thaw("caches", "unpack", own, "--trust-caches", "own")
        assert ran.code == 6 and "others may write to" in ran.err and unpacked(home) == {}


class TestInfo:
    def test_own(self, thaw, own, home):
        ran = thaw("caches", "info", own)
        assert ran.code == 0 and ran.err == ""
        pairs, _, table = ran.out.partition("\n\n")
        rows = dict(line.split("  ", 1) for line in pairs.splitlines())
        rows = {name.strip(): value.strip() for name, value in rows.items()}
        assert rows["file"].startswith(str(own)) and rows["sha256"] == digest(own)
        assert rows["packed here"] == "yes: --trust-caches own" and rows["this machine"] == "is the same"
        assert rows.items() >= machine.key().items()
        assert (rows["made: model"], rows["made: variables"]) == ("llama", str({BUNDLE: "1"}))
        assert table.splitlines() == [
            "PLACE   FILES     SIZE",
            "triton      2  8 bytes",
            "vllm        1   1.6 kB",
        ]
        assert not home.exists()

    def test_document(self, thaw, file):
        ran = thaw("caches", "info", file, "--json")
        assert ran.code == 0 and ran.err == ""
        assert ran.document == {
            "path": str(file),
            "sha256": digest(file),
            "bytes": file.stat().st_size,
            "own": False,
            "key": machine.key(),
            "made": MADE,
            "differences": [],
            "places": {"triton": {"files": 2, "bytes": 8}, "vllm": {"files": 1, "bytes": 1600}},
        }
        trust.note_own(digest(file), os.environ)
        assert thaw("caches", "info", file, "--json").document["own"] is True

    def test_of_another_machine(self, thaw, tmp_path):
        path = packed(tmp_path / "b.thawcaches", gpu="NVIDIA L4")
        ran = thaw("caches", "info", path)
        told = f"gpu (NVIDIA L4, here {machine.key()['gpu']})"
        assert ran.code == 0 and f"differs: {told}" in ran.out
        assert ["packed", "here", "no"] in [line.split() for line in ran.out.splitlines()]
        assert thaw("caches", "info", path, "--json").document["differences"] == [told]

    def test_what_a_terminal_would_obey(self, thaw, tmp_path):
        made = {"\x1b[2J": "\x1b]0;evil\x07", "b": ["\x9b"]}
        ran = thaw("caches", "info", packed(tmp_path / "b.thawcaches", made, gpu="a\u202eb"))
        assert ran.code == 0 and all(line.isprintable() for line in ran.out.splitlines()), ran.out
        assert r"made: '\x1b[2J'" in ran.out and r"'a\u202eb'" in ran.out

    def test_it_loads_no_engine(self, file):
        code = f"""
import sys
from thaw_vllm.cli.main import main
assert main(["caches", "info", {str(file)!r}, "--json"]) == 0
print(sorted({{"torch", "vllm", "triton", "numpy"}} & sys.modules.keys()))
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        *document, loaded = ran.stdout.splitlines()
        assert json.loads("\n".join(document))["sha256"] == digest(file) and loaded == "[]"


@pytest.mark.parametrize("command", ["unpack", "info"])
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("none", 6, "cannot be read"),
        (".", 6, "cannot be read"),
        ("pipe", 6, "is no plain file"),
        ("text", 3, "is no file of caches"),
        ("cut", 3, "is no file of caches"),
    ],
)
def test_what_is_no_file_of_caches(thaw, file, home, monkeypatch, command, what, code, said):
    monkeypatch.chdir(file.parent)
    os.mkfifo("pipe")
    (file.parent / "text").write_text("caches")
    (file.parent / "cut").write_bytes(file.read_bytes()[:-30])
    regular = what in ("text", "cut")
    trusted = ["--trust-caches", digest(file.parent / what if regular else file)] if command == "unpack" else []
    ran = thaw("caches", command, what, *trusted)
    assert (ran.code, ran.out) == (code, "") and said in ran.err and repr(what) in ran.err
    assert ran.err.count("\n") == 1 and not home.exists()


@pytest.mark.parametrize("words", [["caches", "melt"], ["caches", "info"], ["caches", "info", "a", "b"]])
def test_what_is_no_command(thaw, words):
    ran = thaw(*words)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("error: ")


class TestServe:
    @pytest.fixture
    def started(self, monkeypatch):
        """What would be run, where it comes to that; vLLM counts as installed."""
        from thaw_vllm.cli import run
        from thaw_vllm.engines.vllm import api
        from thaw_vllm.serve import run as several

        found = []
        monkeypatch.setenv("THAW_ADMIN_TOKEN", "a token of 24 characters")
        monkeypatch.delenv("THAW_START_REPORT", raising=False)
        monkeypatch.setattr(run, "hand_over", lambda *given, **options: found.append(os.environ.copy()))
        monkeypatch.setattr(several, "run", lambda *given: found.append(given))
        monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
        return found

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["--model", "m", "--trust-caches", "own"], 2, "name it with --caches"),
            (["--model", "m", "--snapshot", "none", "--trust-caches", "own"], 2, "name it with --caches"),
            (["--model", "m", "--trust-caches", "yes"], 2, "takes 'own'"),
            (["--model", "m", "--snapshot", "w.thaw", "--trust-caches", "f" * 63], 2, "takes 'own'"),
            (["--model", "m", "--caches", "a.thawcaches", "--trust-caches", "yes"], 2, "takes 'own'"),
            (["--model", "m", "--caches", "none.thawcaches"], 6, "there is no file of caches 'none.thawcaches'"),
            (["--model", "m", "--caches", "none", "--trust-caches", "own"], 6, "make it: thaw caches pack"),
            (
                ["--register", "a=m", "--caches", "a.thawcaches"],
                2,
                "several models take no --caches: give it in the args",
            ),
            (["--register", "a=m", "--trust-caches", "own"], 2, "or unpack it first"),
        ],
    )
    def test_what_is_refused(self, thaw, started, own, home, monkeypatch, words, code, said):
        monkeypatch.chdir(own.parent)
        ran = thaw("serve", *words)
        assert ran.code == code and said in ran.err and started == [] and not home.exists()

    def test_trusted(self, thaw, started, own, home):
        ran = thaw("serve", "--model", "m", "--snapshot", "none", "--caches", own, "--trust-caches", "own")
        assert ran.code == 0 and "3 files unpacked, 0 were there" in ran.err and unpacked(home) == FILES
        assert started[0][BUNDLE] == "1"

    @pytest.fixture
    def weights(self, monkeypatch, tmp_path):
        """A snapshot, which is not opened."""
        from thaw_vllm.engines.vllm import api

        monkeypatch.setattr(api, "check_sizes", lambda *given: None)
        return tmp_path / "w.thaw"

    def test_beside_the_snapshot(self, thaw, started, weights, home):
        path = packed(weights.with_suffix(".thawcaches"))
        ran = thaw("serve", "--model", "m", "--snapshot", weights, "--trust-caches", digest(path))
        assert ran.code == 0 and "3 files unpacked" in ran.err and unpacked(home) == FILES
        assert len(started) == 1

    @pytest.mark.parametrize(
        ("words", "said"), [([], "was not trusted"), (["--trust-caches", "own"], "not one that you have packed here")]
    )
    def test_what_is_not_trusted_is_compiled_as_ever(self, thaw, started, file, home, words, said):
        ran = thaw("serve", "--model", "m", "--snapshot", "none", "--caches", file, *words)
        assert ran.code == 0 and f"thaw: caches are not used: {file}" in ran.err.replace("'", "") and said in ran.err
        assert len(started) == 1 and BUNDLE not in started[0] and not home.exists()

    def test_of_another_machine(self, thaw, started, home, tmp_path):
        path = packed(tmp_path / "b.thawcaches", gpu="NVIDIA L4")
        words = ["--caches", path, "--trust-caches", digest(path)]
        ran = thaw("serve", "--model", "m", "--snapshot", "none", *words)
        assert ran.code == 0 and "caches are not used" in ran.err and "gpu (NVIDIA L4" in ran.err
        assert len(started) == 1 and not home.exists()

    def test_untrusted_ones_beside_a_snapshot_are_not_looked_at(self, thaw, started, weights, home):
        packed(weights.with_suffix(".thawcaches"))
        ran = thaw("serve", "--model", "m", "--snapshot", weights)
        assert ran.code == 0 and "caches" not in ran.err and len(started) == 1 and not home.exists()
