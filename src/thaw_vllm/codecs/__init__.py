"""Stored bytes to original bytes and back.

Format version 1 knows one codec, number 0: the stored bytes are the original ones. A new codec is one new file
here, one line in the table, and a number in docs/format.md.
"""

from __future__ import annotations

from ..format.chunks import RAW

NAMES: dict[int, str] = {RAW: "raw"}
