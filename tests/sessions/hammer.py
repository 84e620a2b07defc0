"""A process that saves, branches, forgets and collects until it is killed: ``hammer.py STORE SEED``.

Prints the id of every session that was published, and ``-`` and the id before one is forgotten.
"""

import random
import sys

from tests.sessions.made import SIZE, save, session

from thaw_vllm.sessions.branch import branch
from thaw_vllm.sessions.collect import collect
from thaw_vllm.sessions.store import Store


def main(directory, seed):
    store, rng = Store(directory, create=True), random.Random(seed)
    own = []
    print("ready", flush=True)
    while True:
        what = rng.random()
        if what < 0.5 or not own:
            tokens = [n for n in rng.choices((1, 2), k=rng.randint(1, 6)) for _ in range(SIZE)]
            own.append(save(store, session(tokens))[0])
            print(own[-1], flush=True)
        elif what < 0.7:
            one = rng.choice(own)
            own.append(branch(store, one, rng.randint(1, store.read(one).head.count)))
            print(own[-1], flush=True)
        elif what < 0.9:
            gone = own.pop(rng.randrange(len(own)))
            print("-" + gone, flush=True)
            with store.use():
                store.remove(gone)
        else:
            collect(store)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
