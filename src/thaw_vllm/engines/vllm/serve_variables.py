"""How ``thaw serve`` tells a server what to add; apart from ``serving``, which needs a web framework to be imported.

``START_VARIABLE`` is ``startup``'s: the directory for the report of this start.
"""

from __future__ import annotations

from .startup import VARIABLE as START_VARIABLE

__all__ = ["KV_VARIABLE", "MIDDLEWARE", "PARENT_VARIABLE", "START_VARIABLE", "TOKEN_FILE_VARIABLE"]

MIDDLEWARE = "thaw_vllm.engines.vllm.serving.Additions"
"""For ``--middleware``."""
KV_VARIABLE = "THAW_SERVE_KV_SNAPSHOT"
"""A file of KV blocks that is restored at the start; without it the server does not come up."""
TOKEN_FILE_VARIABLE = "THAW_SERVE_TOKEN_FILE"
"""Where the admin token can be read, for the line that says that it is ready."""
PARENT_VARIABLE = "THAW_SERVE_PARENT"
"""The process whose end is the server's."""
