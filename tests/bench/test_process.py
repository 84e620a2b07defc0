"""Children that fail in every way; none of them is ours."""

import contextlib
import os
import signal
import sys
import time

import pytest

from thaw_vllm.bench import rounds
from thaw_vllm.bench.process import DONE, PREPARED, READY, RESULT, Child, ChildError
from thaw_vllm.bench.rounds import Entry

GOOD = """
import json, os, sys
out = int(sys.argv[1])
asked = json.loads(sys.stdin.readline())
def say(**said): os.write(out, json.dumps(said).encode() + b"\\n")
def step(name):
    say(step=name)
    sys.stdin.readline()
print("a library greets")
"""
RUNS = (
    GOOD
    + """
step("ready"); step("prepared"); step("done")
say(step="result", result={"seconds": 0.5, "asked": asked})
"""
)
BAD = {
    "fails": ("import sys; sys.exit('cannot load libmissing.so')", "ended with exit code 1: cannot load libmissing.so"),
    "silent": ("raise SystemExit(3)", "ended with exit code 3$"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "ended with signal SIGKILL"),
    "garbage": (GOOD + "os.write(out, b'\\xff\\x00 hello\\n')", "answered garbage"),
    "not an object": (GOOD + "os.write(out, b'[1]\\n')", "answered garbage"),
    "without a step": (GOOD + "say(result=1)", "answered garbage"),
    "out of turn": (GOOD + "step('done')", "was to be 'ready' and says 'done'"),
    "tells its error": (GOOD + "say(step='error', error='ValueError: no')", "^ValueError: no$"),
    "hangs": ("import time; time.sleep(60)", "took longer than 1 s and was ended"),
    "half a line": (GOOD + "os.write(out, b'{'); import time; time.sleep(60)", "took longer"),
}


def command(code):
    return [sys.executable, "-c", code]


def test_steps():
    with Child("restore", {"a": 1}, command(RUNS)) as child:
        child.reach(READY, 30)
        child.go()
        child.reach(PREPARED, 30)
        child.go()
        child.reach(DONE, 30)
        child.go()
        found = child.reach(RESULT, 30)["result"]
    assert found == {"seconds": 0.5, "asked": {"task": "restore", "request": {"a": 1}}}


@pytest.mark.parametrize("name", BAD)
def test_failures_are_one_line(name):
    code, message = BAD[name]
    timeout = 1.0 if "took" in message else 30.0
    with Child("restore", {}, command(code)) as child, pytest.raises(ChildError, match=message) as caught:
        child.reach(READY, timeout)
    assert "\n" not in str(caught.value)


def test_the_end_is_seen_although_another_process_holds_the_pipe():
    code = GOOD + "if os.fork(): os._exit(3)\nimport time; time.sleep(60)"
    start = time.monotonic()
    with Child("restore", {}, command(code)) as child, pytest.raises(ChildError, match="ended with exit code 3"):
        child.reach(READY, 30)
    assert time.monotonic() - start < 20


def test_what_it_printed():
    with Child("restore", {}, command(RUNS)) as child:
        child.reach(READY, 30)
        assert child.printed() == "a library greets\n"


def test_no_such_program():
    with pytest.raises(ChildError, match="could not be started"):
        Child("restore", {}, ["/nowhere/python"])


def test_leaving_ends_it_with_its_own_children():
    code = GOOD + "import subprocess; p = subprocess.Popen(['sleep', '60']); say(step='ready', pid=p.pid)\nstep('x')"
    with Child("restore", {}, command(code)) as child:
        grandchild = child.reach(READY, 30)["pid"]
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(grandchild, 0)
            with open(f"/proc/{grandchild}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.02)
    os.kill(grandchild, signal.SIGKILL)
    pytest.fail("it still runs")


def test_our_child_answers_an_unknown_task():
    with Child("nothing", {}) as child, pytest.raises(ChildError, match="KeyError: 'nothing'"):
        child.reach(READY, 60)


def test_nothing_is_left_open(no_leaks):
    for code in (RUNS, BAD["garbage"][0]):
        with Child("restore", {}, command(code)) as child, contextlib.suppress(ChildError):
            child.reach(READY, 30)


DISPATCH = (
    GOOD
    + """
name = asked["request"]["name"]
if name == "fails": sys.exit("rival: no luck")
if name == "garbage": os.write(out, b"!\\n")
step("ready"); step("prepared"); step("done")
say(step="result", result={"seconds": 0.25, "name": name})
"""
)


def test_rounds_turn_and_go_on_without_those_that_fail():
    entries = [Entry(name, "", "restore", {"name": name}) for name in ("one", "fails", "two", "garbage")]
    order, told = [], []

    def state(entry):
        order.append(entry.name)
        if entry.name == "two" and order.count("two") == 2:
            raise ChildError("could not be made cold: 7 % stayed")
        return 0.5

    samples, missed = rounds.run("work", entries, 3, state, told.append, command=command(DISPATCH))
    assert order == ["one", "two", "two", "one", "one"]
    assert [len(samples[name]) for name in ("one", "fails", "two", "garbage")] == [3, 0, 1, 0]
    assert samples["one"][0].answer["seconds"] == 0.25 and samples["one"][0].residency == 0.5
    reasons = {m.system: m.why for m in missed}
    assert set(reasons) == {"fails", "garbage", "two"}
    assert "no luck" in reasons["fails"] and "7 %" in reasons["two"] and "garbage" in reasons["garbage"]
    assert any("one: 0.250 s" in line for line in told)


def test_no_entries():
    assert rounds.run("work", [], 2, lambda entry: None, print) == ({}, [])


@pytest.mark.parametrize("how", ["crash", "close"])
def test_processes_that_it_leaves_may_clean_up(how, tmp_path):
    """As a resource tracker does, which ignores SIGTERM and ends when its parent has, or an engine that handles it."""
    cleaner = "import signal, sys, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    cleaner += f"import time\npathlib.Path({str(tmp_path / 'there')!r}).touch()\n"
    cleaner += f"try: time.sleep(60)\nfinally: pathlib.Path({str(tmp_path / 'there')!r}).unlink()"
    code = f"""
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {cleaner!r}])
while not os.path.exists({str(tmp_path / "there")!r}): time.sleep(0.01)
"""
    code += (
        "os.kill(os.getpid(), signal.SIGSEGV)"
        if how == "crash"
        else "os.write(int(sys.argv[1]), b'{}\\n'); time.sleep(60)"
    )
    with Child("restore", {}, command(code)) as child, pytest.raises(ChildError):
        child.reach(READY, 30)
    assert not (tmp_path / "there").exists()
