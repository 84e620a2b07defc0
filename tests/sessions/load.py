"""One of several processes that do everything to a store at once: ``load.py STORE SEED NUMBER OF_HOW_MANY OPERATIONS``.

Prints one JSON object when it is done: ``made`` sessions by id and when each expires; ``gone``, those that it removed;
``expired``, which of them had, and when they were seen to have; ``brought`` from files; ``pinned`` in the end; and how
often it did what (``done``) and was refused (``refused``). Any error that is not documented ends it.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from tests.sessions.made import SIZE, context, resumes, save, session

from thaw_vllm.errors import UnknownSessionError, UsageError
from thaw_vllm.sessions.archive import bring, export
from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.collect import collect
from thaw_vllm.sessions.fsck import fsck
from thaw_vllm.sessions.record import expiry, now
from thaw_vllm.sessions.store import Store

BLOCK = 4096 + context().page
FEW = 6
"""Sessions of which one is chosen, so that several processes are often after the same."""


class Load:
    """What one process does."""

    def __init__(self, directory, seed, number, count):
        self.store, self.rng = Store(directory, create=True), random.Random(seed)
        self.number, self.count = number, count
        self.file = Path(directory).parent / f"{number}.thawsession"
        self.made, self.gone, self.expired, self.brought, self.pinned = {}, set(), {}, set(), set()
        self.done, self.refused = Counter(), Counter()

    def run(self, operations):
        works = {
            **{self.save: 4, self.branch: 4, self.forget: 4, self.pin: 4, self.collect: 3},
            **{self.read: 5, self.find: 2, self.check: 1, self.carry: 2},
        }
        for work in self.rng.choices([*works], [*works.values()], k=operations):
            name = work.__name__
            self.done[name] += 1
            try:
                work()
            except UnknownSessionError:  # another was quicker
                self.refused[name] += 1
            assert all(self.store.read(id_) and self.store.pinned(id_) for id_ in self.pinned), "a pinned one has gone"

    def any(self):
        listed, bad = self.store.listed()
        assert not bad, bad
        if not listed:
            raise UnknownSessionError("there is none")
        return self.rng.choice(sorted(listed, key=lambda one: one.id)[:FEW])

    def ttl(self):
        return self.rng.choice([None, None, self.rng.uniform(0.001, 0.5), 10_000])

    def save(self):
        tokens = [n for n in self.rng.choices((1, 2), k=self.rng.randint(1, 6)) for _ in range(SIZE)]
        labels, created, ttl = (f"{self.number}-{self.done['save']}",), now(), self.ttl()
        made = session([*tokens, 9], labels=labels, created=created, expires=expiry(created, ttl))
        self.made[save(self.store, made)[0]] = made.head.expires

    def branch(self):
        one, ttl, start = self.any(), self.ttl(), now()
        made = branch(self.store, one.id, self.rng.randint(1, one.head.count), ttl=ttl)
        self.made[made] = expiry(start, ttl)  # not later than that

    def forget(self):
        id_ = self.any().id
        try:
            with self.store.use():
                self.store.forget([id_])
        except UnknownSessionError:
            raise
        except UsageError as error:
            assert "is pinned" in str(error)
            self.refused["forget"] += 1
        else:
            self.gone.add(id_)

    def pin(self):
        """Each has some that it alone pins and lets go, so that it knows what they are."""
        if self.pinned and self.rng.random() < 0.6:
            id_ = self.rng.choice(sorted(self.pinned))
            self.pinned.remove(id_)
            with self.store.use():
                self.store.pin(id_, False)
            return
        id_ = self.any().id
        if int(id_, 16) % self.count == self.number:
            with self.store.use():
                self.store.pin(id_)
            self.pinned.add(id_)

    def collect(self):
        budget = self.rng.choice([None, self.rng.randint(0, 20) * BLOCK])
        dry = self.rng.random() < 0.3
        found = collect(self.store, budget, dry_run=dry)
        assert budget is None or found.over == max(0, found.left - budget)
        if not dry:
            self.gone |= {*found.sessions}
            self.expired |= dict.fromkeys(found.expired, now())

    def read(self):
        with self.store.use():  # as whoever checks one out
            assert resumes(self.store, self.any().id)

    def find(self):
        one = self.any()
        for word in (one.id, one.id[:20], *one.head.labels):
            assert self.store.find(word) == one.id

    def check(self):
        found = fsck(self.store, quick=self.rng.random() < 0.5)
        assert found.sound and not found.strange, found

    def carry(self):
        id_, _ = export(self.store, self.any().id, self.file, force=True)
        assert bring(self.store, self.file)[0] == id_
        self.brought.add(id_)


def main(directory, seed, number, count, operations):
    load = Load(directory, seed, int(number), int(count))
    load.run(int(operations))
    found = {name: getattr(load, name) for name in ("made", "expired", "done", "refused")}
    print(json.dumps(found | {name: sorted(getattr(load, name)) for name in ("gone", "brought", "pinned")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
