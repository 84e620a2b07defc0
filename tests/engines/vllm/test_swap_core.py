"""The engine core's part of a swap and of parking: what is done in which order, and what a failure leaves behind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engines.vllm.fake_core import VOCABULARY, FakeCore

from thaw_vllm.engines.vllm import versions
from thaw_vllm.engines.vllm.answers import raised
from thaw_vllm.engines.vllm.kv import watch
from thaw_vllm.engines.vllm.swap import core as swap_core
from thaw_vllm.errors import BusyError, DeviceError, MismatchError, ThawError, UnsupportedError, UsageError

pytestmark = pytest.mark.vllm

METHODS = {name: getattr(swap_core, name) for name in ("check", "swap", "finish", "park", "wake")}
RPC = "collective_rpc "


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ask_core", lambda core, *args: core.ask(*args))


def run(core: Any, method: str, **options: Any) -> dict[str, Any]:
    """As a client does it; its error is raised."""
    given = {
        "check": {"path": "new.thaw"},
        "swap": {"path": "new.thaw", "verify": True},
        "finish": {},
        "park": {"keep_weights": False},
        "wake": {"path": "old.thaw", "contents": ["c0"], "verify": True},
    }[method]
    return raised(swap_core.answering(METHODS[method])(core, given | options))


def refused(core: FakeCore) -> bool:
    """Whether an engine is closed: nothing that is asked of it is done."""
    if getattr(core, "thaw_broken", None) is None:
        return False
    before = list(core.log)
    for method in METHODS:
        with pytest.raises(DeviceError, match=r"of no use any more.*start another one"):
            run(core, method)
    assert core.log == before
    with pytest.raises(RuntimeError, match="thaw: this engine is of no use any more"):
        core.step_fn()
    with pytest.raises(RuntimeError, match="thaw: this engine is of no use any more"):
        core.add_request(SimpleNamespace(request_id="x"))
    return True


EMPTIED = ["reset prefix", "reset mm", "reset encoder"]
CHECK, FILL = [RPC + "thaw_swap_check"], [RPC + "thaw_fill"]
BEGUN = [*CHECK, RPC + "thaw_withdraw"]
CANARY = ["resume", "canary", *EMPTIED]


# --- A swap -----------------------------------------------------------------------------------------------------------


def test_order_of_a_swap():
    core = FakeCore()
    answer = run(core, "swap", verify=False)
    assert core.log == [*BEGUN, *EMPTIED, *FILL, *CANARY]
    assert core.filled_with == {"path": "new.thaw", "contents": ["c1"], "verify": False}, "what was checked, no other"
    assert {name: answer[name] for name in ("bytes", "model", "aborted", "route")} == {
        "bytes": 10,
        "model": "new-id",
        "aborted": 0,
        "route": "mapped",
    }
    assert list(answer["seconds"]) == ["check", "drain", "fill", "canary", "total"]
    assert not core.paused and set(core.caches.values()) == {None}


def test_order_of_a_swap_while_paused():
    """What is left is ended, and nobody is let in until the client says so."""
    core = FakeCore(paused=True, requests=3)
    answer = run(core, "swap")
    assert core.log == [*BEGUN, "pause abort", "step", *EMPTIED, *FILL, *CANARY, "pause keep"]
    assert answer["aborted"] == 3 and core.paused
    core.scheduler.requests["late"] = object()
    assert run(core, "finish") == {"aborted": 1}
    assert core.log[-3:] == ["pause abort", "step", "resume"] and not core.paused
    assert core.ended == {"request-0", "request-1", "request-2", "late"}


def test_finish_with_nothing_that_came():
    core = FakeCore(paused=True)
    assert run(core, "finish") == {"aborted": 0}
    assert core.log == ["resume"] and not core.paused


def test_several_workers_answers_are_added(monkeypatch: pytest.MonkeyPatch):
    core = FakeCore()
    real = core.model_executor.collective_rpc
    monkeypatch.setattr(core.model_executor, "collective_rpc", lambda *a, **k: real(*a, **k) * 2)
    assert run(core, "check")["bytes"] == 20
    assert run(core, "swap")["bytes"] == 20
    assert raised(swap_core.answering(swap_core.hold)(core, {"path": "p", "release": False}))["bytes"] == 24


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("method", ["check", "swap"])
def test_a_refused_check_changes_nothing(method: str, paused: bool):
    core = FakeCore(paused=paused, requests=2 * paused)
    core.tells["thaw_swap_check"] = {"error": "MismatchError", "message": "holds config"}
    with pytest.raises(MismatchError, match="holds config"):
        run(core, method)
    assert core.log == CHECK and core.paused == paused and len(core.scheduler.requests) == 2 * paused


def test_a_first_look_is_quick_where_all_was_looked_at_before():
    core = FakeCore()
    first_look = {"path": "new.thaw", "quick": True}
    core.tells["thaw_swap_check"] = {"error": "MismatchError", "message": "holds config"}
    with pytest.raises(MismatchError):
        run(core, "check", **first_look)
    core.tells.clear()
    run(core, "check", **first_look)
    run(core, "check", **first_look)
    run(core, "swap")
    assert [quick for _, quick in core.checked_with] == [False, False, True, False]


def test_a_check_changes_nothing():
    core = FakeCore(paused=True, requests=2)
    assert run(core, "check") == {"bytes": 10, "tensors": 3, "model": "new-id", "contents": ["c1"]}
    assert core.log == CHECK and len(core.scheduler.requests) == 2


def test_running_requests_without_a_pause():
    core = FakeCore(requests=1)
    with pytest.raises(UsageError, match="requests are running; wait for them, or pause"):
        run(core, "swap")
    assert core.log == [] and core.scheduler.requests


@pytest.mark.parametrize("paused", [False, True])
def test_a_prefix_cache_that_is_in_use(paused: bool):
    core = FakeCore(paused=paused)
    core.free = iter([False])
    with pytest.raises(UsageError, match="blocks of the KV cache are in use"):
        run(core, "swap")
    assert core.log == [*BEGUN, "reset prefix"] and core.weights == "old" and core.paused == paused
    assert not refused(core)
    run(core, "swap")


def test_weights_that_another_engine_is_still_copying():
    core = FakeCore(paused=True, requests=2)
    core.tells["thaw_withdraw"] = {"error": "UnsupportedError", "message": "still copying"}
    with pytest.raises(UnsupportedError, match="still copying"):
        run(core, "swap")
    assert core.log == BEGUN and core.weights == "old" and len(core.scheduler.requests) == 2


def test_what_some_ranks_have_withdrawn_is_offered_again_where_one_could_not():
    core = FakeCore()
    core.ranks = {
        "thaw_withdraw": [{"withdrawn": True}, {"error": "BusyError", "message": "rank 1: still copying"}],
        "thaw_swap_check": RANKS,
    }
    with pytest.raises(BusyError, match="rank 1: still copying"):
        run(core, "swap")
    assert core.log == [*BEGUN, RPC + "thaw_offer"] and core.weights == "old"


@pytest.mark.parametrize("offering", [False, True])
@pytest.mark.parametrize("fault", ["thaw_fill", "prefix"])
def test_what_a_refused_swap_has_withdrawn_is_offered_again(fault: str, offering: bool):
    core = FakeCore()
    core.tells["thaw_withdraw"] = {"withdrawn": offering}
    if fault == "prefix":
        core.free = iter([False])
    else:
        core.tells[fault] = {"error": "MismatchError", "message": "has become another snapshot"}
    with pytest.raises(ThawError):
        run(core, "swap")
    assert core.log.count(RPC + "thaw_offer") == offering and core.weights == "old"
    core = FakeCore()
    core.tells["thaw_withdraw"] = {"withdrawn": offering}
    run(core, "swap")
    assert RPC + "thaw_offer" not in core.log, "its weights are others now"


def test_an_offer_that_cannot_be_made_again_hides_nothing():
    core = FakeCore()
    core.tells["thaw_withdraw"] = {"withdrawn": True}
    core.tells["thaw_fill"] = {"error": "MismatchError", "message": "has become another snapshot"}
    core.fail = (len(BEGUN) + len(EMPTIED) + len(FILL), RuntimeError("a worker died"))
    with pytest.raises(MismatchError, match="another snapshot"):
        run(core, "swap")
    assert core.log[-1] == RPC + "thaw_offer"


def test_requests_that_cannot_be_ended():
    core = FakeCore(paused=True, requests=2)
    core.endless = True
    with pytest.raises(UnsupportedError, match="2 requests cannot be ended"):
        run(core, "swap")
    assert not set(core.log) & {*FILL, *EMPTIED} and core.paused


@pytest.mark.parametrize("method", ["check", "swap", "park"])
def test_one_that_sleeps(method: str):
    core = FakeCore()
    core.sleep(1)
    with pytest.raises(UsageError, match="asleep; wake it up first"):
        run(core, method)
    assert core.log == ["sleep 1"]


@pytest.mark.parametrize("paused", [False, True])
def test_a_fill_that_was_refused_before_its_first_byte(paused: bool):
    core = FakeCore(paused=paused)
    core.tells["thaw_fill"] = {"error": "MismatchError", "message": "has become another snapshot"}
    with pytest.raises(MismatchError, match="another snapshot"):
        run(core, "swap")
    assert core.weights == "old" and core.paused == paused and core.log[-1:] == FILL and not refused(core)


@pytest.mark.parametrize("paused", [False, True])
def test_a_fill_that_breaks_it(paused: bool):
    core = FakeCore(paused=paused)
    core.tells["thaw_fill"] = {"broken": "CorruptionError: a checksum"}
    assert run(core, "swap") == {"broken": "CorruptionError: a checksum"}
    assert core.log[-1:] == FILL, "no request was let in"
    assert core.thaw_broken == "CorruptionError: a checksum" and refused(core)  # type: ignore[attr-defined]


FAULTS: dict[str, tuple[Any, str]] = {
    "none": (([], []), r"answered with the tokens \[\]"),
    "too few": (([1, 2, 3], [-0.5] * 3), r"answered with the tokens \[1, 2, 3\]"),
    "too many": (([1, 2, 3, 4, 5], [-0.5] * 5), r"answered with the tokens"),
    "negative": (([1, 2, 3, -1], [-0.5] * 4), r"answered with the tokens"),
    "beyond": (([1, 2, 3, VOCABULARY], [-0.5] * 4), r"answered with the tokens"),
    "no chances": (([1, 2, 3, 4], []), r"log-probabilities are \[\]"),
    "nan": (([1, 2, 3, 4], [-0.5, math.nan, -0.5, -0.5]), "log-probabilities are .*nan"),
    "inf": (([1, 2, 3, 4], [-0.5, -0.5, math.inf, -0.5]), "log-probabilities are .*inf"),
    "minus inf": (([1, 2, 3, 4], [-0.5, -0.5, -0.5, -math.inf]), "log-probabilities are .*-inf"),
    "positive": (([1, 2, 3, 4], [-0.5, -0.5, -0.5, 0.5]), r"log-probabilities are .*0\.5\]"),
    "exception": (RuntimeError("CUDA error"), "canary failed with RuntimeError: CUDA error"),
}


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_canary_shows(fault: str, paused: bool):
    core = FakeCore(paused=paused)
    core.answer, said = FAULTS[fault]
    with pytest.raises(AssertionError):  # the pattern below can fail
        pytest.fail(said) if False else (_ for _ in ()).throw(AssertionError)
    broken = run(core, "swap")
    assert set(broken) == {"broken"} and refused(core)
    assert_matches(said, broken["broken"])


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_chances_at_their_limits_are_fine():
    core = FakeCore()
    core.answer = ([0, VOCABULARY - 1, 5, 5], [0.0, -1e30, -0.0, -1e-30])
    assert run(core, "swap")["model"] == "new-id"


def test_a_canary_that_leaves_something_behind():
    core = FakeCore()
    core.free = iter([True, False])
    assert_matches("canary failed with UsageError: blocks of the KV cache", run(core, "swap")["broken"])
    assert refused(core)


def test_weights_are_known_again_after_a_swap():
    core = FakeCore()
    setattr(core, watch._CHANGED, True)
    run(core, "swap")
    assert not watch.weights_changed(core)
    setattr(core, watch._CHANGED, True)
    core.tells["thaw_fill"] = {"error": "MismatchError", "message": "another"}
    with pytest.raises(MismatchError):
        run(core, "swap")
    assert watch.weights_changed(core), "nothing was filled"


def test_a_broken_engine_is_told_once():
    """The first answer says why; it is not lost in what ends the process."""
    core = FakeCore()
    core.answer = RuntimeError("illegal memory access")
    why = run(core, "swap")["broken"]
    with pytest.raises(DeviceError, match="illegal memory access"):
        run(core, "check")
    assert "illegal memory access" in why


# --- The canary, with vLLM's own request and outputs ------------------------------------------------------------------


def test_what_steps_give_for_others_reaches_their_clients(monkeypatch: pytest.MonkeyPatch):
    """And nobody hears of the canary."""
    monkeypatch.undo()
    core = FakeCore()
    sent: list[Any] = []
    core.output_queue = SimpleNamespace(put_nowait=sent.append)  # type: ignore[attr-defined]
    core.scheduler.left = {"other"}
    steps = []

    def step() -> tuple[dict[int, Any], bool]:
        steps.append(dict(core.scheduler.requests))
        (name,) = core.scheduler.requests
        if len(steps) == 1:
            core.scheduler.left.clear()
        end = len(steps) == 4
        one = SimpleNamespace(
            request_id=name,
            new_token_ids=[len(steps)],
            new_logprobs=SimpleNamespace(logprobs=[[-0.25, -3.0]]),
        )
        other = SimpleNamespace(request_id="other", new_token_ids=[], new_logprobs=None)
        if end:
            core.scheduler.requests.clear()
        several = SimpleNamespace(
            outputs=[one, *([other] if len(steps) == 1 else [])], finished_requests={name, "other"} if end else None
        )
        outputs.append(several)
        return {0: several}, True

    outputs: list[Any] = []
    core.step_fn = step  # type: ignore[method-assign]
    assert versions.ask_core(core, "thaw-canary-1", [1, 2], 4) == ([1, 2, 3, 4], [-0.25] * 4)
    (request,) = steps[0].values()
    sampling = request.sampling_params
    assert (sampling.temperature, sampling.max_tokens, sampling.ignore_eos) == (0, 4, True)
    assert request.cache_salt == "thaw-canary-1", "its blocks are nobody else's"
    assert [client for client, _ in sent] == [0, 0] and [one.request_id for one in sent[0][1].outputs] == ["other"]
    assert sent[1][1].outputs == [], "but it says who has finished"
    assert outputs[-1].finished_requests == {"other"}


# --- Parking ----------------------------------------------------------------------------------------------------------


def test_order_of_parking():
    core = FakeCore(paused=True, requests=2)
    answer = run(core, "park")
    asked = [RPC + "thaw_source", RPC + "thaw_pid"]
    assert core.log == [*asked, "pause abort", "step", "sleep 2", RPC + "thaw_trim"]
    assert {name: answer[name] for name in ("path", "contents", "aborted", "pids", "left")} == {
        "path": "old.thaw",
        "contents": ["c0"],
        "aborted": 2,
        "pids": [42],
        "left": [7],
    }
    assert list(answer["seconds"]) == ["check", "drain", "sleep", "trim", "total"]


def test_weights_kept_in_host_memory():
    """No snapshot is asked for, whatever was done to the weights."""
    core = FakeCore()
    setattr(core, watch._CHANGED, True)
    answer = run(core, "park", keep_weights=True)
    assert core.log == [RPC + "thaw_pid", "sleep 1", RPC + "thaw_trim"] and (answer["path"], answer["contents"]) == (
        None,
        None,
    )
    run(core, "wake", path=None, contents=None)
    assert core.weights == "old" and not set(core.log) & set(FILL) and not core.paused
    assert watch.weights_changed(core), "they still are"


def test_parking_without_sleep_mode():
    core = FakeCore(sleep_mode=False)
    with pytest.raises(UsageError, match=r"without sleep mode; .* start it with enable_sleep_mode"):
        run(core, "park")
    assert core.log == []


def test_parking_weights_that_may_have_been_changed():
    core = FakeCore(requests=1, paused=True)
    setattr(core, watch._CHANGED, True)
    with pytest.raises(UnsupportedError, match=r"may have been changed.*keep_weights=True"):
        run(core, "park")
    assert core.log == [] and core.scheduler.requests


def test_parking_without_its_snapshot():
    core = FakeCore(requests=1, paused=True)
    core.tells["thaw_source"] = {"error": "MismatchError", "message": "not the snapshot any more"}
    with pytest.raises(MismatchError):
        run(core, "park")
    assert core.log == [RPC + "thaw_source"] and core.scheduler.requests


def parked(**options: Any) -> FakeCore:
    core = FakeCore()
    run(core, "park", **options)
    core.log.clear()
    return core


def test_order_of_waking():
    core = parked()
    core.scheduler.requests["meanwhile"] = object()
    setattr(core, watch._CHANGED, True)  # sleep, level 2
    answer = run(core, "wake", verify=False)
    assert core.log == [
        RPC + "thaw_wakeable",
        "wake_up weights",
        *FILL,
        "wake_up kv_cache",
        "pause abort",
        "step",
        *CANARY,
    ]
    assert core.filled_with == {"path": "old.thaw", "contents": ["c0"], "verify": False}
    assert answer["bytes"] == 10 and answer["aborted"] == 1 and core.ended == {"meanwhile"}
    assert list(answer["seconds"]) == ["check", "weights' memory", "fill", "other memory", "canary", "total"]
    assert not core.paused and not core.model_executor.is_sleeping and not watch.weights_changed(core)


def test_a_snapshot_that_is_gone_wakes_nothing():
    core = parked()
    core.tells["thaw_wakeable"] = {"error": "StorageError", "message": "no such file"}
    with pytest.raises(ThawError, match="no such file"):
        run(core, "wake")
    assert core.log == [RPC + "thaw_wakeable"] and core.model_executor.sleeping_tags == {"weights", "kv_cache"}
    core.tells.clear()
    assert run(core, "wake")["bytes"] == 10


@pytest.mark.parametrize("paused", [False, True])
def test_waking_one_that_is_awake(paused: bool):
    """Nothing says that this snapshot fits what it holds by now."""
    core = FakeCore(paused=paused)
    with pytest.raises(UsageError, match="not parked"):
        run(core, "wake")
    assert core.log == []


def test_a_failure_when_all_memory_was_back():
    core = parked()
    core.scheduler.requests["meanwhile"] = object()
    core.fail = (4, RuntimeError("for once"))
    assert "for once" in run(core, "wake")["broken"] and refused(core)


@pytest.mark.parametrize("how", ["fill", "canary"])
def test_waking_that_breaks_it(how: str):
    core = parked()
    if how == "fill":
        core.tells["thaw_fill"] = {"broken": "CorruptionError: a checksum"}
    else:
        core.answer = ([1], [-0.5])
    assert set(run(core, "wake")) == {"broken"}
    assert refused(core) and ("wake_up kv_cache" in core.log) == (how == "canary")


AGAIN = [RPC + "thaw_wakeable", "wake_up weights", RPC + "thaw_fill", "wake_up kv_cache"]


def test_a_second_wake_after_a_refusal():
    core = parked()
    core.fail = (0, RuntimeError("for once"))
    with pytest.raises(ThawError, match="for once"):
        run(core, "wake")
    assert core.log == AGAIN[:1] and core.paused and core.model_executor.is_sleeping
    core.log.clear()
    core.fail = None
    assert run(core, "wake")["bytes"] == 10
    assert core.log == [*AGAIN, *CANARY] and not core.paused


@pytest.mark.parametrize("step", [1, 3])
def test_memory_that_does_not_come_back(step: int):
    """Half of it may be mapped, which vLLM cannot do twice."""
    core = parked()
    core.fail = (step, RuntimeError("out of memory"))
    assert "out of memory" in run(core, "wake")["broken"]
    assert core.log == AGAIN[: step + 1] and refused(core)


def test_a_second_wake_after_another_snapshot_came_between():
    """Seen by the fill: by then the weights' memory is back."""
    core = parked()
    core.tells["thaw_fill"] = {"error": "MismatchError", "message": "has become another snapshot"}
    with pytest.raises(MismatchError):
        run(core, "wake")
    assert core.paused and core.model_executor.sleeping_tags == {"kv_cache"}
    core.tells.clear()
    assert run(core, "wake")["bytes"] == 10 and core.weights == "old" and not core.model_executor.is_sleeping


# --- Whatever fails ---------------------------------------------------------------------------------------------------

ERRORS: list[Callable[[], BaseException]] = [
    lambda: RuntimeError("a step failed"),
    lambda: UsageError("a step failed"),
    lambda: OSError("a step failed"),
    lambda: KeyboardInterrupt(),
]


def failing(core: FakeCore, method: str, step: int, error: BaseException) -> str | None:
    """Run it with one step that raises; which, or None where it has not so many."""
    core.log.clear()
    core.fail = (step, error)
    with contextlib.suppress(ThawError, KeyboardInterrupt):
        run(core, method)
    core.fail = None
    return core.log[step] if len(core.log) > step else None


def check_nothing_is_mixed(core: FakeCore, requests: set[str]) -> None:
    """Closed; or whole weights, caches that they made, and no request lost without a word."""
    if refused(core):
        return
    assert core.weights != "half", "it goes on with weights that are half of one and half of the other"
    assert core.weights in ("old", "new") or core.model_executor.is_sleeping
    if not core.paused:
        assert not core.model_executor.is_sleeping, "requests are let in, and its memory is away"
        assert set(core.caches.values()) <= {None, core.weights}
    assert set(core.scheduler.requests) | core.ended >= requests


def one_fails(method: str, step: int, paused: bool, requests: int, error: BaseException) -> tuple[list[str], str]:
    """What was done, up to the step that failed; and what is wrong with what is left then, empty if nothing is."""
    core = FakeCore(paused=paused)
    if method == "wake":
        run(core, "park")
    names = {f"request-{number}" for number in range(requests if core.paused else 0)}
    core.scheduler.requests |= dict.fromkeys(names)
    before = core.paused, core.weights
    failed = failing(core, method, step, error)
    done = core.log[: step + 1]
    try:
        check_nothing_is_mixed(core, names)
        if failed is not None and not refused(core):
            whole = method == "park" and core.weights == "old" and not core.model_executor.is_sleeping
            assert core.paused >= before[0] or whole, "what failed has let requests in"
            assert method != "swap" or core.weights == before[1], "it says that nothing was changed"
    except AssertionError as found:
        return done, str(found)
    return done, ""


@given(
    method=st.sampled_from(["swap", "park", "wake"]),
    step=st.integers(0, 16),
    paused=st.booleans(),
    requests=st.integers(0, 2),
    error=st.sampled_from(ERRORS),
)
def test_whichever_step_fails(method: str, step: int, paused: bool, requests: int, error: Callable[[], BaseException]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "ask_core", lambda core, *args: core.ask(*args))
        given_error = error()
        done, wrong = one_fails(method, step, paused, requests, given_error)
    assert wrong == "", done


def fails_at(method: str, name: str, error: BaseException) -> str:
    """What is wrong after a failure of the last step of that name, in an engine that was paused."""
    done, _ = one_fails(method, 1000, True, 1, error)
    last = len(done) - 1 - done[::-1].index(name)
    return one_fails(method, last, True, 1, error)[1]


@pytest.mark.parametrize("error", [RuntimeError("worker died"), TimeoutError("RPC call timed out")], ids=repr)
@pytest.mark.parametrize("method", ["swap", "wake"])
def test_a_call_that_fails_during_the_fill(method: str, error: Exception):
    assert fails_at(method, *FILL, error) == ""


@pytest.mark.parametrize("name", ["resume", "pause keep"])
def test_a_failure_around_the_canary(name: str):
    assert fails_at("swap", name, RuntimeError("a step failed")) == ""


@pytest.mark.parametrize("name", [*FILL, "canary", "reset prefix", "pause keep"])
def test_an_interrupt_once_filling_has_begun(name: str):
    assert fails_at("swap", name, KeyboardInterrupt()) == ""


@pytest.mark.parametrize("keep_weights", [False, True])
def test_a_park_that_fails_once_it_sleeps(keep_weights: bool):
    core = FakeCore()
    core.tells["thaw_trim"] = {"error": "ThawError", "message": "unexpected RuntimeError: CUDA error"}
    with pytest.raises(ThawError, match="CUDA error"):
        run(core, "park", keep_weights=keep_weights)
    assert not core.model_executor.is_sleeping or refused(core)


def test_logits_in_place_of_log_probabilities(monkeypatch: pytest.MonkeyPatch):
    """Are above 0 as well, and finite."""
    core = FakeCore()
    monkeypatch.setattr(versions, "ask_core", lambda *_: ([1, 2, 3, 4], [3.5, -1.0, 0.0, 2.0]))
    core.vllm_config.model_config.logprobs_mode = "raw_logits"
    assert run(core, "swap")["bytes"] == 10
    core.vllm_config.model_config.logprobs_mode = "processed_logprobs"
    assert "log-probabilities are" in run(core, "swap")["broken"]


def test_an_engine_that_does_not_come_to_rest(monkeypatch: pytest.MonkeyPatch):
    """As with a scheduler that never takes the canary."""
    core = FakeCore()
    monkeypatch.setattr(versions, "_LONGEST_RUN", 0.0)
    core.scheduler.left = {"somebody"}
    with pytest.raises(ThawError, match="has not come to rest"):
        run(core, "swap")
    assert core.weights == "old" and not refused(core)


def test_waking_with_what_another_parking_gave():
    core = parked()
    with pytest.raises(UsageError, match="another snapshot"):
        run(core, "wake", contents=["c1"])
    assert core.log == [] and run(core, "wake")["bytes"] == 10


def test_what_would_run_a_parked_engine_is_refused():
    core = parked()
    for call in (core.wake_up, core.resume_scheduler):
        with pytest.raises(UsageError, match="parked"):
            call()
    run(core, "wake")
    core.resume_scheduler()
    assert not core.paused


def test_a_sleep_that_is_put_off():
    """vLLM does that where work is left; nothing may be taken from an engine that is awake."""
    core = FakeCore()
    core.sleep = lambda level: None  # type: ignore[method-assign]
    assert "has not" in run(core, "park")["broken"] and refused(core)
    assert RPC + "thaw_trim" not in core.log


RANKS: list[dict[str, Any]] = [
    {"bytes": 10, "tensors": 3, "model": "new-id", "content": "c1", "set": "s"},
    {"bytes": 11, "tensors": 3, "model": "new-id", "content": "d1", "set": "s"},
]


def test_each_rank_is_told_of_its_own_file():
    core = FakeCore()
    core.ranks = {
        "thaw_swap_check": RANKS,
        "thaw_fill": [{"bytes": 10, "route": "mapped"}, {"bytes": 11, "route": "x"}],
    }
    assert run(core, "swap")["bytes"] == 21
    assert core.filled_with is not None and core.filled_with["contents"] == ["c1", "d1"]


@pytest.mark.parametrize("name", ["check", "swap"])
def test_ranks_with_files_of_several_sets(name: str):
    core = FakeCore()
    core.ranks = {"thaw_swap_check": [RANKS[0], RANKS[1] | {"set": "older"}]}
    with pytest.raises(MismatchError, match="files of several sets"):
        run(core, name)
    assert core.weights == "old" and core.filled_with is None


def test_one_rank_refuses_what_another_has_filled():
    core = FakeCore()
    refused = {"error": "MismatchError", "message": "it has become another"}
    core.ranks = {"thaw_swap_check": RANKS, "thaw_fill": [{"bytes": 10, "route": "mapped"}, refused]}
    assert "it has become another" in run(core, "swap")["broken"]


def test_all_ranks_refuse():
    core = FakeCore()
    refused = {"error": "MismatchError", "message": "it has become another"}
    core.ranks = {"thaw_swap_check": RANKS, "thaw_fill": [refused, refused]}
    with pytest.raises(MismatchError, match="it has become another"):
        run(core, "swap")


def test_what_one_rank_could_not_hold_no_other_does():
    core = FakeCore()
    held = {"bytes": 12, "seconds": 1, "why": ""}
    core.ranks = {"thaw_pin": [{"error": "DeviceError", "message": "no memory"}, held]}
    with pytest.raises(DeviceError, match="no memory"):
        raised(swap_core.answering(swap_core.hold)(core, {"path": "new.thaw", "release": False}))
    assert core.log[-1] == RPC + "thaw_unpin"
