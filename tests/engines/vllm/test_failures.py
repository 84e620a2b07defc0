"""Errors on their way from a worker to the caller."""

import pytest

from thaw_vllm.engines.vllm import fresh
from thaw_vllm.engines.vllm.failures import noted, reported
from thaw_vllm.errors import MismatchError, ThawError


def fail_in_a_worker(error, seen):
    """``error`` inside a worker, and what the caller's own process sees of it."""
    with reported() as folder:
        with pytest.raises(type(error)), noted(folder):
            raise error
        raise seen


def test_an_error_of_ours_comes_as_itself():
    with pytest.raises(MismatchError, match="another rank"):
        fail_in_a_worker(MismatchError("another rank"), RuntimeError("a worker failed"))


def test_an_error_of_the_engine_is_named():
    with pytest.raises(ThawError, match="could not load the model: MemoryError: 16 GB"):
        fail_in_a_worker(MemoryError("16 GB"), RuntimeError("a worker failed"))


def test_an_error_that_came_by_itself_stays():
    error = ValueError("twice")
    with pytest.raises(ValueError, match="twice") as caught:
        fail_in_a_worker(error, error)
    assert caught.value is error


class RayTaskError(RuntimeError):
    """As Ray's: what it raises is of this class and of its cause's."""

    def __init__(self, cause):
        super().__init__(f"ray::RayWorkerProc.initialize_worker() (pid=1) {cause}")
        self.cause = cause


class FromRay(RayTaskError, MismatchError):
    pass


@pytest.mark.parametrize("here", [True, False])
def test_an_error_that_ray_brought(here):
    """Its workers may be on other machines, where no note is written."""
    cause = MismatchError("rank 1's own")
    with pytest.raises(MismatchError) as caught:
        if here:
            fail_in_a_worker(cause, FromRay(cause))
        with reported():
            raise FromRay(cause)
    assert type(caught.value) is MismatchError and str(caught.value) == "rank 1's own"


def test_no_note_leaves_the_failure():
    with pytest.raises(RuntimeError, match="something else"), reported():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("ValueError: no memory\nRuntimeError: Engine core failed. See root cause above. Failed: {}", "no memory"),
        ("RuntimeError: Engine core failed. See root cause above. Failed: {}", "See root cause above"),
        ("ValueError: one\nthaw_vllm.errors.MismatchError: other\nRuntimeError: last", "MismatchError: other"),
        ("ValueError: one\nTypeError: other", "TypeError: other"),
        ("nothing that says so\n", "nothing that says so"),
        ("", "it printed nothing"),
    ],
)
def test_the_line_that_tells_why(printed: str, told: str):
    """vLLM ends with a line that points at the one before."""
    assert told in fresh.last_error(printed)
