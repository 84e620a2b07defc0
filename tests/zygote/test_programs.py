"""A program in a fork does what it does in a fresh process: each is run in both, and what is seen is compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.zygote.running import MARK, Zygote, python

SEEN = """
import json, os, resource, signal, sys
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "path0": sys.path[0], "cwd": os.getcwd(),
    "name": __name__, "file": globals().get("__file__"), "main": sys.modules["__main__"].__dict__ is globals(),
    "spec": getattr(__spec__, "name", None), "package": __package__, "globals": sorted(globals()),
    "umask": os.umask(0), "nice": os.nice(0), "affinity": sorted(os.sched_getaffinity(0)),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "executable": sys.executable,
    "environment": {k: v for k, v in os.environ.items() if k not in ("_", "LC_CTYPE")},
    "ignored": [s for s in sorted(signal.valid_signals()) if signal.getsignal(s) == signal.SIG_IGN],
    "default": [s for s in sorted(signal.valid_signals()) if signal.getsignal(s) == signal.SIG_DFL],
    "interrupt": signal.getsignal(2) is signal.default_int_handler, "mask": len(signal.pthread_sigmask(0, ())),
    "wakeup": signal.set_wakeup_fd(-1), "descriptors": [f for f in range(64) if os.path.exists(f"/proc/self/fd/{f}")],
    "streams": [(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, type(s.buffer).__name__)
                for s in (sys.stdin, sys.stdout, sys.stderr)],
    "same": [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
}, default=list))
"""


def same(zygote: Zygote, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program's run in a fork, which was that of a fresh process."""
    forked, fresh = zygote.run(*arguments, **options), python(*arguments, **options)
    assert forked.returncode == fresh.returncode, forked.stderr
    assert _comparable(forked.stdout) == _comparable(fresh.stdout)
    assert _comparable(forked.stderr) == _comparable(fresh.stderr)
    return forked


def _comparable(text: str) -> Any:
    """With no addresses, which differ in every process, and parsed where it is JSON."""
    text = re.sub("0x[0-9a-f]+", "0x", text)
    return json.loads(text) if text.startswith("{") and text.endswith("}\n") else text


@pytest.fixture
def script(tmp_path: Path):
    """``script(text)``: a file with these lines."""

    def write(text: str, name: str = "its script.py") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


class TestCircumstances:
    ARGUMENTS = ("-v", "--", "--help", "-m", "x", "--zygote", "ä\udce4 b", "")

    def test_script(self, zygote, script, tmp_path):
        script(SEEN)
        (tmp_path / "link.py").symlink_to("its script.py")
        for name in ("its script.py", "./its script.py", "link.py", str(tmp_path / "link.py")):
            ran = same(zygote, name, *self.ARGUMENTS, cwd=tmp_path)
            assert '"name": "__main__"' in ran.stdout

    def test_module(self, zygote, script, tmp_path):
        (tmp_path / "package").mkdir()
        script(SEEN, "package/__main__.py")
        script(SEEN, "package/inner.py")
        for name in ("package", "package.inner"):
            ran = same(zygote, "-m", name, *self.ARGUMENTS, cwd=tmp_path)
            assert "package" in ran.stdout

    def test_code(self, zygote, tmp_path):
        same(zygote, "-c", SEEN, *self.ARGUMENTS, cwd=tmp_path)

    def test_joined_flags(self, zygote, script, tmp_path):
        script(SEEN, "module.py")
        ran = same(zygote, "-cimport sys; print(sys.argv)", "--json", cwd=tmp_path)
        assert "'--json'" in ran.stdout
        ran = zygote.run("-mmodule", "--detach", cwd=tmp_path)
        assert '"--detach"' in ran.stdout, ran.stderr

    def test_umask_niceness_limits_and_affinity(self, zygote, tmp_path):
        import resource

        def change():
            os.umask(0o137)
            os.nice(3)
            resource.setrlimit(resource.RLIMIT_NOFILE, (333, 444))
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        ran = same(zygote, "-c", SEEN, cwd=tmp_path, preexec_fn=change)
        assert '"umask": 95' in ran.stdout and "[333, 444]" in ran.stdout

    def test_environment(self, zygote):
        env: dict[str, str | None] = {"NEW": "ä=\udcff", "HOME": None, "TZ": "Asia/Kathmandu", "PYTHONUNBUFFERED": "1"}
        lines = "\nimport time, tempfile, subprocess\nprint(time.strftime('%Z'), tempfile.gettempdir())\n"
        lines += "print(subprocess.run('env', capture_output=True).stdout.count(b'NEW'))"
        ran = same(zygote, "-c", SEEN + lines, env=env | {"TMPDIR": "/dev/shm"})
        assert "+0545 /dev/shm" in ran.stdout and '"HOME"' not in ran.stdout

    def test_ignored_signals(self, zygote):
        import signal

        def ignore():
            for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)

        assert same(zygote, "-c", SEEN, preexec_fn=ignore).stdout.count('"ignored": [1, 3, 10, 13, 25]') == 1

    def test_start_directory_of_processes(self, zygote, script, tmp_path):
        """A spawned process of ``-c`` finds the modules of the working directory."""
        script("def double(x): return 2 * x", "helper.py")
        code = "import helper, multiprocessing as m\nwith m.get_context('spawn').Pool(1) as p: "
        ran = same(zygote, "-c", code + "print(p.apply(helper.double, (21,)))", cwd=tmp_path)
        assert ran.stdout == "42\n"

    def test_what_is_below_the_working_directory_of_the_zygote_is_no_module(self, zygote, tmp_path):
        assert same(zygote, "-c", "import sys; print('' in sys.path[1:], '/' in sys.path)").stdout == "False False\n"


class TestStreams:
    @pytest.mark.parametrize("text", ["a\r\nb\rc\n", "ä€\n", "", "no newline"])
    def test_pipes(self, zygote, text):
        code = "import sys; t = sys.stdin.read(); print(repr(t)); print(t, file=sys.stderr, end='')"
        ran = same(zygote, "-c", code, input=text)
        assert ran.stdout.startswith("'")

    def test_bytes(self, zygote):
        code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
        data = bytes(range(256)) * 4096
        process = zygote.popen("-c", code, stdin=subprocess.PIPE, text=False)
        assert process.communicate(data, timeout=60)[0] == data[::-1]

    @pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
    def test_closed(self, zygote, closed, tmp_path):
        code = "import os, sys; f = open('out', 'w'); print(sys.stdin, file=f) if sys.stdin is None else None\n"
        code += "print([getattr(sys, n) is None for n in ('stdin', 'stdout', 'stderr')], f.fileno(), file=f)\n"
        code += "f.close(); os._exit(5)"

        def close():
            for number in closed:
                os.close(number)

        found = []
        for run in (zygote.run, python):
            ran = run("-c", code, cwd=tmp_path, preexec_fn=close)
            assert ran.returncode == 5, ran.stderr
            found.append((tmp_path / "out").read_text())
            (tmp_path / "out").unlink()
        assert found[0] == found[1] and found[0].count("True") == len(closed)

    def test_nobody_reads(self, zygote):
        """As ``| head`` does."""
        read, write = os.pipe()
        os.close(read)
        found = [run("-c", "print('x')", stdout=write).returncode for run in (zygote.run, python)]
        os.close(write)
        assert found == [120, 120]

    def test_interactive_use_of_a_pipe(self, zygote):
        """A line that is flushed comes while the program runs."""
        process = zygote.popen("-c", "print(input(), flush=True); print(input())", stdin=subprocess.PIPE)
        process.stdin.write("a\n")
        process.stdin.flush()
        assert process.stdout.readline() == "a\n" and process.poll() is None
        assert process.communicate("b\n", timeout=60)[0] == "b\n"


ENDS = {
    "normal": "print('x')",
    "7": "import sys; sys.exit(7)",
    "258": "import sys; sys.exit(258)",
    "-1": "import sys; sys.exit(-1)",
    "text": "import sys; print('before'); sys.exit('words')",
    "None": "import sys; sys.exit(None)",
    "object": "import sys; sys.exit([1, 2])",
    "os._exit": "import os; os._exit(3)",
    "error": "def f(): raise ValueError('wrong')\n\n\nf()",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError(3) from e",
    "group": "raise SystemExit",
    "syntax": "x = = 1",
    "interrupt": "raise KeyboardInterrupt",
    "hook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0], file=sys.stderr)\n1 / 0",
    "segfault": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "abort": "import os; os.abort()",
    "term": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "pipe": "import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)",
    "atexit": "import atexit; atexit.register(print, 'last'); atexit.register(print, 'first'); print('now')",
    "atexit after an error": "import atexit; atexit.register(print, 'last'); 1 / 0",
    "atexit with an error": "import atexit; atexit.register(lambda: 1 / 0)",
    "exit in atexit": "import atexit, sys; atexit.register(lambda: sys.exit(9))",
    "thread": "import threading, time\nt = lambda: (time.sleep(0.3), print('thread'))\n"
    "threading.Thread(target=t).start(); print('main')",
    "daemon": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "file": "f = open('written', 'w'); f.write('text ' * 1000); g = open('bytes', 'wb'); g.write(b'bytes')",
    "file of a module": "import builtins; builtins.f = open('written', 'w'); builtins.f.write('text')",
    "C": "import ctypes; ctypes.CDLL(None).puts(b'of C')",
    "fork": "import os\npid = os.fork()\nprint('parent' if pid else 'child', flush=True) if not pid else "
    "(os.waitpid(pid, 0), print('parent'))",
    "fork and exit": "import os, sys\nif not (pid := os.fork()): sys.exit(6)\nprint(os.waitpid(pid, 0)[1])",
    "fork and os._exit": "import os\nif not (pid := os.fork()): os._exit(4)\nprint(os.waitpid(pid, 0)[1])",
    "warning": "import warnings; warnings.warn('careful')",
    "ResourceWarning": "import asyncio; print(asyncio.run(asyncio.sleep(0.01, 5)))",
    "annotations": "x: int = 3; print(__annotations__)",
    "no annotations": "print(__annotations__)",
    "recursion": "import sys; print(sys.getrecursionlimit()); f = lambda n: n and 1 + f(n - 1); print(f(900))",
}


POOL = """
import multiprocessing, sys

def double(x):
    return 2 * x, multiprocessing.current_process().name

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        print([pool.apply(double, (n,))[0] for n in range(5)])
    queue = context.Queue()
    process = context.Process(target=queue.put, args=(7,))
    process.start()
    print(queue.get())
    process.join()
"""


class TestEnds:
    @pytest.mark.parametrize("name", ENDS)
    def test_script(self, zygote, name, tmp_path, script):
        path = script(ENDS[name], "program.py")
        ran, seen = [], []
        for run in (zygote.run, python):
            done = run(path, cwd=tmp_path)
            ran.append((done.returncode, done.stdout, _comparable(done.stderr)))
            files = [tmp_path / "written", tmp_path / "bytes"]
            seen.append([file.read_text() if file.exists() else None for file in files])
            for file in files:
                file.unlink(missing_ok=True)
        assert ran[0] == ran[1]
        assert seen[0] == seen[1]

    @pytest.mark.parametrize("name", ["text", "error", "chained", "syntax", "interrupt", "kill", "file"])
    @pytest.mark.parametrize("kind", ["-c", "-m"])
    def test_code_and_modules(self, zygote, name, kind, tmp_path, script):
        script(ENDS[name], "program.py")
        same(zygote, kind, ENDS[name] if kind == "-c" else "program", cwd=tmp_path)

    def test_what_the_tests_compare(self, zygote):
        """They would pass if nothing ran at all."""
        assert zygote.run("-c", ENDS["7"]).returncode == 7
        assert zygote.run("-c", ENDS["interrupt"]).returncode == -2
        assert zygote.run("-c", ENDS["segfault"]).returncode == -11
        ran = zygote.run("-c", ENDS["error"])
        assert ran.returncode == 1 and "ValueError: wrong" in ran.stderr and "thaw_vllm" not in ran.stderr

    @pytest.mark.parametrize("name", ["no_such_module", "json.no_such_module", "json"])
    def test_no_module(self, zygote, name):
        ran = same(zygote, "-m", name)
        assert ran.returncode == 1 and "No module named" in ran.stderr

    def test_it_runs_in_a_fork(self, zygote):
        """And has what the zygote imported."""
        ran = zygote.run("-c", "import sys, os; print('numpy' in sys.modules, os.getpid() == os.getpgrp())")
        assert ran.stdout == "True True\n"
        assert python("-c", "import sys; print('numpy' in sys.modules)").stdout == "False\n"

    def test_no_script(self, zygote, tmp_path):
        for path in (tmp_path / "none.py", tmp_path):
            ran = zygote.run(path)
            assert ran.returncode == 6 and f"there is no script '{path}'" in ran.stderr and ran.stdout == ""

    @pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
    def test_multiprocessing(self, zygote, method, script, tmp_path):
        script(POOL, "program.py")
        for how in (["program.py"], ["-m", "program"]):
            ran = same(zygote, *how, method, cwd=tmp_path)
            assert ran.stdout == "[0, 2, 4, 6, 8]\n7\n"


def test_randomness_differs(zygote):
    code = "import numpy, random, secrets, tempfile, uuid, multiprocessing as m\n"
    code += "print(numpy.random.random(), random.random(), next(tempfile._get_candidate_names()), uuid.uuid4(), "
    code += "secrets.token_hex(), numpy.random.default_rng().random(), bytes(m.current_process().authkey).hex())"
    drawn = [zygote.run("-c", code).stdout.split() for _ in range(3)]
    assert [len(set(column)) for column in zip(*drawn, strict=True)] == [3] * 7


def test_the_environment_is_marked(zygote):
    """What counts processes in these tests finds them."""
    process = zygote.popen("-c", "import time; print(flush=True); time.sleep(600)")
    process.stdout.readline()
    assert os.environ[MARK] == zygote.mark and len(zygote.left()) == 3  # keeper, program, client
    process.terminate()
    assert process.wait(60) == -15
    process.communicate()


def test_interpreter(zygote):
    assert zygote.status()["executable"] == sys.executable
