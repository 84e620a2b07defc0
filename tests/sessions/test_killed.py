"""Killed at any step, a store loses nothing that was published and names nothing that is not there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.sessions.made import SIZE, resumes, save, session

from thaw_vllm.sessions.archive import bring, export
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.collect import collect
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.store import Store

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("open", "pwrite", "link", "unlink", "fsync", "mkdir", "utime")


def killed_at(step, work):
    """Whether ``work`` was killed by the call of that number which it makes of the file system."""
    child = os.fork()
    if not child:
        left = step

        def counted(original):
            def call(*arguments, **options):
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


WORKS = {
    "save": lambda store, ids, file: save(store, session([9] * 4 * SIZE)),
    "branch": lambda store, ids, file: branch(store, ids[0], 6),
    "remove": lambda store, ids, file: store.remove(ids[1]),
    "collect": lambda store, ids, file: collect(store),
    "budget": lambda store, ids, file: collect(store, 0),
    "expire": lambda store, ids, file: collect(store),
    "import": lambda store, ids, file: bring(store, file),
    "repair": lambda store, ids, file: fsck(store, repair=True),
}


@pytest.mark.parametrize("what", WORKS)
def test_at_every_step(memory_path, what):
    step, going = 0, True
    while going:
        store = Store(memory_path / f"{step}", create=True)
        brief = {"expires": 1.0} if what == "expire" else {}
        ids = [save(store, session([1, 2, 3, 4, *[n] * 2 * SIZE], **brief))[0] for n in (5, 6)]
        gone, _ = save(store, session([7] * 2 * SIZE))
        file = memory_path / f"{step}.thawsession"
        export(store, gone, file)
        needless = [name.path(store.blocks) for _, name in store.names(store.read(gone))]
        store.remove(gone)
        if what == "repair":
            for path in needless:
                path.write_bytes(b"")
        elif what not in ("collect", "expire"):
            collect(store)
        before = {one.id for one in store.listed()[0]}
        going = killed_at(step, lambda store=store, ids=ids, file=file: WORKS[what](store, ids, file))
        if what == "repair":
            fsck(store, repair=True)
        found = fsck(store)
        assert found.sound and not found.strange, (what, step)
        after = {one.id for one in store.listed()[0]}
        assert all(resumes(store, id_) for id_ in after)
        if what not in ("remove", "budget", "expire"):
            assert before <= after
        collect(store)
        assert (left := fsck(store)).sound and not left.unneeded and not left.unfinished, (what, step)
        step += 1
    assert step > (2 if what == "remove" else 4)


@pytest.mark.soak
def test_two_at_once_at_random_moments(soak, memory_path):
    directory = memory_path / "store"
    published, maybe = set(), set()
    for case in soak(small=4, full=200):
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.sessions.hammer", str(directory), str(case.random.random())],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in running:
            assert process.stdout.readline() == "ready\n"
        time.sleep(case.random.uniform(0, 0.5))
        for process in running:
            process.kill()
        for process in running:
            printed, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, "nothing else ends it"
            for line in printed.splitlines(keepends=True):
                name = line.strip()
                if name.startswith("-"):
                    maybe.add(name[1:])
                elif line.endswith("\n"):
                    published.add(name)
        store = Store(directory)
        found = fsck(store)
        assert found.sound and not found.strange
        there = {one.id for one in store.listed()[0]}
        assert published - maybe <= there and all(resumes(store, id_) for id_ in there)
        published, maybe = published & there, maybe & there
    collect(Store(directory, create=True))  # where all cases were done before there is none yet
    assert (left := fsck(Store(directory))).sound and not left.unneeded and not left.unfinished
