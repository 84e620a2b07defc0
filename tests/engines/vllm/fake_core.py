"""An engine core that is none: what it is asked goes into a log, and any step of it can be made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

VOCABULARY = 100


class FakeExecutor:
    """Its worker has weights ("old", "new", "half", or "gone"), and says what workers say."""

    def __init__(self, core: FakeCore) -> None:
        self.core = core
        self.sleeping_tags: set[str] = set()

    @property
    def is_sleeping(self) -> bool:
        return bool(self.sleeping_tags)

    def sleep(self, level: int) -> None:
        self.core.weights = "gone" if level == 2 else self.core.weights
        self.sleeping_tags |= {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.core.did(f"wake_up {','.join(tags)}")
        if set(tags) <= self.sleeping_tags:  # else vLLM warns, and does nothing
            self.sleeping_tags -= set(tags)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        core = self.core
        if method == "thaw_swap_check":
            core.checked_with.append(args)
        if method == "thaw_fill":
            core.filled_with = args[0]
            assert "weights" not in self.sleeping_tags, "filled while its memory is away"
            if core.tells.get(method, {}).keys() & {"error"} == set():
                core.weights = "half"
        core.did(f"collective_rpc {method}")
        if method in core.ranks:
            return [dict(answer) for answer in core.ranks[method]]
        answer = core.tells.get(method, core.ANSWERS[method])
        if method == "thaw_fill" and "bytes" in answer:
            core.weights = "new" if args[0]["contents"] == ["c1"] else "old"
        return [dict(answer)]


class FakeCore:
    """An engine core that keeps a log of what is asked of it.

    A fake, since a real engine of the CPU build packs its weights, so that it refuses to be swapped; the real one is
    tested in test_swap.py, and on GPUs. As vLLM's, a paused one keeps what is added to it, requests that were ended
    leave a step to be taken, and a cache holds what the weights at that time have made.
    """

    ANSWERS: ClassVar[dict[str, dict[str, Any]]] = {
        "thaw_swap_check": {"bytes": 10, "tensors": 3, "model": "new-id", "content": "c1", "set": None},
        "thaw_fill": {"bytes": 10, "seconds": 0.5, "route": "mapped"},
        "thaw_source": {"path": "old.thaw", "content": "c0", "set": None},
        "thaw_wakeable": {},
        "thaw_withdraw": {"withdrawn": False},
        "thaw_offer": {"content": "c0", "socket": "s"},
        "thaw_pid": {"pid": 42},
        "thaw_trim": {"left": 7},
        "thaw_pin": {"bytes": 12, "seconds": 0.1, "why": "mapped"},
        "thaw_unpin": {"bytes": 12},
    }

    def __init__(self, *, paused: bool = False, requests: int = 0, sleep_mode: bool = True) -> None:
        self.log: list[str] = []
        self.fail: tuple[int, BaseException] | None = None
        self.tells: dict[str, dict[str, Any]] = {}
        self.ranks: dict[str, list[dict[str, Any]]] = {}
        self.weights = "old"
        self.caches: dict[str, str | None] = dict.fromkeys(("prefix", "mm", "encoder"), "old")
        self.free: Iterator[bool] = iter(())
        self.answer: Any = ([1, 2, 3, 4], [-0.5] * 4)
        self.paused, self.ended, self.endless = paused, set(), False
        self.filled_with: dict[str, Any] | None = None
        self.checked_with: list[tuple[Any, ...]] = []
        self.model_executor = FakeExecutor(self)
        self.scheduler = SimpleNamespace(requests={}, left=set(), has_requests=self._has_requests)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enable_sleep_mode=sleep_mode, get_vocab_size=lambda: VOCABULARY)
        )
        for number in range(requests):
            self.scheduler.requests[f"request-{number}"] = object()

    def did(self, what: str) -> None:
        """Note it; or fail, if its turn has come."""
        self.log.append(what)
        if self.fail is not None and len(self.log) - 1 == self.fail[0]:
            raise self.fail[1]

    def _has_requests(self) -> bool:
        return bool(self.scheduler.requests or self.scheduler.left)

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def is_sleeping(self) -> bool:
        return self.paused or self.model_executor.is_sleeping

    def pause_scheduler(self, mode: str, clear_cache: bool) -> None:
        assert not clear_cache, "would be emptied without a word of what is in use"
        self.did(f"pause {mode}")
        if mode == "abort" and not self.endless:
            self.ended |= set(self.scheduler.requests)
            self.scheduler.left |= set(self.scheduler.requests)
            self.scheduler.requests.clear()
        self.paused = True

    def resume_scheduler(self) -> None:
        self.did("resume")
        self.paused = False

    def sleep(self, level: int) -> None:
        assert not self.scheduler.requests, "vLLM would abort them"
        self.did(f"sleep {level}")
        self.caches["prefix"], self.paused = None, True
        self.model_executor.sleep(level)

    def reset_prefix_cache(self) -> bool:
        self.did("reset prefix")
        if next(self.free, True):
            self.caches["prefix"] = None
            return True
        return False

    def reset_mm_cache(self) -> None:
        self.did("reset mm")
        self.caches["mm"] = None

    def reset_encoder_cache(self) -> None:
        self.did("reset encoder")
        self.caches["encoder"] = None

    def step_fn(self) -> tuple[dict[int, Any], bool]:
        self.did("step")
        self.scheduler.left.clear()
        if self.endless:
            self.scheduler.has_requests = lambda: False  # so that a test ends
        return {}, False

    def post_step(self, executed: bool) -> None:
        pass

    def add_request(self, request: Any) -> None:
        self.scheduler.requests[request.request_id] = request

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        return request, 0

    def ask(self, name: str, prompt: list[int], count: int) -> Any:
        """In place of ``versions.ask_core``."""
        assert not self.paused, "it would never be answered"
        assert name.startswith("thaw-canary-") and all(0 <= token < VOCABULARY for token in prompt)
        self.did("canary")
        self.caches["prefix"] = self.weights
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer
