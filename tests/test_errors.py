"""Errors that others have named."""

import pytest

from thaw_vllm import errors


def test_ours_by_name():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 10
    for kind in kinds:
        assert errors.named(kind.__name__) is kind


@pytest.mark.parametrize("name", ["ValueError", "annotations", "named", "__name__", "", None, 3, ["UsageError"]])
def test_what_is_none_of_ours(name):
    assert errors.named(name) is None
