"""What makes a fork unsound is found, and named."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from tests.zygote.running import Zygote

from thaw_vllm.errors import UnsupportedError, UsageError
from thaw_vllm.zygote import proof


class Driver:
    """Of CUDA, made up."""

    def __init__(self, answer: int) -> None:
        self.cuCtxGetCurrent = lambda context: answer


def seen(code: str, env: dict[str, str] | None = None) -> list[str]:
    """What a fresh process prints."""
    lines = "from thaw_vllm.zygote import proof\n" + code
    ran = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=120, env=os.environ | (env or {})
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_one_thread_is_sound():
    assert seen("print(proof.unsound(0), proof.fork_of_program())") == ["None None"]


@pytest.mark.parametrize(("answer", "what"), [(3, "None"), (0, "cuCtxGetCurrent says 0"), (201, "says 201")])
def test_cuda(answer, what):
    lines = f"class D: cuCtxGetCurrent = lambda self, context: {answer}\nprint(proof.unsound(0, D()))\n"
    unsound, forked = seen(lines + "print(proof.fork_of_program(D()))")
    assert what in unsound and what in forked


def test_the_driver_is_not_loaded_by_asking():
    assert seen("print(proof.driver())\nprint('libcuda' in open('/proc/self/maps').read())") == ["None", "False"]


def test_a_thread_of_python():
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="the one to blame")
    thread.start()
    try:
        assert "'the one to blame'" in (proof.unsound(1 << 20) or "")
        assert "'the one to blame'" in (proof.fork_of_program() or "")
    finally:
        go.set()
        thread.join()


def test_a_thread_that_threading_does_not_know():
    code = "import _thread, time\n_thread.start_new_thread(lambda: time.sleep(600), ()); time.sleep(0.1)\n"
    assert seen(code + "import os; print(proof.unsound(9)); os._exit(print(flush=True) or 0)")[0] == (
        "another thread runs Python"
    )


def test_native_threads_are_counted():
    code = "import numpy, os\nprint(len(proof.native_threads()) > 0, proof.unsound(len(proof.native_threads())))\n"
    code += "print(proof.unsound(0))\nprint(proof.fork_of_program())"
    count, unsound, forked = seen(code, {"OPENBLAS_NUM_THREADS": "2"})
    assert count == "True None" and "native threads run" in unsound and "threads run" in forked


def test_openmp():
    pytest.importorskip("torch")
    code = "import torch\nbefore = len(proof.native_threads())\ntorch.set_num_threads(2)\n"
    code += "x = torch.randn(1000, 1000); (x @ x).sum(); torch.relu(x)\nprint(proof.unsound(before))"
    (found,) = seen(code)
    assert "native threads run" in found and "OpenMP" in found


def test_torch_knows(monkeypatch):
    torch = pytest.importorskip("torch")
    assert proof._used(None) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert proof._used(None) == "torch has initialised CUDA"


@pytest.mark.parametrize("name", proof.OF_LIBRARIES)
def test_threads_that_nobody_misses(name):
    """They may be there, by the beginnings of their names."""
    code = "import ctypes, os\nlibc = ctypes.CDLL(None)\nf = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)\n"
    code += "start = libc.pause\nt = ctypes.c_ulong()\nlibc.pthread_create(ctypes.byref(t), None, start, None)\n"
    code += f"n = lambda name: libc.pthread_setname_np(t, name)\nn(b'{name[:15]}'); print(proof.unsound(0))\n"
    code += "n(b'another'); print(proof.unsound(0))\nprint(end='', flush=True); os._exit(0)"
    sound, unsound = seen(code)
    assert sound == "None" and "(another)" in unsound


class TestStart:
    """A module that does what no fork survives is refused when the zygote starts."""

    @pytest.fixture
    def module(self, own: Zygote, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")

        def start(text: str):
            (tmp_path / "users_module.py").write_text(text)
            return own.start(("json", "users_module"))

        return start

    def test_a_thread(self, own: Zygote, module):
        text = (
            "import threading\nthreading.Thread(target=threading.Event().wait, name='collector', daemon=True).start()"
        )
        with pytest.raises(UnsupportedError, match=r"after users_module, which is to blame.*'collector'"):
            module(text)
        own.all_gone()
        assert not own.place.socket.exists()

    def test_native_threads(self, own: Zygote, module):
        pytest.importorskip("torch")
        text = "import torch\ntorch.set_num_threads(2)\nx = torch.randn(1000, 1000)\ntorch.relu(x @ x)"
        with pytest.raises(UnsupportedError, match=r"after users_module.*native threads.*OpenMP"):
            module(text)
        own.all_gone()

    def test_that_is_not_there(self, own: Zygote):
        with pytest.raises(UsageError, match="no_such_module"):
            own.start(("no_such_module",))
        own.all_gone()

    @pytest.mark.parametrize("text", ["1 / 0", "x = = 1"])
    def test_that_fails(self, own: Zygote, module, text: str):
        with pytest.raises(Exception, match=r"ZeroDivisionError|SyntaxError"):
            module(text)
        own.all_gone()

    @pytest.mark.parametrize("text", ["import os; os._exit(9)", "import os; os.kill(os.getpid(), 9)"])
    def test_that_ends_it(self, own: Zygote, module, text: str):
        with pytest.raises(Exception, match=r"(?s)ended with -?9 before it was ready; .*last words"):
            module("print('last words', flush=True); " + text)
        own.all_gone()

    def test_after_a_failure_another_starts(self, own: Zygote, module):
        with pytest.raises(Exception, match="ZeroDivisionError"):
            module("1 / 0")
        module("VALUE = 5")
        assert own.run("-c", "import sys; print(sys.modules['users_module'].VALUE)").stdout == "5\n"
        assert "ZeroDivisionError" not in own.place.log.read_text()
