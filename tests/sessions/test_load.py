"""Several processes at once on one store: nobody loses what another has kept, and nothing fails that may not."""

import functools
import json
import operator
import subprocess
import sys
from pathlib import Path

import pytest
from tests.sessions.made import resumes
from tests.soak.cases import FULL

from thaw_vllm.sessions.collect import collect
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.record import now
from thaw_vllm.sessions.store import Store

ROOT = Path(__file__).resolve().parents[2]
STUCK = 1800
"""Seconds after which processes wait for one another, and not for a processor."""


def together(directory, seeds, operations):
    """What several processes have done to a store, each with its seed; none of them may fail."""
    command = [sys.executable, "-m", "tests.sessions.load", str(directory)]
    running = [
        subprocess.Popen(
            [*command, str(seed), str(number), str(len(seeds)), str(operations)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, seed in enumerate(seeds)
    ]
    try:
        ended = [process.communicate(timeout=STUCK) for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [process.returncode for process in running if process.returncode]
    assert not failed, f"{seeds}: {failed}\n" + "\n".join(err for _, err in ended)
    return [json.loads(out) for out, _ in ended]


@pytest.mark.soak
def test_several_do_everything_at_once(soak, memory_path):
    for case in soak(small=2, full=40):
        place = memory_path / f"{case.number}"
        place.mkdir()
        seeds = [case.random.random() for _ in range(case.random.randint(3, 6) if FULL else 3)]
        told = together(place / "store", seeds, 600 if FULL else 60)
        about = f"case {case.number}: {seeds}"
        made, expired = ({id_: at for one in told for id_, at in one[name].items()} for name in ("made", "expired"))
        gone, brought, pinned = (
            functools.reduce(operator.or_, ({*one[name]} for one in told)) for name in ("gone", "brought", "pinned")
        )
        assert expired.keys() <= gone <= made.keys(), about
        assert all(made[id_] is not None and made[id_] <= at for id_, at in expired.items()), about

        store = Store(place / "store")
        found = fsck(store)
        assert found.sound and not found.strange and not found.unfinished, (found, about)
        listed, bad = store.listed()
        there = {one.id for one in listed}
        assert not bad and made.keys() - gone <= there <= (made.keys() - gone) | (gone & brought), about
        assert {one.id for one in listed if one.pinned} == pinned, about
        assert {path.name for path in (store.directory / "pins").iterdir()} == pinned, about
        assert all(resumes(store, id_) for id_ in there), about

        over = {one.id for one in listed if one.head.expired(now()) and not one.pinned}
        last = collect(store)
        assert over <= {*last.expired} == {*last.sessions}, about
        found = fsck(store)
        assert found.sound and not found.unneeded and found.sessions == len(there) - len(last.sessions), about
