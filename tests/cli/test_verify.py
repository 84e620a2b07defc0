import json
import os
import pty
import subprocess
import sys

from tests.cli.ranks import freeze_set

from thaw_vllm.cli import progress
from thaw_vllm.weights.open import open_snapshot


def test_sound(thaw, snapshot):
    ran = thaw("verify", snapshot)
    assert ran.code == 0 and ran.err == ""
    assert f"sound    {snapshot}\n" in ran.out and "padding" in ran.out and "content id" not in ran.out
    assert "GB/s" in ran.out


def test_json(thaw, snapshot):
    ran = thaw("verify", snapshot, "--content", "--json")
    assert ran.code == 0 and ran.err == ""
    found = ran.document
    with open_snapshot(snapshot) as opened:
        header = opened.snapshot.header
    assert found["files"] == [str(snapshot)] and found["bytes"] == snapshot.stat().st_size
    assert found["verified"] == ["sections", "chunks", "padding", "content"]
    assert found["content"] == header.content and found["model"] == header.identity.model
    assert found["seconds"] > 0 and found["gb_per_s"] >= 0


def test_set(thaw, tmp_path):
    freeze_set(tmp_path / "set.thaw", 2)
    ran = thaw("verify", tmp_path / "set.thaw")
    assert ran.code == 0 and ran.out.count("sound ") == 2 and "the set's files" in ran.out
    assert thaw("verify", tmp_path / "set.thaw", "--json").document["verified"][-1] == "set"
    (member,) = tmp_path.glob("set.*.rank1.thaw")
    member.unlink()
    ran = thaw("verify", tmp_path / "set.thaw")
    assert ran.code == 3 and "rank 1" in ran.err and "is missing" in ran.err
    assert thaw("verify", tmp_path / "set.thaw", "--no-ranks").code == 0


def test_needs_neither_torch_nor_numpy(spawn, snapshot, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('numpy was imported')")
    ran = spawn("verify", snapshot, "--content", env={"PYTHONPATH": str(tmp_path)})
    assert ran.code == 0, ran.err


def test_bar_is_on_standard_error_alone(snapshot):
    """On a pseudo-terminal; the answer is piped and stays one JSON document."""
    ours, theirs = pty.openpty()
    code = (
        "import thaw_vllm.cli.progress as p; p.DELAY = 0; from thaw_vllm.cli.main import main; "
        f"raise SystemExit(main(['verify', {str(snapshot)!r}, '--json']))"
    )
    terminal = os.environ | {"TERM": "xterm"}  # a dumb one has no bars
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=terminal) as process:
        os.close(theirs)
        out = process.stdout.read()
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side has closed
                break
            if not part:
                break
            seen += part
    os.close(ours)
    assert process.returncode == 0 and json.loads(out)["chunks"] > 0
    assert b"verify" in seen and b"Traceback" not in seen


def test_no_bar_where_nobody_looks(capfd):
    with progress.progress("verify") as advance:
        assert advance is None
    assert capfd.readouterr() == ("", "")


def test_no_bar_within_the_first_second(monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress("verify") as advance:
        for done in range(5):
            advance(done, 5)
    assert capfd.readouterr() == ("", "")
