"""The numbered cases themselves: repeatable, resumable, recorded."""

import json

import pytest
from tests.soak.cases import Progress, Run


@pytest.fixture
def progress(tmp_path):
    return lambda: Progress(tmp_path / "soak" / "7.json")


def draws(cases):
    return [(case.number, case.random.random()) for case in cases]


def test_cases_depend_on_seed_name_and_number_alone():
    whole = draws(Run(full=False, seed="7").of("a", 5, 100))
    assert whole == draws(Run(full=False, seed="7").of("a", 5, 100))
    assert whole[:3] == draws(Run(full=False, seed="7").of("a", 3, 100))
    assert not set(whole) & set(draws(Run(full=False, seed="8").of("a", 5, 100)))
    assert not set(whole) & set(draws(Run(full=False, seed="7").of("b", 5, 100)))


def test_small_numbers_leave_no_trace(progress):
    run = Run(full=False, seed="7", progress=progress())
    assert len(draws(run.of("a", 5, 100))) == 5
    assert not progress().done


def test_run_goes_on_with_the_case_that_failed_or_was_stopped_in(progress):
    whole = draws(Run(full=True, seed="7", progress=progress()).of("whole", 2, 10))
    run = Run(full=True, seed="7", progress=progress())
    for case in run.of("a", 2, 10):
        if case.number == 4:
            break
    assert (run.ran, run.cases["a"]) == (4, 4)
    again = Run(full=True, seed="7", progress=progress())
    assert [number for number, _ in draws(again.of("a", 2, 10))] == [4, 5, 6, 7, 8, 9]
    assert (again.ran, again.cases["a"]) == (6, 10)
    assert draws(Run(full=True, seed="7", progress=progress()).of("a", 2, 10)) == []
    assert len(whole) == 10


def test_record_is_a_line_of_json(progress):
    run = Run(full=True, seed="7", progress=progress())
    draws(run.of("a", 2, 3))
    found = json.loads(json.dumps(run.record(failures=1)))
    assert (found["seed"], found["failures"], found["cases"]) == ("7", 1, {"a": 3})
    assert {"date", "commit", "seconds", "versions", "hypothesis_examples"} <= set(found)
    assert {"thaw-vllm", "torch", "python"} <= set(found["versions"])
