"""Sessions of real engines: kept in one process, taken up again in another.

Three things are proved apart. Restored blocks are, byte for byte, those that were kept. A resumed run is, bit for bit,
the one that the engine which never died makes of the same session. Against the run that was never interrupted, whose
last tokens were computed one by one and not as a prompt, tokens are equal up to the first near-tie.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines.vllm import forks
from tests.engines.vllm.forks import PARALLEL
from tests.engines.vllm.models import KINDS, with_tokenizer
from tests.engines.vllm.session_cuts import KINDS as CUTS
from tests.engines.vllm.session_cuts import apart, cuts, prompts
from tests.engines.vllm.test_engine import freeze
from tests.engines.vllm.test_kv import ARGS, ID, LONG, OTHER, SIZE, engine, error, same
from tests.soak import cases

from thaw_vllm.bench.kv_pages import pages_by_address
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.diff import size
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store

pytestmark = pytest.mark.vllm

DIVERSE = {"temperature": 1.0, "seed": 11, "max_tokens": 8, "logprobs": 2, "ignore_eos": True}
GREEDY = {"temperature": 0.0, "max_tokens": 24, "logprobs": 2}


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def kept(checkpoints: Callable, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An engine's sessions: an answer, the same with a salt, token ids, and what is refused."""
    folder = tmp_path_factory.mktemp("sessions")
    weights, store = folder / "weights.thaw", str(folder / "store")
    freeze(checkpoints("tied"), weights)
    own, forks, names = {"store": store}, {"store": str(folder / "forks")}, ["f0", "f1", "f2"]
    seeded = GREEDY | {"seed": 5, "temperature": 1.0, "n": 2}
    steps: list[dict[str, Any]] = [
        {"do": "checkpoint", "tokens": LONG, "sampling": GREEDY, "labels": ["trunk"], "store": store},
        {"do": "checkpoint", "tokens": LONG, "labels": ["again"], "parent": "trunk", "store": store},
        {"do": "checkpoint", "tokens": OTHER, "sampling": GREEDY, "cache_salt": "s", "labels": ["salted"], **own},
        {"do": "checkpoint", "tokens": [5, 6, 7], "labels": ["short"], **own},
        {"do": "checkpoint", "tokens": [1, 2, 3], "sampling": seeded, "index": 1, "labels": ["seeded"], **own},
        {"do": "checkpoint", "tokens": LONG, "model_id": ID, "store": store},
        {"do": "checkpoint", "tokens": LONG, "parent": "nobody", "store": store},
        {"do": "checkpoint", "tokens": [1, 2, 3], "sampling": GREEDY, "index": 1, "store": store},
        {"do": "freeze", "path": folder / "before.thawkv"},
        {"do": "fork", "tokens": OTHER, "n": 3, "sampling": DIVERSE, "keep": True, "labels": names, **forks},
        {"do": "fork", "session": "trunk", "n": 2, "sampling": GREEDY, "append": [[5, 6, 7], [8, 9]], **own},
        {"do": "fork", "tokens": OTHER, "n": 2, "sampling": GREEDY},
        {"do": "fork", "tokens": OTHER, "n": 2, "sampling": DIVERSE, "append": [[5]]},
        {"do": "fork", "tokens": OTHER, "n": 4, "sampling": DIVERSE | {"max_tokens": 200}, "leave": True},
        {"do": "ask", "prompts": [OTHER], "max_tokens": 4},
        {"do": "info"},
    ]
    answers = engine(folder, steps, model=str(checkpoints("tied")), snapshot=str(weights))
    return SimpleNamespace(folder=folder, weights=weights, store=Store(store), answers=answers)


class TestKept:
    def test_what_was_kept(self, kept: SimpleNamespace):
        trunk, again, salted, short, *_ = kept.answers
        assert (trunk["tokens"], trunk["blocks"], trunk["added"]) == (424, 423 // SIZE, 423 // SIZE)
        assert (again["blocks"], again["added"], again["bytes"]) == (400 // SIZE, 0, 0)
        assert (salted["blocks"], salted["added"]) == (223 // SIZE, 223 // SIZE)  # the last token was not computed
        assert (short["tokens"], short["blocks"], short["added"]) == (3, 0, 0)
        assert fsck(kept.store).sound and fsck(kept.store).blocks == 423 // SIZE + 223 // SIZE

    def test_the_records(self, kept: SimpleNamespace):
        heads = {one.head.labels[0]: one.head for one in kept.store.listed()[0]}
        trunk, again = heads["trunk"], heads["again"]
        assert (trunk.prompt, trunk.count, trunk.finished, trunk.parent) == (400, 424, "length", None)
        assert trunk.sampling == {"temperature": 0.0, "max_tokens": 24, "logprobs": 2}
        assert (again.fork, again.prompt, again.sampling) == (400, 400, None)
        assert kept.store.find("trunk") == again.parent
        assert heads["salted"].salt == "s" and heads["seeded"].sampling["seed"] == 6  # of the second of two

    def test_blocks_are_the_engines(self, kept: SimpleNamespace):
        """Of the store's own files, against a file of the whole cache."""
        import hashlib

        from thaw_vllm.kv.table import addresses, root
        from thaw_vllm.sessions import blocks

        frozen = pages_by_address(kept.folder / "before.thawkv")
        for label in ("trunk", "salted"):
            session = kept.store.read(kept.store.find(label))
            (context,) = kept.store.contexts(session.head)
            names = [name for _, name in kept.store.named(session, [context])]
            chain = _chain(context, session)
            for name, prefix in zip(names, addresses(chain, root(context.identity, context.layout)), strict=True):
                data, at = memoryview(bytearray(context.page)), 0
                blocks.read(kept.store.blocks, name, data)
                for region in context.layout.regions:
                    page = hashlib.sha256(data[at : at + region.page]).digest()
                    assert page == frozen[prefix, 0, "pages." + region.name]
                    at += region.page

    def test_refusals(self, kept: SimpleNamespace):
        model, parent, index = map(error, kept.answers[5:8])
        assert model.startswith("MismatchError: the engine holds the model")
        assert "there is no session 'nobody'" in parent and "none of index 1" in index

    def test_a_fork(self, kept: SimpleNamespace):
        """Different continuations of one beginning, each a session that branches off its."""
        branches = kept.answers[9]
        assert len({tuple(one["answer"]["tokens"]) for one in branches}) == 3
        assert [one["answer"]["cached"] for one in branches] == [192] * 3
        store = Store(kept.folder / "forks")
        heads = {one.id: one.head for one in store.listed()[0]}
        trunk = heads[branches[0]["parent"]]
        assert (trunk.count, trunk.parent, len(heads)) == (200, None, 4)
        for number, one in enumerate(branches):
            head = heads[one["session"]]
            assert (head.parent, head.fork, head.prompt, head.count) == (one["parent"], 200, 200, 208)
            assert head.labels == (f"f{number}",) and head.sampling["seed"] == 11 + number
            assert store.read(one["session"]).tokens[200:].tolist() == one["answer"]["tokens"]

    def test_a_fork_of_a_session_with_other_hypotheses(self, kept: SimpleNamespace):
        one, other = kept.answers[10]
        assert one["parent"] == other["parent"] == kept.store.find("trunk") and one["session"] is None
        assert one["answer"]["cached"] == other["answer"]["cached"] == 416
        assert one["answer"]["tokens"] != other["answer"]["tokens"]

    def test_forks_that_are_refused(self, kept: SimpleNamespace):
        same, append = map(error, kept.answers[11:13])
        assert "are the same" in same and "append has 1 entries for 2" in append

    def test_a_fork_that_is_left(self, kept: SimpleNamespace):
        assert len(kept.answers[13]) == 1 and len(kept.answers[14][0]["tokens"]) == 4

    def test_nothing_is_held(self, kept: SimpleNamespace):
        assert kept.answers[-1]["free"] == kept.answers[-1]["blocks"] - 1


def _chain(context: Any, session: Any) -> Any:
    from thaw_vllm.kv.table import NONE, Block, Table

    tokens, salts = session.tokens.tolist(), [session.head.salt, *[None] * session.head.blocks]
    blocks = tuple(
        Block(n - 1 if n else NONE, tuple(tokens[n * SIZE : (n + 1) * SIZE]), (n,), salt=salts[n])
        for n in range(session.head.blocks)
    )
    return Table(context.layout.block_size, 1, blocks)


@pytest.fixture(scope="module")
def resumed(kept: SimpleNamespace, checkpoints: Callable) -> SimpleNamespace:
    """Another process: bad stores first, then every session."""
    store = kept.store
    trunk = store.find("trunk")
    for label, at in (("cut", 411), ("early", 40), ("bad", 424), ("holed", 424), ("alien", 424)):
        branch(store, trunk, at, labels=[label])
    branch(store, "seeded", -10, labels=["seeded-cut"])
    path = str(store.directory)
    forks, beginning = str(kept.folder / "forks"), kept.answers[9][0]["parent"]
    session = store.read(trunk)
    names = [name.path(store.blocks) for _, name in store.names(session)]
    damaged = Store(kept.folder / "damaged", create=True)
    holed = Store(kept.folder / "holed", create=True)
    from thaw_vllm.sessions.archive import bring, export

    export(store, trunk, kept.folder / "trunk.thawsession")
    for other in (damaged, holed):
        bring(other, kept.folder / "trunk.thawsession")
    flipped(damaged.blocks / names[3].relative_to(store.blocks))
    (holed.blocks / names[3].relative_to(store.blocks)).unlink()
    alien = _alien(kept)
    more = {"sampling": GREEDY}
    steps: list[dict[str, Any]] = [
        {"do": "resume", "session": "trunk", "store": str(damaged.directory), **more},
        {"do": "resume", "session": "trunk", "store": str(alien), **more},
        {"do": "resume", "session": "nobody", "store": path},
        {"do": "resume", "session": "trunk", "store": path},
        {"do": "resume", "session": "again", "store": path},
        {"do": "resume", "session": "seeded-cut", "store": path, "exact": True},
        {"do": "info"},
        {"do": "resume", "session": "trunk", "store": str(holed.directory), **more},
        {"do": "reset"},
        {"do": "resume", "session": "trunk", "store": path, "only": True, **more},
        {"do": "resume", "session": "salted", "store": path, "only": True, **more},
        {"do": "freeze", "path": kept.folder / "after.thawkv"},
        {"do": "resume", "session": "cut", "store": path, "exact": True},
        {"do": "resume", "session": "trunk", "store": path, "append": OTHER[:50]},
        {"do": "resume", "session": "early", "store": path},
        {"do": "resume", "session": "seeded-cut", "store": path},
        {"do": "ask", "prompts": [LONG], "max_tokens": 4},
        {"do": "fork", "session": beginning, "n": 3, "sampling": DIVERSE, "store": forks},
        {"do": "info"},
    ]
    answers = engine(kept.folder, steps, model=str(checkpoints("tied")), snapshot=str(kept.weights))
    return SimpleNamespace(bad=answers[:8], good=answers[9:])


def _alien(kept: SimpleNamespace) -> Path:
    """A store with the trunk as another model would have made it."""
    import dataclasses

    from thaw_vllm.sessions.context import Context
    from thaw_vllm.sessions.record import Session

    store = Store(kept.folder / "alien", create=True)
    session = kept.store.read(kept.store.find("trunk"))
    (context,) = kept.store.contexts(session.head)
    other = Context(dataclasses.replace(context.identity, model=ID), context.layout)
    head = dataclasses.replace(session.head, model=ID, contexts=(other.id,))
    with store.use():
        store.publish(Session(head, session.tokens), [other])
    return store.directory


class TestResumed:
    def test_bad_stores_leave_the_cache_as_it_was(self, resumed: SimpleNamespace):
        damaged, alien, nobody, finished, unknown, inexact, info, _ = resumed.bad
        assert error(damaged).startswith("CorruptionError") and "thaw fsck --repair" in error(damaged)
        assert error(alien).startswith("MismatchError") and "holds model" in error(alien)
        assert "there is no session 'nobody'" in error(nobody)
        assert "is finished (length)" in error(finished) and "sampling_params" in error(finished)
        assert "not known how this session was sampled" in error(unknown)
        assert error(inexact).startswith("UnsupportedError") and "exact by seed" in error(inexact)
        assert info["cached"] == 0 and info["free"] == info["blocks"] - 1

    def test_a_session_that_lacks_a_block_goes_on_from_the_one_before(self, resumed: SimpleNamespace):
        holed = resumed.bad[7]
        assert (holed["blocks"], holed["lost"], holed["cached"]) == (3, 1, 3 * SIZE)
        assert holed["answer"]["cached"] == 3 * SIZE and len(holed["answer"]["tokens"]) == 24

    def test_everything_comes_back(self, kept: SimpleNamespace, resumed: SimpleNamespace):
        trunk, salted = resumed.good[:2]
        assert (trunk["blocks"], trunk["present"], trunk["left_out"], trunk["lost"]) == (13, 0, 0, 0)
        assert (trunk["cached"], salted["blocks"], salted["cached"]) == (416, 6, 192)
        before, after = (pages_by_address(kept.folder / f"{name}.thawkv") for name in ("before", "after"))
        assert after.items() <= before.items() and len(after) == 19 * len({name[2] for name in after})

    def test_it_goes_on_as_it_would_have(self, kept: SimpleNamespace, resumed: SimpleNamespace):
        whole, cut = kept.answers[0]["answer"], resumed.good[3]
        assert cut["inexact"] == [] and cut["answer"]["cached"] == 384 and cut["tokens"] == 411
        assert apart(whole, cut["answer"], 11) is None

    def test_tokens_may_be_appended(self, resumed: SimpleNamespace):
        more = resumed.good[4]
        assert more["tokens"] == 474 and more["answer"]["cached"] == 416 and len(more["answer"]["tokens"]) == 24

    def test_a_branch_of_its_prompt_has_all_of_its_answer_before_it(self, resumed: SimpleNamespace):
        early = resumed.good[5]
        assert early["tokens"] == 40 and len(early["answer"]["tokens"]) == 24

    def test_what_is_not_exact_is_named(self, resumed: SimpleNamespace):
        seeded = resumed.good[6]
        assert seeded["inexact"] == ["seed"] and len(seeded["answer"]["tokens"]) == 10

    def test_a_fork_in_another_process_gives_the_same_branches(self, kept: SimpleNamespace, resumed: SimpleNamespace):
        forked = resumed.good[-2]
        assert same([one["answer"] for one in forked], [one["answer"] for one in kept.answers[9]])

    def test_nothing_is_held(self, resumed: SimpleNamespace):
        assert resumed.good[-1]["free"] == resumed.good[-1]["blocks"] - 1


def test_a_stop_string_that_began_before_the_cut(tmp_path: Path):
    """And what this runner, vLLM's V1, does not go on with exactly is refused."""
    model = with_tokenizer(KINDS["untied"](tmp_path / "model"))
    rng = random.Random(7)
    kinds = {"greedy": {"temperature": 0.0}, "stop": {"temperature": 0.0}, "seeded": CUTS["seeded"]}
    at = {"greedy": [1, 9], "stop": [2, 5, 11], "seeded": [4]}
    found = cuts(tmp_path, prompts(rng, 70, 500, 40), kinds, at, 16, model=str(model))
    assert found["cuts"] == 6 and not found["v2"]
    ((name, what, refused),) = found["wrong"]
    assert (name, what) == ("seeded 4", "not exact") and "exact by seed" in error(refused)


@pytest.mark.soak
def test_a_real_model_is_cut_anywhere(soak: Callable, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """By the three proofs; the largest difference of log-probabilities to the uninterrupted run is printed."""
    weights = tmp_path / "weights.thaw"
    for case in soak(small=1, full=5):
        if not weights.exists():
            freeze(smollm2, weights)
        folder = tmp_path / str(case.number)
        store = Store(folder / "store", create=True)
        path = str(store.directory)
        prompt = [case.random.randrange(5, 40000) for _ in range(case.random.randrange(150, 260))]
        count = 160 if cases.FULL else 48
        sampling = {"temperature": 0.0, "max_tokens": count, "logprobs": 2, "ignore_eos": True}
        made = {"do": "checkpoint", "tokens": prompt, "sampling": sampling, "labels": ["trunk"], "store": path}
        cuts = sorted(case.random.sample(range(1, count), 10 if cases.FULL else 3))
        branches = [
            {"do": "branch", "session": "trunk", "at": len(prompt) + cut, "labels": [f"cut{cut}"], "store": path}
            for cut in cuts
        ]
        goes_on = [{"do": "resume", "session": f"cut{cut}", "store": path} for cut in cuts]
        frozen = {"do": "freeze", "path": folder / "before.thawkv"}
        args = {"model": str(smollm2), "snapshot": str(weights), "max_model_len": 1024}
        first = engine(folder, [made, frozen, *branches, *goes_on], **args)
        steps: list[dict[str, Any]] = []
        for cut in cuts:
            after = {"do": "freeze", "path": folder / f"after{cut}.thawkv"}
            only = {"do": "resume", "session": f"cut{cut}", "store": path, "only": True}
            steps += [{"do": "reset"}, only, after, goes_on[cuts.index(cut)]]
        second = engine(folder, steps, **args)
        whole, before = first[0]["answer"], pages_by_address(folder / "before.thawkv")
        furthest, equal = 0.0, 0
        for number, cut in enumerate(cuts):
            living, (reset, back, _, anew) = first[2 + len(cuts) + number], second[4 * number : 4 * number + 4]
            assert reset is True, cut
            kept = (len(prompt) + cut) // SIZE
            used = (len(prompt) + cut - 1) // SIZE * SIZE  # the last token is always computed, and with it its block
            assert (back["blocks"], back["lost"], anew["answer"]["cached"]) == (kept, 0, used), cut
            restored = pages_by_address(folder / f"after{cut}.thawkv")
            changed = {name for name, digest in restored.items() if before.get(name) != digest}
            assert not changed, (cut, len(changed), len(changed - before.keys()), len(restored), kept)
            assert len(restored) == kept * len({name[2] for name in restored})
            assert same([living["answer"]], [anew["answer"]]), cut
            assert apart(whole, anew["answer"], cut) is None, cut
            equal += anew["answer"]["tokens"] == whole["tokens"][cut:]
            for ours, theirs in zip(anew["answer"]["logprobs"], whole["logprobs"][cut:], strict=True):
                if [token for token, _ in ours] != [token for token, _ in theirs]:
                    break
                furthest = max(furthest, *(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True)))
        with capsys.disabled():
            print(f"\n{equal} of {len(cuts)} cuts: equal tokens; log-probabilities differ by {furthest:.3f} at most")
        assert fsck(store).sound


@pytest.mark.soak
def test_branches_cost_their_own_tails(soak: Callable, smollm2: Path, tmp_path: Path):
    """Many continuations of one trunk, each kept; in another process each goes on as it does alone."""
    for case in soak(small=1, full=1):
        count, length, tail = (64, 2000, 40) if cases.FULL else (6, 300, 40)
        weights = tmp_path / "weights.thaw"
        freeze(smollm2, weights)
        store = Store(tmp_path / "store", create=True)
        path = str(store.directory)
        trunk = [case.random.randrange(5, 40000) for _ in range(length)]
        tails = [[case.random.randrange(5, 40000) for _ in range(tail)] for _ in range(count)]
        sampling = GREEDY | {"max_tokens": 8, "ignore_eos": True}
        args = {"model": str(smollm2), "snapshot": str(weights), "max_model_len": 4096}
        steps = [{"do": "ask", "prompts": [trunk], "max_tokens": 1}]
        steps += [{"do": "checkpoint", "tokens": trunk, "labels": ["trunk"], "store": path}]
        for number, own in enumerate(tails):
            about = {"labels": [f"b{number}"], "parent": "trunk", "store": path}
            steps += [
                {"do": "ask", "prompts": [trunk + own], "max_tokens": 1},
                {"do": "checkpoint", "tokens": trunk + own, **about},
                {"do": "resume", "session": f"b{number}", "store": path, "sampling": sampling},
            ]
        first = engine(tmp_path, steps, **args)
        alone = first[4::3]
        goes_on = [{"do": "resume", "session": f"b{n}", "store": path, "sampling": sampling} for n in range(count)]
        anew = engine(tmp_path, goes_on, **args)
        for ours, theirs in zip(anew, alone, strict=True):
            assert same([ours["answer"]], [theirs["answer"]]) and ours["lost"] == 0
        page = size(store, store.read(store.find("trunk")))[1] // (length // SIZE)
        whole = (length // SIZE + count * ((length + tail) // SIZE - length // SIZE)) * page
        used = sum(file.stat().st_size for file in store.directory.rglob("*") if file.is_file())
        assert used <= 1.1 * whole
        heads = [one.head for one in store.listed()[0] if one.head.parent is not None]
        assert [head.fork for head in heads] == [length] * count and fsck(store).sound


def test_demo(checkpoints: Callable, tmp_path: Path):
    """The command's two processes, with token ids in the place of its texts."""
    asked = {"context": LONG[:300], "hypotheses": [[5, 6], [7, 8]], "follow_up": [9, 10], "max_tokens": 8}
    asked |= {"store": str(tmp_path / "store"), "model_id": ID}

    def run(**more: Any) -> Any:
        model = str(checkpoints("tied"))
        return forks.run("fork", model=model, snapshot=None, engine_args=ARGS, fork=asked | more)

    first = run()
    second = run(session=first["chosen"])
    assert second["outputs"] == first["outputs"] and second["cached"] == 288
    store = Store(asked["store"])
    heads = {one.id: one.head for one in store.listed()[0]}
    assert {one["session"] for one in first["branches"]} | {first["trunk"], first["rewound"]} == set(heads)
    assert [heads[one["session"]].fork for one in first["branches"]] == [300, 300]
    assert (heads[first["rewound"]].parent, heads[first["rewound"]].fork) == (first["chosen"], 150)
    steps = {"context", "checkpoint", "fork", "alone", "rewind"}
    assert steps <= first["seconds"].keys() and {"checkout", "answer"} <= second["seconds"].keys()


def test_a_window_and_two_ranks(checkpoints: Callable, tmp_path: Path):
    """Of layers with a window the end is kept; every rank has blocks of its own."""
    for name, kind, options, environment in (
        ("window", "sliding-window", {"skip_tokenizer_init": True}, None),
        ("ranks", "tied", {"tensor_parallel_size": 2}, PARALLEL),
    ):
        store = str(tmp_path / name)
        args = {"model": str(checkpoints(kind)), **options}
        about = {"store": store, "model_id": ID}
        sampling = {"temperature": 0.0, "max_tokens": 40, "logprobs": 2, "detokenize": False}
        made = {"do": "checkpoint", "tokens": LONG[:300], "sampling": sampling, "labels": ["a"], **about}
        cut = {"do": "branch", "session": "a", "at": 330, "labels": ["cut"], "store": store}
        goes_on = {"do": "resume", "session": "cut", **about}
        first = engine(tmp_path, [made, cut, goes_on], environment, **args)
        (anew,) = engine(tmp_path, [goes_on], environment, **args)
        assert anew["lost"] == 0 and anew["cached"] == anew["answer"]["cached"], name
        assert anew["answer"]["cached"] == first[2]["answer"]["cached"] > 0, name
        assert same([anew["answer"]], [first[2]["answer"]]), name
        found = Store(store)
        (head,) = [one.head for one in found.listed()[0] if one.head.parent is None]
        if name == "ranks":
            assert len(head.contexts) == 2 and fsck(found).blocks == 2 * head.blocks == 2 * (339 // SIZE)
        else:  # a window's blocks may be cached at the end of the prompt only
            assert head.blocks >= 300 // SIZE and len(head.kept) > 1 and max(head.kept) > 0
        assert fsck(found).sound
