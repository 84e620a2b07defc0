"""``thaw demo rollouts`` where a record is looked at, and the record and the sessions that are checked in."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.sessions.made import MODEL
from tests.sessions.made_rollouts import rollout, rollouts

from thaw_vllm.cli.demo_rollouts import reward
from thaw_vllm.engines.vllm import api, fresh
from thaw_vllm.errors import StorageError
from thaw_vllm.sessions import rollouts as record
from thaw_vllm.sessions.record import ids
from thaw_vllm.sessions.rollouts import read, write
from thaw_vllm.sessions.store import Store

RECORDS = Path(__file__).resolve().parents[2] / "demos" / "records"
RECORD = RECORDS / "best_of_n.json"
HEAVY = ("torch", "numpy", "vllm", "transformers", "safetensors")


@pytest.fixture
def made(tmp_path):
    best = rollout([1, 2, 3], reward=1.0, seed=4)
    surprised = rollout([1, 5], seed=5, logprob=-2.5, text="a \x1b[2J b")
    path = tmp_path / "r.json"
    write(path, rollouts(best, surprised, rollout([7], seed=6, logprob=-9.0)))
    return path


@pytest.fixture
def kept(tmp_path):
    """The sessions that are checked in, where others may not write whatever this checkout's permissions are."""
    path = tmp_path / "sessions"
    for part in sorted((RECORDS / "sessions").rglob("*")):
        place = path / part.relative_to(RECORDS / "sessions")
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if part.is_file():
            shutil.copyfile(part, place)
    path.chmod(0o700)
    return path


def test_what_is_shown(thaw, made):
    ran = thaw("demo", "rollouts", "--records", made)
    assert ran.code == 0 and ran.err == ""
    parts = ran.out.split("\n\n")
    assert str(made) in parts[0] and "mean reward 0.333" in parts[0]
    first, second, third = [line.split() for line in parts[1].splitlines()[2:]]
    assert first[:7] == ["#1", "4", "1", "+1.155", "-1.000", "-3.00", "3"]
    assert second[:7] == ["#2", "5", "0", "-0.577", "-2.500", "-5.00", "2"]
    assert second[7:] == ["1", "'t5'", "-2.50,", "not", "'t2'", "-1.00"]
    assert third[7:] == ["0", "'t7'", "-9.00,", "not", "'t1'", "-1.00"]
    tree = [line.split() for line in parts[2].splitlines()[2:]]
    assert tree == [
        ["├─", "'t1'", "0", "-1.000", "2", "0.50", "#1", "#2"],
        ["│", "├─", "'t2'", "1", "-1.000", "2", "1.00", "#1"],
        ["│", "└─", "'t5'", "1", "-2.500", "2", "0.00", "#2"],
        ["└─", "'t7'", "0", "-9.000", "2", "0.00", "#3"],
    ]
    assert "\x1b" not in ran.out and r"#2  'a \x1b[2J b'" in parts[3]
    steps = [line.split() for line in parts[4].splitlines()[2:]]
    assert steps[0] == ["0", "'t1'", "-1.000", "2", "'t9'", "-0.50", "#3"] and steps[1][-1] == "#2"
    assert steps[2] == ["2", "'t3'", "-1.000", "2", "'t9'", "-0.50"]


def test_surprises_are_marked(thaw, made):
    ran = thaw("demo", "rollouts", "--records", made, "--rank", "2")
    steps = [line.split() for line in ran.out.split("\n\n")[4].splitlines()[2:]]
    assert steps[0] == ["!", "0", "'t1'", "-2.500", "2", "'t9'", "-0.50", "#3"]
    assert steps[1] == ["!", "1", "'t5'", "-2.500", "2", "'t9'", "-0.50", "#1"]


def test_json_says_the_same(thaw, made):
    found = thaw("demo", "rollouts", "--records", made, "--rank", "2", "--json").document
    assert [(one["seed"], one["reward"], one["tokens"], one["text"]) for one in found["ranking"]] == [
        (4, 1.0, 3, "1 2 3"),
        (5, 0.0, 2, "a \x1b[2J b"),
        (6, 0.0, 1, "7"),
    ]
    leaves = found["ranking"][1]["leaves_best"]
    assert (leaves["at"], leaves["token"]["text"], leaves["best_token"]["logprob"]) == (1, "t5", -1.0)
    assert [(one["at"], one["depth"], one["token"]["id"], one["rollouts"]) for one in found["tree"]] == [
        (0, 1, 1, [1, 2]),
        (1, 2, 2, [1]),
        (1, 2, 5, [2]),
        (0, 1, 7, [3]),
    ]
    assert found["rollout"]["rank"] == 2 and found["mean_reward"] == pytest.approx(1 / 3)
    first, _ = found["rollout"]["steps"]
    assert first["surprising"] is True and first["below_likeliest"] == 2.0 and first["left_by"] == [3]
    assert first["top"] == [{"id": 9, "text": "t9", "logprob": -0.5}]


def test_rollouts_that_are_the_same_part_nowhere(thaw, tmp_path):
    write(tmp_path / "r.json", rollouts(rollout([1, 2]), rollout([1, 2], seed=2)))
    ran = thaw("demo", "rollouts", "--records", tmp_path / "r.json")
    assert ran.code == 0 and "nowhere: they are the same" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "cure"),
    [
        (["rollouts"], 2, "--model with a model directory, or --records"),
        (["rollouts", "--count", "4"], 2, "--model with a model directory for --count; without it, --records"),
        (["rollouts", "--max-tokens", "4", "--snapshot", "s"], 2, "for --snapshot and --max-tokens; without"),
        (["rollouts", "--records", "r.json", "--max-tokens", "4"], 2, "not with --max-tokens; --model"),
        (["weights"], 2, "thaw demo needs --model with a model directory\n"),
        (["fork", "--records", "r.json"], 2, "are of thaw demo rollouts"),
        (["kv", "--count", "4"], 2, "are of thaw demo rollouts"),
        (["--rank", "4"], 2, "are of thaw demo rollouts"),
        (["rollouts", "--records", "r.json", "--count", "4"], 2, "--model makes another one"),
        (["rollouts", "--records", "r.json", "--snapshot", "s"], 2, "--model makes another one"),
        (["rollouts", "--records", "r.json", "--question", "Why?"], 2, "--model makes another one"),
        (["rollouts", "--records", "r.json", "--rank", "4"], 2, "there are 3 rollouts, none of rank 4"),
        (["rollouts", "--records", "none.json"], 6, "none.json"),
        (["rollouts", "--records", "cut.json"], 3, "make it anew with thaw demo rollouts"),
    ],
)
def test_what_cannot_be_shown(thaw, made, monkeypatch, arguments, code, cure):
    monkeypatch.chdir(made.parent)
    (made.parent / "cut.json").write_bytes(made.read_bytes()[:100])
    ran = thaw("demo", *arguments)
    assert ran.code == code and ran.out == "" and ran.err.startswith("error: ") and cure in ran.err


@pytest.fixture
def no_engine(monkeypatch):
    """Nothing that is refused gets as far as an engine."""
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    monkeypatch.setattr(fresh, "run", lambda *arguments, **options: pytest.fail("an engine was started"))


@pytest.fixture
def script(monkeypatch, capfd):
    """``demos/best_of_n.py`` with arguments: its exit code, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["best_of_n.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RECORDS.parent / "best_of_n.py"), run_name="__main__")
        return SimpleNamespace(code=ended.value.code, **capfd.readouterr()._asdict())

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "cure"),
    [
        (["--rank", "0"], 2, "there are 8 rollouts, none of rank 0"),
        (["--rank", "-1"], 2, "there are 8 rollouts, none of rank -1"),
        (["--rank", "99"], 2, "there are 8 rollouts, none of rank 99"),
        (["--n", "0"], 2, "there can be 1 to 4096 rollouts, not 0"),
        (["--n", "9999"], 2, "there can be 1 to 4096 rollouts, not 9999"),
        (["--seed", "-1"], 2, "-1 cannot be the first"),
        (["--seed", str((1 << 63) - 7)], 2, "below 2^63"),
        (["--max-tokens", "0"], 2, "1 token at least"),
        (["--model", "./none"], 6, "there is no model directory './none'"),
        (["--model", "none"], 6, "there is no model directory 'none'"),
        (["--store", "r.json"], 6, "r.json"),
        (["--store", "r.json/below"], 6, "takes none"),
        (["--store", "open"], 6, "chmod 700"),
        (["--store", "new", "--records", "./new"], 2, "cannot be both"),
        (["--records", "r.json"], 6, "exists; remove it, or give --records another name"),
    ],
)
def test_what_the_script_refuses(script, no_engine, made, monkeypatch, arguments, code, cure):
    monkeypatch.chdir(made.parent)
    Path("open").mkdir()
    Path("open").chmod(0o777)
    ran = script("--model", ".", *arguments)
    assert ran.code == code and ran.out == "" and ran.err.startswith("error: ") and cure in ran.err
    assert not Path("new").exists()


def test_what_cannot_be_kept_is_shown_all_the_same(script, tmp_path, monkeypatch):
    """It took minutes."""
    from thaw_vllm.cli import demo
    from thaw_vllm.weights import checkpoint, provenance

    transformers = pytest.importorskip("transformers")
    answers = rollouts(rollout([1, 2], text="21"), rollout([3], seed=2)).encode()
    told = record.parse(answers, "it") | {"seconds": {"fork": 1.0, "total": 2.0}}
    tokenizer = SimpleNamespace(encode=lambda text, **options: [5, 6])
    full = StorageError("no room")
    monkeypatch.setattr(api, "require_vllm_installed", lambda: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *names, **options: tokenizer)
    monkeypatch.setattr(demo, "introduced", lambda console, what, model, length: {})
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path: None)
    monkeypatch.setattr(provenance, "checkpoint_id", lambda opened: MODEL)
    monkeypatch.setattr(fresh, "run", lambda *arguments, **options: told)
    ran = script("--model", tmp_path, "--records", tmp_path / "r.json")
    assert ran.code == 0 and str(tmp_path / "r.json") in ran.out and len(read(tmp_path / "r.json").rollouts) == 2
    monkeypatch.setattr(record, "write", lambda *arguments: (_ for _ in ()).throw(full))
    ran = script("--model", tmp_path, "--records", tmp_path / "s.json")
    assert ran.code == 6 and "error: no room" in ran.err
    assert "#2, token by token" not in ran.out and "#1, token by token" in ran.out and "s.json" not in ran.out


def test_what_cannot_be_made(thaw, made, no_engine):
    ran = thaw("demo", "rollouts", "--model", made.parent, "--records", made)
    assert ran.code == 6 and "exists; remove it, or give --records another name" in ran.err
    ran = thaw("demo", "rollouts", "--model", made.parent, "--question", "Why?")
    assert ran.code == 2 and "leave --question out" in ran.err
    ran = thaw("demo", "rollouts", "--model", made.parent, "--rank", "9")
    assert ran.code == 2 and "there are 8 rollouts, none of rank 9" in ran.err
    both = made.parent / "both"
    ran = thaw("demo", "rollouts", "--model", made.parent, "--snapshot", both, "--records", both)
    assert ran.code == 2 and "cannot be both" in ran.err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("3 * 7 = 21.", 1), (" The answer is 21", 1), ("21, or 22", 0), ("121", 0), ("", 0), ("twenty-one", 0)],
)
def test_reward(text, wanted):
    assert reward(text) == wanted


def test_a_task_cannot_forge_other_rows(thaw, tmp_path):
    write(tmp_path / "r.json", rollouts(rollout([1]), task={"model": "M of somebody else", "group": "8 rollouts"}))
    rows = thaw("demo", "rollouts", "--records", tmp_path / "r.json").out.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows].count("model") == 1
    assert sum(row.startswith(("task: model ", "task: group ")) for row in rows) == 2


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_record_is_looked_at_without_an_engine(more):
    code = f"""
import sys
from thaw_vllm.cli.main import main
assert main(["demo", "rollouts", "--records", {str(RECORD)!r}, *{more}]) == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]" and len(ran.stdout.splitlines()) > 50


class TestCheckedIn:
    def test_the_record_is_sound_and_small(self):
        found = read(RECORD)
        assert len(found.rollouts) == 8 and RECORD.stat().st_size < 200_000
        files = [path for path in RECORDS.rglob("*") if path.is_file() and "blocks" not in path.parts]
        assert sum(path.stat().st_size for path in files) < 300_000
        assert [one.reward for one in found.rollouts] == [reward(one.text) for one in found.rollouts]
        assert {one.reward for one in found.rollouts} == {0.0, 1.0}

    def test_the_sessions_have_its_tokens(self, kept):
        found, store = read(RECORD), Store(kept)
        assert len(store.listed()[0]) == 9 and not store.listed()[1]
        trunk = store.read(found.session)
        assert trunk.tokens == ids(found.prompt_tokens) and trunk.head.model == found.model
        for one in found.rollouts:
            session = store.read(one.session)
            assert session.tokens == ids([*found.prompt_tokens, *one.tokens])
            assert (session.head.parent, session.head.finished) == (found.session, one.finished)
            assert session.head.sampling == found.sampling | {"seed": one.seed}

    def test_git_for_them(self, thaw, kept):
        """Without blocks they are listed, shown and compared all the same."""
        shown = thaw("demo", "rollouts", "--records", RECORD, "--json").document
        assert len(thaw("log", "--store", kept, "--json").document["sessions"]) == 9
        best, *others = shown["ranking"]
        for one in others:
            ran = thaw("diff", best["session"], one["session"], "--store", kept, "--json")
            assert ran.document["first_difference"] == shown["prompt_tokens"] + one["leaves_best"]["at"]
        assert thaw("show", f"rollout {best['seed']}", "--store", kept).code == 0

    def test_the_documentation_shows_it(self, thaw):
        page = (RECORDS.parents[1] / "docs" / "sessions.md").read_text(encoding="utf-8")
        table = page.partition("best_of_n.json\n```\n\n```\n")[2].partition("```")[0].replace("…\n", "")
        shown = thaw("demo", "rollouts", "--records", RECORD).out.splitlines()
        assert len(table.splitlines()) == 9 and set(table.splitlines()) <= set(shown)
