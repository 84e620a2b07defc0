"""The forest: every session once, after its parent, with lines that show whose it is."""

from hypothesis import given
from hypothesis import strategies as st
from tests.sessions.made import session

from thaw_vllm.sessions.lineage import forest
from thaw_vllm.sessions.store import Listed


def listed(parents):
    """Sessions of which number n has the parent of that number, below n, or none, or one that is gone (-1)."""
    found = []
    for number, parent in enumerate(parents):
        about = {} if parent is None else {"parent": "f" * 32 if parent < 0 else f"{parent:032x}", "fork": 1}
        found.append(Listed(f"{number:032x}", session([1, 2], created=float(number), **about).head, 0.0, False))
    return found


def seen(nodes):
    return [(int(node.one.id, 16), node.depth) for node in nodes]


def test_a_tree():
    nodes = [*forest(listed([None, 0, 0, 1, None, -1]))]
    assert seen(nodes) == [(0, 0), (1, 1), (3, 2), (2, 1), (4, 0), (5, 0)]
    lines = ["* ", "  ├─ ", "  │  ↳ ", "  └─ ", "* ", "* "]
    assert [node.lines for node in nodes] == lines
    assert [node.orphan for node in nodes] == [False] * 5 + [True]


def test_branches_of_branches():
    lines = [node.lines for node in forest(listed([None, 0, 0, 2, 2, 1]))]
    assert lines == ["* ", "  ├─ ", "  │  ↳ ", "  └─ ", "     ├─ ", "     └─ "]


def test_about_one():
    of = listed([None, 0, 0, 1, 3, None])
    assert seen(forest(of, f"{1:032x}")) == [(0, 0), (1, 1), (3, 2), (4, 3)]
    assert seen(forest(of, f"{5:032x}")) == [(5, 0)]


def test_a_long_line():
    count = 3000
    nodes = [*forest(listed([None, *range(count - 1)]))]
    assert len(nodes) == count and {node.lines for node in nodes[1:]} == {"  ↳ "}


@given(choices=st.lists(st.integers(-2, 30), max_size=30))
def test_everyone_is_there_once_after_its_parent(choices):
    parents = [None if c == -2 or n == 0 else (c if c < 0 else c % n) for n, c in enumerate(choices)]
    order = [number for number, _ in seen(forest(listed(parents)))]
    assert sorted(order) == [*range(len(parents))]
    for number, parent in enumerate(parents):
        assert parent is None or parent < 0 or order.index(parent) < order.index(number)
