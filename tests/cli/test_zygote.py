"""``thaw zygote``, ``thaw run`` and ``thaw serve``: their options, tables and documents."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.zygote.running import made, until

from thaw_vllm.cli import serve as serving
from thaw_vllm.engines.vllm import fast_start, serve_variables
from thaw_vllm.errors import MissingDependencyError
from thaw_vllm.weights import cache


@pytest.fixture(scope="module")
def place():
    with made() as one:
        yield one


@pytest.fixture
def zygote(place):
    """One that runs; where a test has stopped it, another is started."""
    if not place.place.socket.exists():
        place.start()
    yield place
    place.all_gone()


@pytest.mark.parametrize("command", [("zygote",), ("zygote", "start"), ("zygote", "stop"), ("run",), ("serve",)])
def test_help(thaw, command):
    ran = thaw(*command, "--help")
    assert ran.code == 0 and "Usage: thaw " + " ".join(command) in ran.out and ran.err == ""


def test_help_names_them(thaw):
    out = thaw("--help").out
    assert all(f" {name} " in out for name in ("zygote", "run", "serve"))


class TestZygote:
    def test_start(self, thaw, place):
        if place.place.socket.exists():
            thaw("zygote", "stop")
        ran = thaw("zygote", "start")
        assert ran.code == 0 and ran.err == "", ran.err
        rows = dict(line.split(None, 1) for line in ran.out.splitlines())
        assert rows["zygote"].startswith("default, pid ") and rows["programs"] == "0 running, 0 ended"
        assert rows["engines"] == "forked" and "cannot" not in rows and "outdated" not in rows
        place.pid = place.status()["pid"]
        again = thaw("zygote", "start", "--json")
        assert again.code == 2 and again.out == "" and "runs already; thaw zygote status" in again.err

    def test_documents(self, thaw, place):
        thaw("zygote", "stop")
        started = thaw("zygote", "start", "--import", "json", "--import", "csv", "--json").document
        place.pid = started["pid"]
        assert started["modules"] == ["numpy", "json", "csv"] and started["name"] == "default"
        found = thaw("zygote", "status", "--json").document
        ignored = ("memory",)
        assert {k: v for k, v in found.items() if k not in ignored} == {
            k: v for k, v in started.items() if k not in ignored
        }
        stopped = thaw("zygote", "stop", "--json").document
        assert stopped == {"stopped": started["pid"], "running": 0}

    def test_caches(self, thaw, place, tmp_path):
        thaw("zygote", "stop")
        place.pid = thaw("zygote", "start", "--cache-dir", tmp_path / "new", "--json").document["pid"]
        environment = Path(f"/proc/{place.pid}/environ").read_bytes().decode().split("\0")
        assert {f"TRITON_CACHE_DIR={tmp_path}/new/triton", f"VLLM_CACHE_ROOT={tmp_path}/new/vllm"} <= {*environment}
        thaw("zygote", "stop")
        (tmp_path / "file").touch()
        ran = thaw("zygote", "start", "--cache-dir", tmp_path / "file")
        assert ran.code == 6 and "no caches can be kept" in ran.err and not place.place.socket.exists()

    def test_nothing_runs(self, thaw, place):
        thaw("zygote", "stop")
        for command in ("stop", "status"):
            for options, cure in (([], "thaw zygote start\n"), (["--name", "b"], "thaw zygote start --name b\n")):
                ran = thaw("zygote", command, *options)
                assert ran.code == 2 and ran.out == "" and ran.err.endswith(cure)

    def test_table(self, thaw, zygote):
        process = zygote.popen("-m", "code", "-q", stdin=subprocess.PIPE)
        until(lambda: zygote.status()["programs"])
        ran = thaw("zygote", "status")
        head, row = ran.out.splitlines()[-2:]
        assert head.split() == ["pid", "processes", "private", "shared", "since", "program"]
        assert row.split()[1] == "1" and row.endswith("code -q") and "1 running" in ran.out
        process.communicate("exit(4)\n", timeout=60)
        assert process.returncode == 4

    def test_code_is_not_shown(self, zygote, thaw):
        process = zygote.popen("-c", "input('secret')", stdin=subprocess.PIPE)
        until(lambda: zygote.status()["programs"])
        assert "secret" not in thaw("zygote", "status").out
        process.communicate("\n", timeout=60)

    def test_names_of_programs_are_shown_as_one_line(self, zygote, thaw, tmp_path):
        (tmp_path / "a\n\x1b[31m.py").write_text("input()")
        process = zygote.popen(tmp_path / "a\n\x1b[31m.py", stdin=subprocess.PIPE)
        until(lambda: zygote.status()["programs"])
        out = thaw("zygote", "status").out
        assert "\x1b" not in out and "a\\n" in out
        process.communicate("\n", timeout=60)

    def test_what_is_wrong_is_said(self, thaw, zygote, tmp_path, monkeypatch):
        from thaw_vllm.zygote import client

        found = zygote.status() | {"left_out": ["vllm.x"], "unsound": "another thread", "changed": "/a.py"}
        monkeypatch.setattr(client, "ask", lambda place, what: found | {"engines_forked": False})
        out = thaw("zygote", "status").out
        for text in ("vllm.x", "another thread; stop it and start it again", "/a.py has changed", "spawn"):
            assert text in out

    @pytest.mark.parametrize("name", ["a/b", "", "-"])
    def test_names(self, thaw, place, name):
        ran = thaw("zygote", "status", f"--name={name}")
        assert ran.code == 2 and "cannot name a zygote" in ran.err


class TestRun:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "no program"),
            (["-m", "a", "-c", "b"], None),
            (["-m"], "requires an argument"),
            (["-c"], "requires an argument"),
            (["--zygote"], "requires an argument"),
            (["--nothing", "x.py"], "No such option"),
            (["--json", "-c", ""], "--json needs --detach"),
            (["--zygote", "a/b", "-c", ""], "cannot name a zygote"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, spawn, place, arguments, said):
        ran = spawn("run", *arguments)
        if said is None:  # -c is the module's, as with python
            assert ran.code in (1, 2)
            return
        assert ran.code == 2 and said in ran.err and ran.out == "" and ran.err.count("\n") == 1

    def test_no_script(self, spawn, zygote):
        ran = spawn("run", "none.py")
        assert (ran.code, ran.err) == (6, "error: there is no script 'none.py'\n")

    def test_no_zygote(self, spawn, place):
        ran = spawn("run", "--zygote", "other", "-c", "print(1)")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "error: no zygote 'other' runs; thaw zygote start --name other\n"

    @pytest.mark.parametrize("kind", ["script", "-m", "-c"])
    def test_fallback(self, spawn, place, kind, tmp_path):
        text = "import sys; print(sys.argv[1:], 'numpy' in sys.modules); sys.exit(7)"
        (tmp_path / "program.py").write_text(text)
        how = {"script": ["program.py"], "-m": ["-m", "program"], "-c": ["-c", text]}[kind]
        ran = spawn("run", "--fallback", "--zygote", "other", *how, "-x", "--", "--fallback")
        assert (ran.code, ran.out) == (7, "['-x', '--', '--fallback'] False\n")
        assert ran.err.startswith("thaw: started without a zygote: no zygote 'other' runs") and ran.err.count("\n") == 1

    def test_caches(self, spawn, place, tmp_path):
        """Its value is not taken for the script."""
        code = "import os; print(os.environ['TRITON_CACHE_DIR'])"
        ran = spawn("run", "--fallback", "--zygote", "other", "--cache-dir", tmp_path / "new", "-c", code)
        assert (ran.code, ran.out) == (0, f"{tmp_path}/new/triton\n")

    def test_fallback_does_not_detach(self, spawn, place):
        ran = spawn("run", "--fallback", "--detach", "--zygote", "other", "-c", "print(1)")
        assert ran.code == 2 and ran.out == "" and "does not detach" in ran.err

    def test_detached_document(self, spawn, zygote, tmp_path):
        code = "import os; os.close(1); os.close(2); open('pid', 'w').write(str(os.getpid()))"
        ran = spawn("run", "--detach", "--json", "-c", code)
        assert ran.code == 0
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        assert ran.document == {"pid": int((tmp_path / "pid").read_text())}


LOCAL = ["--host", "127.0.0.1"]
ADDITIONS = ["--middleware", serve_variables.MIDDLEWARE]
ADDED = (
    *("THAW_SERVE_TOKEN_FILE", "THAW_SERVE_KV_SNAPSHOT"),
    *("THAW_KV_DIR", "THAW_SNAPSHOT_DIR", "THAW_SESSIONS_DIR"),
)


def auto(**more):
    """Options for snapshots that starts keep; where is known only in a test."""
    extra = json.dumps({"mode": "auto", "cache": str(cache.snapshots_directory())} | more)
    return ["--load-format", "thaw", "--model-loader-extra-config", extra]


class TestServe:
    @pytest.fixture
    def handed(self, monkeypatch, place, tmp_path_factory):
        """What would be run, where it comes to that; vLLM counts as installed."""
        from thaw_vllm.cli import run
        from thaw_vllm.engines.vllm import api

        found = []
        monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        for name in ("THAW_ADMIN_TOKEN", "THAW_START_REPORT", *ADDED):
            monkeypatch.setenv(name, "")  # so that what the command sets does not outlive the test
        monkeypatch.setattr(run, "hand_over", lambda *arguments, **options: found.append((arguments, options)))
        monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
        return found

    @pytest.mark.parametrize("taken", ["--load-format", "--load_format", "--model-loader-extra-config"])
    @pytest.mark.parametrize("form", ["{} x", "{}=x"])
    @pytest.mark.parametrize("named", [True, False])
    def test_snapshot_and_loader(self, thaw, handed, snapshot, taken, form, named):
        ran = thaw("serve", "--model", "m", "--snapshot", snapshot if named else "auto", *form.format(taken).split())
        assert ran.code == 2 and f"leave {taken.replace('_', '-')} out" in ran.err and handed == []

    def test_without_a_snapshot_the_loader_is_free(self, thaw, handed):
        ran = thaw("serve", "--model", "m", "--load-format", "dummy", "--port", "8001")
        assert ran.code == 0 and ran.err == "thaw: no snapshot is thawed or kept: --load-format is given\n"
        ((arguments, options),) = handed
        assert arguments == (
            [serving.MODULE, "--model", "m", *LOCAL, "--load-format", "dummy", "--port", "8001", *ADDITIONS],
            "module",
            "default",
        )
        assert options == {"fallback": True}

    def test_no_snapshot_is_wanted(self, thaw, handed):
        ran = thaw("serve", "--model", "m", "--snapshot", "none")
        assert ran.code == 0 and ran.err == ""
        assert handed[0][0][0] == [serving.MODULE, "--model", "m", *LOCAL, *ADDITIONS]

    def test_the_cache_of_snapshots(self, thaw, handed, tmp_path, monkeypatch):
        for variable in fast_start.CACHES:
            monkeypatch.setenv(variable, "")
        options = ["--snapshot", "auto", "--cache-dir", tmp_path / "new", "--cache-gb", "2.5"]
        assert thaw("serve", "--model", "m", *options).code == 0
        extra = json.loads(handed[0][0][0][6])
        assert extra == {"mode": "auto", "cache": str(tmp_path / "new" / "snapshots"), "cache_bytes": 2_500_000_000}
        assert not (tmp_path / "new" / "snapshots").exists()  # the loader makes it, if it comes to that

    def test_the_size_of_the_cache(self, thaw, handed, monkeypatch):
        monkeypatch.setenv("THAW_CACHE_GB", "3")
        assert thaw("serve", "--model", "m").code == 0
        assert handed[0][0][0] == [serving.MODULE, "--model", "m", *auto(cache_bytes=3 * 10**9), *LOCAL, *ADDITIONS]
        monkeypatch.setenv("THAW_CACHE_GB", "much")
        ran = thaw("serve", "--model", "m")
        assert ran.code == 2 and "THAW_CACHE_GB" in ran.err

    def test_require_zygote(self, thaw, handed):
        assert thaw("serve", "--model", "m", "--zygote", "b", "--require-zygote").code == 0
        assert handed == [
            (([serving.MODULE, "--model", "m", *auto(), *LOCAL, *ADDITIONS], "module", "b"), {"fallback": False})
        ]

    @pytest.mark.parametrize("where", [["--host", "0.0.0.0"], ["--host=::1"], ["--uds", "x.sock"]])
    def test_where_it_listens_is_the_users(self, thaw, handed, where):
        assert thaw("serve", "--model", "m", *where).code == 0
        ((arguments, _),) = handed
        assert arguments[0] == [serving.MODULE, "--model", "m", *auto(), *where, *ADDITIONS]

    def test_the_token_is_made_and_told_where(self, thaw, handed, monkeypatch, tmp_path):
        monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
        assert thaw("serve", "--model", "m", "--kv-dir", tmp_path, "--snapshot-dir", ".").code == 0
        token = tmp_path / "state" / "admin-token"
        assert os.environ["THAW_ADMIN_TOKEN"] == token.read_text().strip()
        assert os.environ["THAW_SERVE_TOKEN_FILE"] == str(token)
        assert (os.environ["THAW_KV_DIR"], os.environ["THAW_SNAPSHOT_DIR"]) == (str(tmp_path), os.getcwd())
        assert os.path.dirname(os.environ["THAW_START_REPORT"]) == str(tmp_path / "state" / "starts")

    def test_a_directory_of_sessions(self, thaw, handed, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert thaw("serve", "--model", "m").code == 0 and os.environ["THAW_SESSIONS_DIR"] == ""
        assert thaw("serve", "--model", "m", "--sessions-dir", ".").code == 0
        assert os.environ["THAW_SESSIONS_DIR"] == str(tmp_path) and os.environ["THAW_KV_DIR"] == ""
        assert [*tmp_path.iterdir()] == []

    def test_a_given_token_is_kept_nowhere(self, thaw, handed, monkeypatch, tmp_path):
        monkeypatch.setenv("THAW_STATE_DIR", str(tmp_path / "state"))
        monkeypatch.setenv("THAW_ADMIN_TOKEN", "a token of 24 characters")
        assert thaw("serve", "--model", "m").code == 0
        assert not (tmp_path / "state" / "admin-token").exists() and not os.environ["THAW_SERVE_TOKEN_FILE"]

    @pytest.mark.parametrize("option", ["--kv-snapshot", "--kv-dir", "--snapshot-dir", "--sessions-dir"])
    def test_what_is_not_there_is_said(self, thaw, handed, tmp_path, option):
        ran = thaw("serve", "--model", "m", option, tmp_path / "none")
        assert ran.code == 6 and "none" in ran.err and handed == []

    def test_no_snapshot(self, thaw, handed, tmp_path):
        ran = thaw("serve", "--model", "m", "--snapshot", tmp_path / "none.thaw")
        assert ran.code == 6 and "none.thaw" in ran.err and handed == []

    def test_a_snapshot_of_a_plain_module(self, thaw, handed, snapshot):
        ran = thaw("serve", "--model", "m", "--snapshot", snapshot)
        assert ran.code == 4 and "thaw freeze" in ran.err and handed == []

    def test_a_snapshot_that_fits(self, thaw, handed, snapshot, monkeypatch):
        from thaw_vllm.engines.vllm import api

        sizes = []
        monkeypatch.setattr(api, "check_sizes", lambda path, found: sizes.append((path, found)))
        monkeypatch.chdir(snapshot.parent)
        ran = thaw(
            "serve", "--model", "m", "--snapshot", snapshot.name, "-tp", "2", "--pipeline_parallel_size=3", "--x"
        )
        assert ran.code == 0 and sizes == [(str(snapshot), {"tensor_parallel_size": 2, "pipeline_parallel_size": 3})]
        ((arguments, _),) = handed
        first, second, model, *options = arguments[0]
        assert (first, second, model, options[:3]) == (
            serving.MODULE,
            "--model",
            "m",
            ["--load-format", "thaw", "--model-loader-extra-config"],
        )
        assert json.loads(options[3]) == {"snapshot": str(snapshot)}
        assert options[4:] == [*LOCAL, "-tp", "2", "--pipeline_parallel_size=3", "--x", *ADDITIONS]

    def test_fast_start(self, thaw, handed, monkeypatch):
        monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "")
        monkeypatch.setenv(fast_start.BUNDLE, "")  # so that it is as it was afterwards
        monkeypatch.delenv(fast_start.BUNDLE)
        monkeypatch.setattr(fast_start, "has_gpu", lambda environment: True)
        ran = thaw("serve", "--model", "m", "--fast-start", "--port", "8001")
        assert ran.code == 0 and os.environ["VLLM_ENABLE_STARTUP_PLAN"] == os.environ[fast_start.BUNDLE] == "1"
        graphs, compiled, memory = ran.err.splitlines()
        assert compiled.startswith("thaw: fast start: what is compiled is kept as one file")
        assert graphs.startswith("thaw: fast start: CUDA graphs are captured for steps of 1, 2, 4, 8 tokens only")
        assert memory.startswith("thaw: fast start: memory for the KV cache")
        ((arguments, _),) = handed
        sizes = ["--cudagraph-capture-sizes", "1", "2", "4", "8"]
        assert arguments[0] == [serving.MODULE, "--model", "m", *sizes, *auto(), *LOCAL, "--port", "8001", *ADDITIONS]

    def test_fast_start_beside_what_was_chosen(self, thaw, handed, monkeypatch):
        monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "0")
        monkeypatch.setenv(fast_start.BUNDLE, "0")
        monkeypatch.setattr(fast_start, "has_gpu", lambda environment: True)
        ran = thaw("serve", "--model", "m", "--fast-start", "--compilation-config={}")
        assert ran.code == 0 and ran.err.count("as you chose") == 2
        assert os.environ["VLLM_ENABLE_STARTUP_PLAN"] == "0"
        assert handed[0][0][0] == [
            serving.MODULE,
            "--model",
            "m",
            *auto(),
            *LOCAL,
            "--compilation-config={}",
            *ADDITIONS,
        ]

    def test_fast_start_without_a_gpu(self, thaw, handed, monkeypatch):
        monkeypatch.setattr(fast_start, "has_gpu", lambda environment: False)
        ran = thaw("serve", "--model", "m", "--fast-start")
        assert ran.code == 0 and "there is no GPU" in ran.err and ran.err.count("\n") == 1
        assert handed[0][0][0] == [serving.MODULE, "--model", "m", *auto(), *LOCAL, *ADDITIONS]

    def test_caches(self, thaw, handed, tmp_path, monkeypatch):
        for variable in fast_start.CACHES:
            monkeypatch.setenv(variable, "/elsewhere")
        assert thaw("serve", "--model", "m", "--cache-dir", tmp_path / "new").code == 0
        assert {name: os.environ[name] for name in fast_start.CACHES} == {
            name: str(tmp_path / "new" / below) for name, below in fast_start.CACHES.items()
        }
        assert (tmp_path / "new").is_dir() and len(handed) == 1

    def test_no_room_for_caches(self, thaw, handed, tmp_path):
        (tmp_path / "file").touch()
        ran = thaw("serve", "--model", "m", "--cache-dir", tmp_path / "file")
        assert ran.code == 6 and "no caches can be kept" in ran.err and handed == []

    def test_short_options_are_the_servers(self, thaw, handed):
        ran = thaw("serve", "--model", "m", "-cc.cudagraph_mode=NONE", "-sc.method=x", "-O1")
        assert ran.code == 0 and ran.out == "", ran.err
        given = ["-cc.cudagraph_mode=NONE", "-sc.method=x", "-O1"]
        assert handed[0][0][0] == [serving.MODULE, "--model", "m", *auto(), *LOCAL, *given, *ADDITIONS]

    def test_short_help(self, thaw, handed):
        assert "Usage: thaw serve" in thaw("serve", "-h").out and handed == []

    def test_no_model(self, thaw, handed):
        ran = thaw("serve", "--model", "./none")
        assert ran.code == 6 and "no model directory './none'" in ran.err and handed == []
        assert thaw("serve").code == 2

    def test_no_vllm(self, thaw, place, monkeypatch):
        from thaw_vllm.engines.vllm import api

        def missing():
            raise MissingDependencyError("vLLM is not installed; pip install vllm")

        monkeypatch.setattr(api, "require_vllm_installed", missing)
        ran = thaw("serve", "--model", "m")
        assert ran.code == MissingDependencyError.exit_code and "pip install vllm" in ran.err

    def test_no_zygote(self, spawn, place):
        pytest.importorskip("vllm")
        ran = spawn("serve", "--model", os.curdir, "--zygote", "other", "--require-zygote")
        assert ran.code == 2 and "thaw zygote start --name other" in ran.err
