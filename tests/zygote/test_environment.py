"""What counts as reading a variable, and which programs are refused because of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.zygote.running import COMMAND, Zygote

from thaw_vllm.zygote.environment import MAY_DIFFER, Reads

READING = {
    "[]": lambda name: os.environ[name],
    "get": lambda name: os.environ.get(name),
    "get with a default": lambda name: os.environ.get(name, "x"),
    "getenv": lambda name: os.getenv(name),
    "in": lambda name: name in os.environ,
    "not in": lambda name: name not in os.environ,
    "setdefault": lambda name: os.environ.setdefault(name, "x"),
    "pop": lambda name: os.environ.pop(name, None),
    "in a loop": lambda name: [os.environ[name] for key in os.environ if key == name],
}
GOING_THROUGH = {
    "items": lambda: list(os.environ.items()),
    "dict": lambda: dict(os.environ),
    "copy": lambda: os.environ.copy(),
    "values": lambda: list(os.environ.values()),
    "keys": lambda: list(os.environ.keys()),
    "|": lambda: os.environ | {},
    "**": lambda: dict(**os.environ),
    "subprocess": lambda: subprocess.run([sys.executable, "-c", ""], env={**os.environ}, check=True),
}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The same first names for everybody: what is gone through begins with them."""
    monkeypatch.setenv("THAW_A", "1")
    monkeypatch.setenv("THAW_B", "2")


@pytest.mark.parametrize("how", READING)
def test_reading(how, monkeypatch):
    reads = Reads()
    with reads.watching():
        try:
            READING[how]("THAW_B")
            if "loop" not in how:
                READING[how]("THAW_NONE")
        except KeyError:
            assert how == "[]"
    assert reads.names == {"THAW_B"} | ({"THAW_NONE"} if "loop" not in how else set())
    os.environ.pop("THAW_NONE", None)


@pytest.mark.parametrize("how", GOING_THROUGH)
def test_going_through(how):
    reads = Reads()
    with reads.watching():
        GOING_THROUGH[how]()
    assert reads.names == set()


def test_nothing_is_watched_afterwards():
    before = type(os.environ).__getitem__, type(os.environ).__iter__
    reads = Reads()
    with pytest.raises(ZeroDivisionError), reads.watching():
        assert (type(os.environ).__getitem__, type(os.environ).__iter__) != before
        _ = 1 / 0
    assert (type(os.environ).__getitem__, type(os.environ).__iter__) == before
    assert os.environ.get("THAW_A") == "1" and reads.names == set()


def test_differences():
    reads = Reads()
    with reads.watching():
        for name in ("THAW_A", "THAW_B", "THAW_NONE", "PATH"):
            os.environ.get(name)
    same = dict(os.environ)
    assert reads.differences(same) == []
    assert reads.differences(same | {"THAW_NEW": "1"}) == []
    assert reads.differences(same | {"THAW_NONE": "1", "THAW_A": "3"}) == ["THAW_A", "THAW_NONE"]
    assert reads.differences({k: v for k, v in same.items() if k != "THAW_B"}) == ["THAW_B"]
    assert reads.differences(same | {"PATH": "/", "LD_X": "1", "OMP_NUM_THREADS": "77"}) == ["LD_X", "OMP_NUM_THREADS"]
    assert "PATH" in MAY_DIFFER


def test_what_modules_set_is_no_difference(monkeypatch):
    reads = Reads()
    before = dict(os.environ)
    monkeypatch.setenv("KMP_SET", "by a module")
    monkeypatch.setenv("LD_CHANGED", "by a module")
    monkeypatch.setenv("THAW_SET", "by a module")
    reads.names.add("THAW_SET")  # perhaps by another module, before it was set
    reads.before["LD_CHANGED"] = before["LD_CHANGED"] = "before"
    assert reads.differences(before) == []
    assert reads.differences(before | {"KMP_SET": "by a module"}) == []
    assert reads.differences(before | {"KMP_SET": "by somebody"}) == ["KMP_SET"]
    assert reads.differences(before | {"LD_CHANGED": "by a module"}) == ["LD_CHANGED"]
    assert reads.differences(before | {"THAW_SET": "by a module"}) == ["THAW_SET"]


def test_what_modules_set_is_set_for_programs(monkeypatch):
    reads = Reads()
    monkeypatch.setenv("THAW_SET", "by a module")
    monkeypatch.setenv("THAW_A", "changed")
    monkeypatch.delenv("THAW_B")
    theirs = {"THAW_A": "1", "THAW_B": "2", "THAW_C": "3"}
    assert reads.imported(theirs) == {"THAW_A": "changed", "THAW_C": "3", "THAW_SET": "by a module"}


class TestPrograms:
    """The zygote of these tests reads READ_AT_IMPORT, which is not set, and TZ."""

    def test_one_that_was_read(self, zygote: Zygote):
        ran = zygote.run("-c", "print('ran')", env={"READ_AT_IMPORT": "1"})
        assert ran.returncode == 4 and ran.stdout == ""
        assert "READ_AT_IMPORT" in ran.stderr and "thaw zygote start --name" in ran.stderr

    @pytest.mark.parametrize("name", ["NOT_READ", "TZ", "CUDA_VISIBLE_DEVICES", "PATH", "COLUMNS"])
    def test_ones_that_may_differ(self, zygote: Zygote, name: str):
        code = f"import os; print(os.environ[{name!r}])"
        ran = zygote.run("-c", code, env={name: "77"})
        assert ran.stdout == "77\n" and ran.returncode == 0, ran.stderr

    @pytest.mark.parametrize("name", ["LD_THAW", "PYTHONTHAW", "OMP_THAW", "MALLOC_THAW", "TORCH_THAW"])
    def test_what_libraries_read(self, zygote: Zygote, name: str):
        ran = zygote.run("-c", "print('ran')", env={name: "1"})
        assert ran.returncode == 4 and name in ran.stderr and ran.stdout == ""

    def test_all_are_named(self, zygote: Zygote):
        ran = zygote.run("-c", "", env={"READ_AT_IMPORT": "1", "LD_THAW": "2"})
        assert "LD_THAW, READ_AT_IMPORT" in ran.stderr

    def test_fallback(self, zygote: Zygote):
        """Fresh, with the reason on standard error."""
        code = "import os, sys; print(os.environ['READ_AT_IMPORT'], 'numpy' in sys.modules); sys.exit(7)"
        ran = zygote.run("--fallback", "-c", code, "--fallback", env={"READ_AT_IMPORT": "1"})
        assert (ran.returncode, ran.stdout) == (7, "1 False\n")
        assert ran.stderr.startswith("thaw: started without a zygote: ") and "READ_AT_IMPORT" in ran.stderr

    def test_a_value_it_was_started_with(self, own: Zygote):
        own.start(READ_AT_IMPORT="x")
        assert own.run("-c", "print('ran')", env={"READ_AT_IMPORT": "x"}).stdout == "ran\n"
        assert own.run("-c", "").returncode == 4

    def test_another_installation(self, zygote: Zygote):
        """Of the same user, with modules of its own."""
        code = (
            "import sys; sys.prefix = '/other'; from thaw_vllm.cli.main import main; sys.exit(main(['run', '-c', '']))"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 4 and repr(sys.prefix) in ran.stderr
        assert subprocess.run([*COMMAND, "run", "-c", ""], timeout=60).returncode == 0
