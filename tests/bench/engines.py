"""Engines that are not there: what the two processes of ``thaw bench kv`` and ``thaw bench fork`` would answer."""

import os

SIZE = 131_072
"""Bytes of a token's keys and values."""


class Engines:
    """Answers like a benchmark's ``run``: a method for each task, its name with underscores.

    ``changes``, by task, change what it says; an error is raised.
    """

    def __init__(self, changes):
        self.changes, self.asked = changes, []

    def __call__(self, task, request, say):
        self.asked.append((task, dict(request)))
        assert os.path.isdir(request["folder"])
        changes = self.changes[task]
        if isinstance(changes, Exception):
            raise changes
        return {"lengths": [getattr(self, task.replace("-", "_"))(tokens) | changes for tokens in request["tokens"]]}


def report(tokens):
    """Of a freeze or a restore of so many tokens."""
    return {"bytes": tokens * SIZE, "blocks": tokens // 16, "seconds": 0.02, "phases": {"table": 0.001, "read": 0.01}}
