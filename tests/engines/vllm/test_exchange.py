"""What ranks tell each other before they thaw."""

from __future__ import annotations

import pytest

from thaw_vllm.engines.vllm import exchange
from thaw_vllm.errors import ReplacedError
from thaw_vllm.format.header import Header, RankSet
from thaw_vllm.format.identity import Identity


@pytest.mark.parametrize("other", ["a" * 32, "b" * 32])
def test_ranks_that_have_opened_different_sets(other: str, monkeypatch: pytest.MonkeyPatch):
    """The manifest was replaced between two of them."""
    header = Header(Identity("raw"), ranks=RankSet("a" * 32))
    monkeypatch.setattr(exchange, "world_exchange", lambda: lambda message: [message, other.encode()])
    if other == header.ranks.id:
        exchange.require_one_set_of_all(header, "w.thaw")
    else:
        with pytest.raises(ReplacedError, match=r"'w\.thaw' was replaced by another set while the ranks opened it"):
            exchange.require_one_set_of_all(header, "w.thaw")


def test_a_file_of_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "world_exchange", None)
    exchange.require_one_set_of_all(Header(Identity("raw")), "w.thaw")
