"""Sessions on the command line: what is said, what is not said unasked, and how everything ends."""

import json
import os
import re

import pytest
from tests.sessions.made import save, session

from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.store import Store

pytest_plugins = ()


@pytest.fixture
def store(memory_path, monkeypatch):
    monkeypatch.setenv("THAW_SESSIONS_DIR", str(memory_path / "sessions"))
    return Store(create=True)


@pytest.fixture
def trunk(store):
    return save(store, session(range(18), prompt=6, labels=("trunk",), salt="secret", sampling={"seed": 7}))[0]


@pytest.mark.parametrize("command", [["log"], ["show", "x"], ["diff", "x", "y"], ["branch", "x"], ["gc"], ["fsck"]])
def test_without_a_store(thaw, memory_path, monkeypatch, command):
    monkeypatch.setenv("THAW_SESSIONS_DIR", str(memory_path / "none"))
    ran = thaw(*command)
    assert ran.code == 6 and ran.out == "" and "does not exist: thaw checkpoint makes a store" in ran.err
    assert not (memory_path / "none").exists()
    (memory_path / "none").mkdir()
    assert "holds no sessions; thaw checkpoint makes them" in thaw(*command).err
    assert not [*(memory_path / "none").iterdir()]


def test_an_empty_store(thaw, store):
    assert thaw("log").out == f"no sessions in {store.directory}\n"
    assert thaw("log", "--json").document == {"store": str(store.directory), "sessions": [], "broken": {}}
    assert thaw("gc").code == thaw("fsck").code == 0


def test_log(thaw, store, trunk):
    early = branch(store, trunk, 9, labels=["mistake"])
    late = branch(store, trunk)
    store.pin(late)
    store.remove(save(store, session([1]))[0])
    ran = thaw("log")
    lines = [line.split() for line in ran.out.splitlines()]
    assert [line[1 if line[0] in "*├─└─" else 0] for line in lines[1:]] == [i[:12] for i in (trunk, early, late)]
    assert lines[1][-1] == "trunk" and lines[2][-1] == "mistake" and "pinned" in " ".join(lines[3])
    found = thaw("log", "--json").document["sessions"]
    assert [(one["id"], one["depth"], one["fork"], one["tokens"]) for one in found] == [
        (trunk, 0, None, 18),
        (early, 1, 9, 9),
        (late, 1, 18, 18),
    ]
    assert [one["id"] for one in thaw("log", "mistake", "--json").document["sessions"]] == [trunk, early]
    store.remove(trunk)
    assert thaw("log", "mistake").out.splitlines()[1].split()[-3:] == ["parent", "gone", "mistake"]


def test_what_is_secret_is_not_shown(thaw, store, trunk):
    for command in (["log"], ["show", "trunk"], ["diff", "trunk", "trunk"]):
        for more in ([], ["--json"]):
            ran = thaw(*command, *more)
            assert ran.code == 0 and "secret" not in ran.out and "nonce" not in ran.out
    assert thaw("show", "trunk", "--json").document["salted"] is True


def test_a_store_that_may_only_be_read(thaw, store, trunk):
    """As in a backup; and one whose own file is gone, or damaged."""
    store.directory.chmod(0o500)
    try:
        for command in (["log"], ["show", "trunk"], ["diff", "trunk", "trunk"], ["fsck"]):
            assert thaw(*command).code == 0
    finally:
        store.directory.chmod(0o700)
    (store.directory / "store.json").unlink()
    assert trunk[:12] in thaw("log").out  # it is made anew
    (store.directory / "store.json").write_text("{")
    assert f"{store.directory}/store.json" in thaw("log").err


def test_a_broken_record_is_told_beside_the_others(thaw, store, trunk):
    bad, _ = save(store, session(range(4)))
    store.record(bad).write_bytes(b"x")
    ran = thaw("log")
    assert ran.code == 0 and trunk[:12] in ran.out and f"{bad[:12]}  cannot be read" in ran.out
    assert thaw("log", "--json").document["broken"].keys() == {bad}
    ran = thaw("gc")
    assert ran.code == 6 and "thaw fsck --repair" in ran.err


def test_show(thaw, store, trunk):
    ran = thaw("show", "trunk")
    assert ran.code == 0 and trunk in ran.out and "18: 6 given, 12 generated" in ran.out
    assert "16 tokens in 4 blocks, 512 bytes" in ran.out and '{"seed": 7}' in ran.out
    found = thaw("show", trunk[:8], "--json").document
    assert (found["block_files"], found["bytes"], found["labels"]) == (4, 512, ["trunk"])
    assert found["pinned"] is False and "prompt_text" not in found


def test_names_that_mean_nothing(thaw, store, trunk):
    for command in (["show", "none"], ["diff", "trunk", "none"], ["branch", "none"], ["rm", "none"], ["pin", "none"]):
        ran = thaw(*command)
        assert ran.code == 2 and "there is no session 'none'" in ran.err and "thaw log" in ran.err


def test_text_only_with_a_tokenizer(thaw, store, trunk):
    ran = thaw("show", "trunk", "--show-text")
    assert ran.code == 2 and "--tokenizer" in ran.err
    ran = thaw("show", "trunk", "--show-text", "--tokenizer", "/none")
    assert ran.code == 2 and "is not a directory" in ran.err


def test_text(thaw, store, monkeypatch, tmp_path):
    from thaw_vllm.cli import prefixes

    def decoder(path):
        assert path == tmp_path
        return lambda ids: f"m:{'-'.join(map(str, ids))}\n"

    monkeypatch.setattr(prefixes, "decoder", decoder)
    save(store, session([1, 2, 3, 4, 5], prompt=2, source=str(tmp_path), labels=("a",)))
    save(store, session([1, 2, 3, 9], prompt=2, labels=("b",)))
    assert "m:1-2" in thaw("show", "a", "--show-text").out
    found = thaw("show", "a", "--show-text", "--json").document
    assert (found["prompt_text"], found["generated_text"]) == ("m:1-2\n", "m:3-4-5\n")
    found = thaw("diff", "a", "b", "--show-text", "--json").document
    assert [found[name] for name in ("common_text", "a_text", "b_text")] == ["m:1-2-3\n", "m:4-5\n", "m:9\n"]
    assert "m:4-5" in thaw("diff", "b", "a", "--show-text").out


def test_diff(thaw, store, trunk):
    save(store, session([*range(9), 99, 98, 97], labels=("b",)))
    found = thaw("diff", "trunk", "b", "--json").document
    assert found["first_difference"] == 9 and found["comparable"] is False
    assert thaw("diff", "trunk", "trunk", "--json").document["first_difference"] is None
    assert "nowhere: the same tokens" in thaw("diff", "trunk", "trunk").out
    assert "cannot be shared" in thaw("diff", "trunk", "b").out
    branch(store, trunk, 9, labels=["c"])
    assert "is the beginning of the other" in thaw("diff", "trunk", "c").out


def test_branch(thaw, store, trunk):
    found = thaw("branch", "trunk", "--at", "-9", "--label", "x", "--label", "y", "--json").document
    assert (found["tokens"], found["fork"], found["labels"], found["parent"]) == (9, 9, ["x", "y"], trunk)
    assert thaw("branch", "trunk").code == 0
    ran = thaw("branch", "trunk", "--at", "19")
    assert ran.code == 2 and "has 18 tokens" in ran.err
    ran = thaw("branch", "trunk", "--label", "")
    assert ran.code == 2 and "a label is empty" in ran.err and len(store.listed()[0]) == 3


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("7d", 7 * 86400), ("12h", 12 * 3600), ("30m", 1800), ("90s", 90), ("90", 90), ("0.5", 0.5), ("1.5h", 5400)],
)
def test_a_time_to_live(thaw, trunk, given, seconds):
    found = thaw("branch", "trunk", "--ttl", given, "--json").document
    assert found["expires"] == pytest.approx(found["created"] + seconds, abs=1e-5)


@pytest.mark.parametrize("given", ["", "0", "0d", "-5", "-5h", "7w", "d", "1e3", "7 d", "nan", "٣d", "1.d", "999999d"])
def test_a_time_to_live_that_is_none(thaw, store, trunk, given):
    ran = thaw("branch", "trunk", "--ttl", given)
    assert ran.code == 2 and "--ttl must be a time above 0" in ran.err and "7d, 12h, 30m" in ran.err
    assert ran.err.count("\n") == 1 and len(store.listed()[0]) == 1


def test_what_expires(thaw, store, trunk):
    """It is shown as what it is, taken up like any other, and removed by the next gc, unless it is pinned."""
    assert "until" not in thaw("show", "trunk").out and "expire" not in thaw("log").out
    assert thaw("show", "trunk", "--json").document["expires"] is None
    for given, told in (("90", r"[1-9]\d s"), ("30m", "30 min"), ("12h", "12 h"), ("7d", "7 days")):
        id_ = thaw("branch", "trunk", "--ttl", given, "--json").document["id"]
        assert re.search(f"open, expires in {told}", thaw("log", id_).out)
        assert re.search(f", expires in {told}\n", thaw("show", id_).out)
    assert re.search(r"until +20\S+ \S+.*, expires in 7 days\n", thaw("branch", "trunk", "--ttl", "7d").out)
    gone = save(store, session(range(8), labels=("gone",), expires=9.0))[0]
    child = thaw("branch", "gone", "--label", "child", "--json").document
    assert child["expires"] is None and "open, expired" in thaw("log", "gone").out
    found = {one["id"]: one["expires"] for one in thaw("log", "--json").document["sessions"]}
    assert found[gone] == 9.0 and found[child["id"]] is None
    assert thaw("pin", "gone").code == 0
    assert "open, expired, pinned" in thaw("log", "gone").out and ", expired\n" in thaw("show", "gone").out
    assert thaw("gc", "--json").document["sessions"] == [] and thaw("pin", "gone", "--off").code == 0
    ran = thaw("gc", "--dry-run")
    assert ["expired", gone[:12], "gone"] in [line.split() for line in ran.out.splitlines()] and store.read(gone)
    found = thaw("gc", "--json").document
    assert found["sessions"] == found["expired"] == [gone] and found["blocks"] == 0
    assert "open, parent gone" in thaw("log", "child").out and thaw("show", "gone").code == 2


def test_what_expires_takes_its_time_with_it(thaw, store, memory_path):
    id_ = save(store, session(range(8), labels=("gone",), expires=9.0))[0]
    file, other = memory_path / "gone.thawsession", memory_path / "other"
    assert thaw("export", "gone", file).code == 0 and thaw("import", file, "--store", other).code == 0
    assert thaw("show", "gone", "--store", other, "--json").document["expires"] == 9.0
    assert thaw("gc", "--store", other, "--json").document["expired"] == [id_]


def test_export_and_import(thaw, store, trunk, memory_path):
    file = memory_path / "a.thawsession"
    assert thaw("export", "trunk", file, "--json").document == {
        "id": trunk,
        "file": str(file),
        "bytes": file.stat().st_size,
    }
    ran = thaw("export", "trunk", file)
    assert ran.code == 6 and "--force" in ran.err and thaw("export", "trunk", file, "-f").code == 0
    ran = thaw("import", file, "--store", memory_path / "new", "--json")
    assert ran.document == {"id": trunk, "blocks_added": 4, "store": str(memory_path / "new")}
    assert thaw("import", file, "--store", memory_path / "new").code == 0
    file.write_bytes(file.read_bytes()[:3000])
    assert thaw("import", file, "--store", memory_path / "new").code == 3
    (memory_path / "text").write_text("no session")
    for name, code in (("none", 6), ("text", 3)):
        assert thaw("import", memory_path / name, "--store", memory_path / "unmade").code == code
        assert not (memory_path / "unmade").exists()


def test_pin_rm_and_gc(thaw, store, trunk):
    other = save(store, session([5] * 8))[0]
    assert thaw("pin", "trunk", "--json").document == {"id": trunk, "pinned": True}
    dry = thaw("gc", "--budget-gb", "0", "--dry-run", "--json").document
    assert dry["sessions"] == [other] and dry["dry_run"] and len(store.listed()[0]) == 2
    ran = thaw("gc", "--budget-gb", "0")
    assert ran.code == 0 and other[:12] in ran.out and "which pinned sessions hold" in ran.out
    ran = thaw("rm", "trunk")
    assert ran.code == 2 and "is pinned; thaw pin --off" in ran.err and store.pinned(trunk)
    assert thaw("pin", "trunk", "--off").code == 0
    assert thaw("rm", "trunk", trunk[:8], "--json").document == {"removed": [trunk]}
    assert thaw("gc", "--json").document["left"] == 0
    ran = thaw("gc", "--budget-gb", "-1")
    assert ran.code == 2 and "THAW_SESSIONS_GB" in ran.err


def test_fsck(thaw, store, trunk):
    ran = thaw("fsck")
    assert ran.code == 0 and ran.out.splitlines()[-1].split() == ["sound", "yes"]
    path = next(store.block_files())
    os.truncate(path, path.stat().st_size - 1)
    ran = thaw("fsck", "--quick")
    assert ran.code == 3 and str(path) in ran.out and "thaw fsck --repair" in ran.err
    assert thaw("fsck", "--json").document["missing"].keys() == {trunk}
    assert thaw("fsck", "--repair").code == 3
    ran = thaw("export", "trunk", store.directory.parent / "x")
    assert ran.code == 6 and "lacks 1 of its blocks" in ran.err and "thaw branch --at" in ran.err
    left = thaw("fsck", "--json").document["missing"][trunk]
    assert f"goes on with {left} tokens" in thaw("fsck").out
    found = json.loads(thaw("fsck", "--json").out)
    assert found["missing"].keys() == {trunk} and found["damaged"] == {} and found["sound"] is False


def test_nothing_heavy_is_loaded(spawn, store, trunk):
    for command in (["log"], ["show", "trunk"], ["diff", "trunk", "trunk"], ["fsck"]):
        ran = spawn(*command, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert ran.code == 0
        for name in ("torch", "vllm", "transformers"):
            assert f" {name}\n" not in ran.err
