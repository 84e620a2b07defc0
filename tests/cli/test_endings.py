"""Every way a command can end: exit code, one line on standard error, nothing half-made."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.cli.ranks import freeze_set

from thaw_vllm import errors, freeze_model
from thaw_vllm.cli import commands
from thaw_vllm.cli import main as entry
from thaw_vllm.weights.open import open_snapshot

MIB = 1 << 20


def one_line(ran):
    assert ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    return ran.err


@pytest.mark.parametrize("command", ["info", "verify", "id"])
def test_missing_file(thaw, command, tmp_path):
    ran = thaw(command, tmp_path / "none.thaw")
    assert ran.code == 6 and "'" + str(tmp_path / "none.thaw") + "' does not exist" in one_line(ran)


def test_convert_of_nothing(thaw, tmp_path):
    ran = thaw("convert", tmp_path / "none", tmp_path / "out")
    assert ran.code == 6 and "does not exist" in one_line(ran)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["verify"], ["verify", "--json"], ["id"]])
def test_not_a_snapshot(thaw, command, tmp_path):
    (tmp_path / "text.thaw").write_text("this is no snapshot at all\n" * 20)
    ran = thaw(*command, tmp_path / "text.thaw")
    assert ran.code == 3 and "not a thaw snapshot" in one_line(ran)


@pytest.mark.parametrize("command", ["info", "verify", "id"])
def test_truncated(thaw, command, snapshot):
    os.truncate(snapshot, snapshot.stat().st_size - 1)
    ran = thaw(command, snapshot)
    assert ran.code == 3 and "truncated" in one_line(ran) and str(snapshot) in ran.err


def test_damaged_chunk(thaw, snapshot, tmp_path):
    with open_snapshot(snapshot) as opened:
        place = opened.snapshot.preamble.payload_at + opened.snapshot.chunks[0].stored_at
    with snapshot.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    assert thaw("info", snapshot).code == 0
    ran = thaw("verify", snapshot)
    assert ran.code == 3 and "'embed.weight'" in one_line(ran) and str(place) in ran.err
    ran = thaw("convert", snapshot, tmp_path / "out")
    assert ran.code == 3 and "is damaged" in one_line(ran)
    assert os.listdir(tmp_path) == [snapshot.name]


def test_exists(thaw, snapshot, checkpoint, tmp_path):
    before = snapshot.read_bytes()
    ran = thaw("convert", checkpoint, snapshot)
    assert ran.code == 6 and "--force" in one_line(ran)
    assert snapshot.read_bytes() == before
    ran = thaw("convert", snapshot, checkpoint)
    assert ran.code == 6 and "--force" in one_line(ran)
    assert thaw("convert", checkpoint, snapshot, "--force").code == 0
    assert thaw("convert", snapshot, checkpoint, "-f").code == 0


def test_raw_stage(thaw, tmp_path):
    freeze_set(tmp_path / "raw.thaw", 1)
    ran = thaw("convert", tmp_path / "raw.thaw", tmp_path / "out")
    assert ran.code == 5 and "raw" in one_line(ran)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info"], "FILE"),
        (["info", "a", "b"], "b"),
        (["info", "a", "--frobnicate"], "--frobnicate"),
        (["verify", "a", "--content=1"], "--content"),
        (["melt"], "melt"),
        (["--frobnicate"], "--frobnicate"),
        (["freeze", "--model", "m"], "--output"),
        (["freeze", "--model", "m", "--output", "o", "--tensor-parallel-size", "0"], "--tensor-parallel-size"),
        (["freeze", "--model", "m", "--output", "o", "--engine-arg", "nonsense"], "KEY=VALUE"),
        (["bench", "everything"], "everything"),
        (["bench", "restore", "--rounds", "many"], "--rounds"),
    ],
)
def test_wrong_command_line(thaw, arguments, said):
    ran = thaw(*arguments)
    assert ran.code == 2 and said in one_line(ran)
    assert "--help" in ran.err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["serve", "--model"], "thaw serve"),
        (["zygote", "start", "--name"], "thaw zygote start"),
        (["zygote", "melt"], "thaw zygote"),
        (["--frobnicate", "serve"], "thaw"),
        (["bench", "restore", "--rounds", "many"], "thaw bench restore"),
    ],
)
def test_the_help_that_is_named(thaw, arguments, command):
    assert f"({command} --help shows what it takes)" in thaw(*arguments).err


def test_package_that_is_missing(thaw, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    monkeypatch.delitem(sys.modules, "thaw_vllm.weights.checkpoint", raising=False)
    ran = thaw("id", checkpoint)
    assert ran.code == 7 and "pip install blake3" in one_line(ran)


@pytest.fixture
def failing(monkeypatch):
    """``failing(error)``: every command raises it."""

    def make(error):
        def get_command(self, ctx, name):
            raise error

        monkeypatch.setattr(commands.Commands, "get_command", get_command)

    return make


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and k.__module__ == errors.__name__]
)
def test_every_error_has_its_code(thaw, failing, kind):
    failing(kind("what, where, cure"))
    ran = thaw("info", "x")
    assert ran.code == kind.exit_code and ran.err == "error: what, where, cure\n"


def test_unexpected_error_is_short(thaw, failing, monkeypatch):
    monkeypatch.delenv("THAW_DEBUG", raising=False)
    failing(ZeroDivisionError("by\nzero " + "x" * 1000))
    ran = thaw("info", "x")
    assert ran.code == 1 and ran.out == ""
    first, second = ran.err.splitlines()
    assert first.startswith("error: unexpected ZeroDivisionError: by zero xxx") and len(first) < 330
    assert "THAW_DEBUG=1" in second


def test_unexpected_error_in_full(thaw, failing, monkeypatch):
    monkeypatch.setenv("THAW_DEBUG", "1")
    failing(ZeroDivisionError("by zero"))
    ran = thaw("info", "x")
    assert ran.code == 1 and ran.err.startswith("Traceback") and "get_command" in ran.err


def test_what_the_file_system_says_on_its_own(thaw, failing):
    failing(PermissionError(13, "Permission denied", "secret"))
    ran = thaw("info", "x")
    assert ran.code == 6 and ran.err == "error: Permission denied: 'secret'\n"


def test_interrupted_anywhere(thaw, failing):
    failing(KeyboardInterrupt())
    ran = thaw("info", "x")
    assert (ran.code, ran.out, ran.err.lstrip("\n")) == (130, "", "interrupted; nothing is left half-written\n")


def test_interrupted_before_anything_was_imported(thaw, monkeypatch):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", run)
    assert thaw("info", "x").err == "interrupted; nothing is left half-written\n"


def test_nobody_reads_standard_error(tmp_path):
    code = "from thaw_vllm.cli.main import main; raise SystemExit(main(['info', 'none']))"
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stderr=full)
    assert ran.returncode == 6


@pytest.mark.parametrize("arguments", [["--json"], ["--no-tensors"]])
def test_answer_that_cannot_be_written(snapshot, tmp_path, arguments):
    code = "from thaw_vllm.cli.main import main; raise SystemExit(main())"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code, "info", str(snapshot), *arguments]
        ran = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (6, "error: No space left on device\n")


def read_so_far(process):
    """Bytes that the process has read."""
    with open(f"/proc/{process.pid}/io", encoding="ascii") as file:
        return int(file.readline().split()[1])


def interrupted(begin, halfway):
    """Ctrl-C to the command that ``begin`` starts, once ``halfway(process)`` holds.

    One that got past that before anybody looked, on a busy machine, is waited for, and another one started.
    """
    for _ in range(5):
        process = begin()
        until = time.monotonic() + 60
        while process.poll() is None:
            if halfway(process):
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
                # Older versions of typer begin a new line first.
                said = process.returncode, out, err.lstrip("\n")
                assert said == (130, "", "interrupted; nothing is left half-written\n")
                return
            assert time.monotonic() < until
            time.sleep(0.002)
        assert process.returncode == 0, process.communicate()
    pytest.fail("each of them got past the moment for Ctrl-C unseen")


def test_ctrl_c_while_verifying(start, large_snapshot, tmp_path):
    path = large_snapshot(32_000)
    interrupted(lambda: start("verify", path), lambda process: 500 * MIB < read_so_far(process) < 16_000 * MIB)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("old", [False, True])
def test_ctrl_c_while_converting_to_a_snapshot(start, large_checkpoint, tmp_path, parts, old):
    directory, target = large_checkpoint(2000), tmp_path / "out.thaw"
    if old:
        freeze_model(torch.nn.Linear(2, 2), target)
    before = target.read_bytes() if old else None

    def begin():
        if old:
            target.write_bytes(before)
        else:
            target.unlink(missing_ok=True)
        return start("convert", directory, target, "--force")

    interrupted(begin, lambda process: parts(tmp_path) and 200 * MIB < read_so_far(process) < 1000 * MIB)
    assert parts(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["large", "out.thaw"] if old else ["large"]
    assert not old or target.read_bytes() == before


def test_ctrl_c_while_converting_to_a_checkpoint(start, large_snapshot, tmp_path, parts):
    path = large_snapshot(4000)

    def begin():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return start("convert", path, tmp_path / "out")

    interrupted(begin, lambda process: parts(tmp_path) and 200 * MIB < read_so_far(process) < 2000 * MIB)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("to", ["a snapshot", "a checkpoint"])
def test_ctrl_c_after_the_new_one_has_its_name(thaw, checkpoint, snapshot, tmp_path, monkeypatch, to):
    """The message holds then too."""
    target = snapshot if to == "a snapshot" else tmp_path / "out"
    if to == "a checkpoint":
        assert thaw("convert", snapshot, target).code == 0
        source = tmp_path / "other.thaw"
        assert thaw("convert", checkpoint, source).code == 0
    else:
        source = checkpoint
    read = lambda: (target if target.is_file() else target / "model.safetensors").read_bytes()  # noqa: E731
    before, real = read(), os.fsync

    def fsync(fd):
        real(fd)
        if read() != before:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    ran = thaw("convert", source, target, "--force")
    assert (ran.code, ran.err.lstrip("\n")) == (130, "interrupted; nothing is left half-written\n")
    monkeypatch.undo()
    assert read() != before and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))


@pytest.mark.parametrize("old", [False, True])
def test_full_disk_while_converting_to_a_snapshot(spawn, large_checkpoint, tmp_path, old):
    directory, target = large_checkpoint(8), tmp_path / "out.thaw"
    if old:
        freeze_model(torch.nn.Linear(2, 2), target)
    before = target.read_bytes() if old else None
    ran = spawn("convert", directory, target, "--force", preexec_fn=limited)
    assert ran.code == 6 and "no room for" in one_line(ran) and str(target) in ran.err
    assert sorted(os.listdir(tmp_path)) == (["large", "out.thaw"] if old else ["large"])
    assert not old or target.read_bytes() == before


def test_full_disk_while_converting_to_a_checkpoint(spawn, large_snapshot, tmp_path):
    path = large_snapshot(16)
    ran = spawn("convert", path, tmp_path / "out", preexec_fn=limited)
    assert ran.code == 6 and "no room for" in one_line(ran) and str(tmp_path / "out") in ran.err
    assert "thaw-part" not in ran.err
    assert os.listdir(tmp_path) == [path.name]
