"""KV blocks frozen in one process and thawed in another, through real engines."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.vllm import forks
from tests.engines.vllm.forks import PARALLEL
from tests.engines.vllm.kv_files import altered, flipped, with_identity, with_layout
from tests.engines.vllm.models import BASE, llama
from tests.engines.vllm.test_engine import freeze

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.errors import MismatchError
from thaw_vllm.format.kv import Group
from thaw_vllm.kv.verify import verify
from thaw_vllm.weights.compress import rewrite
from thaw_vllm.weights.open import open_snapshot

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
SIZE = 32
LONG = [5 + number % 400 for number in range(400)]
FORKED = LONG[:256] + [9 + (number * 7) % 300 for number in range(100)]
OTHER = [3 + (number * 11) % 500 for number in range(200)]
PROMPTS = [LONG, FORKED]
THREE = [*PROMPTS, OTHER]
"""So many blocks that each layer of the smallest model has more than 64 KiB of them."""
ID = "tensors-blake3:" + "ab" * 32
ARGS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512, "block_size": SIZE}


def run_script(name: str, folder: Path, asked: Any, environment: dict[str, str] | None = None, **options: Any) -> Any:
    """What a script of this directory answers, in a process of its own; ``options`` are of ``subprocess.run``."""
    question, answer, log = (folder / file for file in ("asked.json", "answer.json", "log.txt"))
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(asked, default=str))
    with log.open("wb") as stream:
        command = [*forks.command(), str(Path(__file__).with_name(name)), str(question), str(answer)]
        variables = forks.environment(environment)
        subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, check=False, **options)
    assert answer.exists(), log.read_text(errors="replace")[-3000:]
    return json.loads(answer.read_text())


def engine(folder: Path, steps: list[dict[str, Any]], environment: dict[str, str] | None = None, **args: Any) -> Any:
    """The answers of an engine in a fresh process to these steps."""
    return run_script("kv_engine.py", folder, [{"do": "engine"} | ARGS | args, *steps], environment)


def error(answer: Any) -> str:
    assert isinstance(answer, dict) and "error" in answer, answer
    return f"{answer['error']}: {answer['message']}"


def cached(answers: list[Any]) -> list[int]:
    return [answer["cached"] for answer in answers]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Tokens and log-probabilities, to the last bit."""
    return [(a["tokens"], a["logprobs"]) for a in ours] == [(a["tokens"], a["logprobs"]) for a in theirs]


@pytest.fixture(scope="module")
def frozen(checkpoints: Callable, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An engine started from a snapshot, so that it knows its model id, and what it froze and said."""
    folder = tmp_path_factory.mktemp("kv")
    weights, everything = folder / "weights.thaw", folder / "all.thawkv"
    freeze(checkpoints("tied"), weights)
    steps = [
        {"do": "ask", "prompts": PROMPTS},
        {"do": "ask", "prompts": PROMPTS},
        {"do": "ask", "prompts": [OTHER], "salt": "s1"},
        {"do": "ask", "prompts": [OTHER], "salt": "s1"},
        {"do": "info"},
        {"do": "freeze", "path": everything},
        {"do": "freeze", "path": folder / "one.thawkv", "token_ids": FORKED},
        {"do": "freeze", "path": folder / "salted.thawkv", "token_ids": OTHER, "cache_salt": "s1"},
        {"do": "freeze", "path": folder / "none.thawkv", "token_ids": OTHER},
        {"do": "freeze", "path": folder / "none.thawkv", "token_ids": LONG[: SIZE - 1]},
        {"do": "freeze", "path": folder / "none.thawkv", "session": "nobody"},
        {"do": "freeze", "path": folder / "none.thawkv", "model_id": ID},
        {"do": "freeze", "path": everything},
        {"do": "freeze", "path": folder / "no" / "where.thawkv"},
        {"do": "restore", "path": everything},
        {"do": "restore", "path": weights},
        {"do": "abandon", "path": folder / "abandoned.thawkv"},
        {"do": "call", "method": "thaw_report"},
        {"do": "info"},
        {"do": "call", "method": "get_model_inspection"},
        {"do": "info"},
        {"do": "fill", "path": everything, "freeze": ""},
        {"do": "fill", "path": everything, "freeze": "ab" * 32},
    ]
    answers = engine(folder, steps, model=str(checkpoints("tied")), snapshot=str(weights))
    return SimpleNamespace(folder=folder, weights=weights, everything=everything, answers=answers)


class TestFreezing:
    def test_a_call_that_may_change_weights_makes_them_unknown(self, frozen: SimpleNamespace):
        before, after = frozen.answers[18], frozen.answers[20]
        assert before["model"].startswith("tensors-blake3:") and after["model"] is None

    def test_pages_of_another_freeze_than_the_table_are_refused(self, frozen: SimpleNamespace):
        (right,), (wrong,) = frozen.answers[21:23]
        assert right["bytes"] > 0
        assert wrong["error"] == "ReplacedError" and "was replaced while it was being restored" in wrong["message"]

    def test_a_hit_comes_first(self, frozen: SimpleNamespace):
        cold, hit, _, salted, info, *_ = frozen.answers
        assert cached(cold) == [0, 256]
        assert cached(hit) == [384, 352 // SIZE * SIZE]
        assert cached(salted) == [192]
        assert info["cached"] == info["known"] == 12 + 3 + 6

    def test_everything(self, frozen: SimpleNamespace):
        report = frozen.answers[5]
        assert (report["blocks"], report["prefixes"], report["tokens"]) == (21, 3, 384)
        assert report["skipped"] == {}
        assert oct(frozen.everything.stat().st_mode)[-3:] == "600"

    def test_only_what_was_asked_for(self, frozen: SimpleNamespace):
        one, salted = frozen.answers[6:8]
        assert (one["blocks"], one["prefixes"], one["tokens"]) == (11, 1, 352)
        assert (salted["blocks"], salted["tokens"]) == (6, 192)
        whole = pages_by_address(frozen.everything)
        for name in ("one.thawkv", "salted.thawkv"):
            part = pages_by_address(frozen.folder / name)
            assert part.items() <= whole.items()

    def test_refusals(self, frozen: SimpleNamespace):
        unsalted, short, session, model, exists, nowhere = map(error, frozen.answers[8:14])
        assert unsalted.startswith("UsageError: there is nothing to freeze")
        assert short.startswith("UsageError: there is nothing to freeze")
        assert "0 running requests are called 'nobody'" in session
        assert model.startswith("MismatchError: the engine holds the model tensors-blake3:")
        assert exists.startswith("ExistsError") and nowhere.startswith("StorageError")
        assert not (frozen.folder / "none.thawkv").exists()

    def test_a_caller_that_goes_away_leaves_nothing_held(self, frozen: SimpleNamespace):
        meanwhile, later = frozen.answers[16]
        assert meanwhile["free"] < meanwhile["blocks"] - 1
        assert later["free"] == later["blocks"] - 1

    def test_restoring_what_is_there_does_nothing(self, frozen: SimpleNamespace):
        again = frozen.answers[14]
        assert (again["blocks"], again["present"], again["bytes"]) == (0, 21, 0)

    def test_weights_are_no_kv_blocks(self, frozen: SimpleNamespace):
        assert error(frozen.answers[15]).startswith("MismatchError") and "weights" in error(frozen.answers[15])


@pytest.fixture(scope="module")
def bad(frozen: SimpleNamespace) -> dict[str, tuple[Path, str]]:
    """Files that must be refused, and what is said."""
    path, folder = frozen.everything, frozen.folder
    data = path.read_bytes()
    (folder / "truncated.thawkv").write_bytes(data[:-5000])
    (folder / "empty.thawkv").write_bytes(b"")
    with open_snapshot(path) as opened:
        layout = opened.snapshot.header.kv
    region = layout.regions[0]
    other = (dataclasses.replace(region, stride=region.stride[::-1]), *layout.regions[1:])
    windowed = (Group(layout.groups[0].kind, 64, layout.groups[0].layers),)
    changes = {
        "fine-tune": (with_identity(model=ID), "MismatchError: .*holds model"),
        "no-model": (with_identity(model=None), "MismatchError: .*does not say which weights"),
        "config": (with_identity(config="c" * 64), "MismatchError: .*config"),
        "dtype": (with_identity(dtype="float16"), "MismatchError: .*dtype"),
        "quantised": (with_identity(quantization="fp8"), "MismatchError: .*quantization"),
        "architecture": (with_identity(architecture="Other"), "MismatchError: .*architecture"),
        "kv-dtype": (with_layout(cache_dtype="fp8"), "MismatchError: .*element type"),
        "block-size": (with_layout(block_size=16), "MismatchError: .*block size 16"),
        "window": (with_layout(groups=windowed), "MismatchError: .*other groups"),
        "layout": (with_layout(regions=other), "MismatchError: .*attention backend"),
    }
    found = {
        name: (altered(path, folder / f"{name}.thawkv", change), words) for name, (change, words) in changes.items()
    }
    return found | {
        "truncated": (folder / "truncated.thawkv", "CorruptionError: .*truncated"),
        "empty": (folder / "empty.thawkv", "FormatError"),
        "missing": (folder / "missing.thawkv", "StorageError"),
        "page": (flipped(path, folder / "page.thawkv", "pages."), "CorruptionError: .*pages"),
        "table": (flipped(path, folder / "table.thawkv", "blocks.tokens"), "CorruptionError"),
    }


@pytest.fixture(scope="module")
def thawed(frozen: SimpleNamespace, bad: dict[str, tuple[Path, str]], checkpoints: Callable) -> SimpleNamespace:
    """Another process: bad files first, then the good one, and the same compressed."""
    small = frozen.folder / "small.thawkv"
    rewrite(frozen.everything, small)
    assert small.stat().st_size < frozen.everything.stat().st_size
    steps: list[dict[str, Any]] = []
    for path, _ in bad.values():
        steps += [{"do": "restore", "path": path}, {"do": "info"}]
    steps += [
        {"do": "ask", "prompts": [LONG[:100]], "max_tokens": 4},
        {"do": "reset"},
        {"do": "restore", "path": frozen.everything},
        {"do": "ask", "prompts": PROMPTS},
        {"do": "ask", "prompts": [OTHER]},
        {"do": "ask", "prompts": [OTHER], "salt": "s2"},
        {"do": "ask", "prompts": [OTHER], "salt": "s1"},
        {"do": "reset"},
        {"do": "restore", "path": small},
        {"do": "freeze", "path": frozen.folder / "again.thawkv"},
    ]
    answers = engine(frozen.folder, steps, model=str(checkpoints("tied")), snapshot=str(frozen.weights))
    count = 2 * len(bad)
    return SimpleNamespace(bad=answers[:count], good=answers[count:])


class TestRestoring:
    def test_bad_files_leave_the_cache_as_it_was(self, thawed: SimpleNamespace, bad: dict[str, tuple[Path, str]]):
        refusals, infos = thawed.bad[::2], thawed.bad[1::2]
        for (name, (_, words)), refusal, info in zip(bad.items(), refusals, infos, strict=True):
            assert re.match(words, error(refusal)), (name, refusal)
            assert info["cached"] == 0 and info["free"] == info["blocks"] - 1, name

    def test_the_engine_still_serves(self, thawed: SimpleNamespace):
        assert len(thawed.good[0][0]["tokens"]) == 4

    def test_every_full_block_is_cached_and_answers_are_those_of_a_hit(
        self, frozen: SimpleNamespace, thawed: SimpleNamespace
    ):
        _, _, report, hit, unsalted, foreign, salted, *_ = thawed.good
        assert (report["blocks"], report["present"], report["left_out"], report["tokens"]) == (21, 0, 0, 384)
        assert cached(hit) == [384, 352]
        assert same(hit, frozen.answers[1])
        assert cached(unsalted) == cached(foreign) == [0]
        assert cached(salted) == [192]
        assert same(salted, frozen.answers[3])

    def test_every_block_is_what_it_was(self, frozen: SimpleNamespace, thawed: SimpleNamespace):
        report = thawed.good[-1]
        assert report["blocks"] == 21
        assert pages_by_address(frozen.folder / "again.thawkv") == pages_by_address(frozen.everything)


def test_another_model_id_is_asked_for(checkpoints: Callable, frozen: SimpleNamespace, tmp_path: Path):
    """By vLLM's default loader nobody knows which weights it loaded; and with little room what fits is thawed."""
    with open_snapshot(frozen.everything) as opened:
        model = opened.snapshot.header.identity.model
    steps = [
        {"do": "restore", "path": frozen.everything},
        {"do": "restore", "path": frozen.everything, "model_id": ID},
        {"do": "ask", "prompts": [OTHER[:160]], "max_tokens": 2},
        {"do": "restore", "path": frozen.everything, "model_id": model},
        {"do": "ask", "prompts": [LONG, OTHER[:160]]},
        {"do": "reset"},
        {"do": "ask", "prompts": [OTHER[:160]], "max_tokens": 2},
        {"do": "restore", "path": frozen.everything, "model_id": model, "evict": True},
        {"do": "info", "model_id": model},
    ]
    answers = engine(tmp_path, steps, model=str(checkpoints("tied")), num_gpu_blocks_override=17)
    assert error(answers[0]).startswith("UsageError") and "thaw id MODEL" in error(answers[0])
    assert error(answers[1]).startswith("MismatchError") and "holds model" in error(answers[1])
    # 16 blocks besides the null block: 5 are cached, and of the file's 21 the longest prefix comes first.
    little = answers[3]
    assert little["blocks"] == 11 and little["left_out"] == 10 and little["tokens"] == 352
    assert cached(answers[4])[0] == 352
    evicting = answers[7]
    assert evicting["blocks"] == 16 and evicting["tokens"] == 384
    assert answers[8]["cached"] == 16


@pytest.mark.parametrize("kind", ["sliding-window", "latent-attention"])
def test_other_kinds_of_attention(kind: str, checkpoints: Callable, tmp_path: Path):
    path, again = tmp_path / "x.thawkv", tmp_path / "again.thawkv"
    args = {"model": str(checkpoints(kind)), "skip_tokenizer_init": True}
    known = {"model_id": ID}
    steps = [
        {"do": "ask", "prompts": PROMPTS},
        {"do": "ask", "prompts": PROMPTS},
        {"do": "freeze", "path": path, **known},
    ]
    first = engine(tmp_path, steps, **args)
    if kind == "latent-attention" and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        assert "does not cache prefixes" in error(first[2])  # vLLM turns it off on processors without these
        assert cached(first[1]) == [0, 0] and not path.exists()
        return
    steps = [
        {"do": "restore", "path": path, **known},
        {"do": "freeze", "path": again, **known},
        {"do": "ask", "prompts": PROMPTS},
    ]
    second = engine(tmp_path, steps, **args)
    assert first[2]["tokens"] == second[0]["tokens"] == 384
    assert pages_by_address(again) == pages_by_address(path)
    assert cached(second[2]) == cached(first[1]) == [384, 352]
    assert same(second[2], first[1])


@pytest.mark.soak
def test_random_interleavings(soak: Callable, checkpoints: Callable, tmp_path: Path):
    seeds = [case.random.randrange(1 << 30) for case in soak(small=4, full=200)]
    if not seeds:
        pytest.skip("all of them were run before this run went on")
    prompts = [LONG[:200], LONG[:100] + OTHER[:80], OTHER[:150], OTHER[:64] + LONG[:64], LONG[64:130]]
    step = {"do": "random", "folder": tmp_path, "prompts": prompts, "seeds": seeds, "length": 12, "model_id": ID}
    (counts,) = engine(
        tmp_path,
        [step],
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        model=str(checkpoints("fp32")),
        dtype="float32",
        max_model_len=384,
        num_gpu_blocks_override=16,
    )
    assert counts["restore"] and counts["freeze"] and counts["ask"], counts


@pytest.fixture(scope="module")
def made(checkpoints: Callable, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("kv-ranks")
    weights, path = folder / "weights.thaw", folder / "x.thawkv"
    freeze(checkpoints("tied"), weights, tensor_parallel_size=2)
    steps = [
        {"do": "ask", "prompts": PROMPTS},
        {"do": "ask", "prompts": PROMPTS},
        {"do": "freeze", "path": path},
        {"do": "freeze", "path": folder / "second.thawkv", "token_ids": LONG},
    ]
    args = {"model": str(checkpoints("tied")), "snapshot": str(weights), "tensor_parallel_size": 2}
    answers = engine(folder, steps, PARALLEL, **args)
    return SimpleNamespace(folder=folder, path=path, answers=answers, args=args, weights=weights)


class TestRanks:
    def test_a_file_for_each(self, made: SimpleNamespace):
        files = [Path(file) for file in made.answers[2]["files"]]
        assert len(files) == 2 and files[0] == made.path
        assert (made.folder / "x.rank1.thawkv").is_symlink()
        assert pages_by_address(made.path) != pages_by_address(made.path, rank=1)

    def test_restored_in_another_process(self, made: SimpleNamespace):
        swapped = made.folder / "swapped.thawkv"
        swapped.write_bytes(made.path.read_bytes())
        (one,) = [file for file in made.answers[2]["files"] if "rank1" in file]
        (other,) = [file for file in made.answers[3]["files"] if "rank1" in file]
        kept = Path(one).read_bytes()
        steps: list[dict[str, Any]] = [{"do": "restore", "path": swapped}, {"do": "info"}]
        Path(one).write_bytes(Path(other).read_bytes())
        try:
            refused = engine(made.folder, steps, PARALLEL, **made.args)
        finally:
            Path(one).write_bytes(kept)
        assert error(refused[0]).startswith("CorruptionError") and "rank 1" in error(refused[0])
        assert refused[1]["cached"] == 0
        again = made.folder / "again.thawkv"
        steps = [{"do": "freeze", "path": again}, {"do": "ask", "prompts": PROMPTS}]
        answers = engine(made.folder, steps, PARALLEL, **made.args, kv_snapshot=str(made.path))
        assert cached(answers[1]) == [384, 352]
        assert same(answers[1], made.answers[1])
        for rank in (0, 1):
            assert pages_by_address(again, rank) == pages_by_address(made.path, rank)

    def test_other_sizes_are_refused_before_an_engine_starts(self, made: SimpleNamespace, frozen: SimpleNamespace):
        from thaw_vllm import load

        other = altered(frozen.everything, made.folder / "other.thawkv", with_identity(model=ID))
        with pytest.raises(MismatchError, match="was made with the weights"):
            load(None, frozen.weights, kv_snapshot=other)
        with pytest.raises(MismatchError, match="holds weights, not KV blocks"):
            load(None, frozen.weights, kv_snapshot=frozen.weights)


@pytest.fixture(scope="module")
def frozen_once(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One KV head and two ranks, each of which has all of it."""
    folder = tmp_path_factory.mktemp("kv-once")
    args = {"model": str(llama(folder / "model", kv_heads=1)), "tensor_parallel_size": 2}
    path, other = folder / "x.thawkv", folder / "other.thawkv"
    steps = [
        {"do": "ask", "prompts": THREE},
        {"do": "ask", "prompts": THREE},
        {"do": "freeze", "path": path, "model_id": ID},
        {"do": "freeze", "path": other, "model_id": ID, "token_ids": LONG},
    ]
    answers = engine(folder, steps, PARALLEL, **args)
    return SimpleNamespace(folder=folder, path=path, other=other, args=args, answers=answers)


class TestStoredOnce:
    def test_rank_1_has_no_page(self, frozen_once: SimpleNamespace):
        report = frozen_once.answers[2]
        own, left = (Path(file).stat().st_size for file in report["files"])
        pages = report["blocks"] * SIZE * 32 * 2 * 2 * BASE["num_hidden_layers"]  # keys and values in bf16
        assert report["kept"] == pages
        assert own > pages and left < 32_768
        assert verify(frozen_once.path, content=True).bytes == own + left
        assert pages_by_address(frozen_once.path) == pages_by_address(frozen_once.path, rank=1)

    def test_restored_by_another_engine(self, frozen_once: SimpleNamespace):
        made, broken = frozen_once, frozen_once.folder / "broken"
        broken.mkdir()
        (member,) = [Path(file) for file in made.answers[2]["files"] if "rank1" in file]
        (broken / member.name).write_bytes(member.read_bytes())
        known = {"model_id": ID}
        names = {"swapped": made.other.read_bytes(), "truncated": made.path.read_bytes()[:-4096]}
        for name, data in names.items():
            (broken / f"{name}.thawkv").write_bytes(data)
        flipped(made.path, broken / "flipped.thawkv", "pages.")
        steps: list[dict[str, Any]] = [{"do": "restore", "path": broken / f"{n}.thawkv", **known} for n in names]
        steps += [{"do": "restore", "path": broken / name, **known} for name in ("flipped.thawkv", "missing.thawkv")]
        steps += [{"do": "info", **known}, {"do": "restore", "path": made.path, **known}]
        steps += [{"do": "freeze", "path": made.folder / "again.thawkv", **known}, {"do": "ask", "prompts": THREE}]
        *refused, info, report, again, answers = engine(made.folder, steps, PARALLEL, **made.args)
        for answer, words in zip(refused, ("missing", "truncated", "is damaged", "does not exist"), strict=True):
            assert words in error(answer)
        assert info["cached"] == 0 and info["free"] == info["blocks"] - 1
        assert report["tokens"] == 384 and report["blocks"] == made.answers[2]["blocks"]
        assert cached(answers) == [384, 352, 192]
        assert same(answers, made.answers[1])
        assert again["kept"] == made.answers[2]["kept"]
        for rank in (0, 1):
            assert pages_by_address(made.folder / "again.thawkv", rank) == pages_by_address(made.path, rank)


def test_demo(checkpoints: Callable, tmp_path: Path):
    """The command's two processes, with a prompt of token ids in the place of its text."""
    kv = {"path": str(tmp_path / "x.thawkv"), "model_id": ID}

    def run(freezing: bool) -> Any:
        return forks.run(
            "kv",
            model=str(checkpoints("tied")),
            snapshot=None,
            engine_args=ARGS,
            questions=[LONG[::-1]],
            max_tokens=8,
            kv=kv | {"freeze": freezing},
        )

    first, second = run(True), run(False)
    assert first["cached"] == {"cold": 0, "cached": 384} and second["cached"] == {"thawed": 384}
    assert first["outputs"] == second["outputs"]


def told(answer: dict[str, Any]) -> str:
    """What freezes cost the requests beside them, in words."""
    alone, beside = answer["gaps"]
    return (
        f"{len(answer['reports'])} freezes; p99 between two tokens: {alone * 1e3:.1f} ms, {beside * 1e3:.1f} ms while "
        f"freezing, {beside / alone:.2f} times"
    )


@pytest.mark.soak
def test_what_a_freeze_costs_a_real_model(soak: Callable, capsys: pytest.CaptureFixture, tmp_path: Path, smollm2: Path):
    """Steps take as long as they do for users, so that the gaps say something."""
    ran = False
    for case in soak(small=0, full=1):
        ran = True
        prompts = [[case.random.randrange(5, 40000) for _ in range(256)] for _ in range(32)]
        engine = {"model": str(smollm2), "dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        engine |= {"block_size": 32, "kv_cache_memory_bytes": 2 << 30}
        asked = {"engine": engine, "prompts": prompts, "max_tokens": 64, "path": tmp_path / "x.thawkv", "model_id": ID}
        answer = run_script("kv_load.py", tmp_path, asked)
        with capsys.disabled():
            print(f"\n{told(answer)}")
        assert answer["reports"] and answer["beside"] == answer["alone"]
    if not ran:
        pytest.skip("it takes minutes: make soak")


def test_freezing_while_requests_stream(checkpoints: Callable, capsys: pytest.CaptureFixture, tmp_path: Path):
    """No token changes, and the last file is whole. The gaps are printed: on two cores they prove nothing."""
    prompts = [[3 + (number * (7 + k)) % 490 for number in range(64 + 8 * (k % 8))] for k in range(32)]
    path = tmp_path / "x.thawkv"
    asked = {
        "engine": ARGS | {"model": str(checkpoints("fp32")), "dtype": "float32"},
        "prompts": prompts,
        "max_tokens": 96,
        "path": path,
        "model_id": ID,
    }
    answer = run_script("kv_load.py", tmp_path, asked)
    assert answer["beside"] == answer["alone"]
    assert answer["reports"] and all(report["blocks"] for report in answer["reports"])
    with capsys.disabled():
        print(f"\n{told(answer)}")
    steps = [
        {"do": "restore", "path": path, "model_id": ID},
        {"do": "freeze", "path": tmp_path / "again.thawkv", "model_id": ID},
    ]
    restored, _ = engine(tmp_path, steps, model=str(checkpoints("fp32")), dtype="float32")
    assert restored["blocks"] == answer["reports"][-1]["blocks"]
    assert pages_by_address(tmp_path / "again.thawkv") == pages_by_address(path)
