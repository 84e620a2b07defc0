"""Element types a snapshot can hold: torch's names without ``torch.``, with bytes per element."""

from __future__ import annotations

ITEM_SIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""``float4_e2m1fn_x2`` packs two values in a byte; its shape counts bytes, as torch's does.

torch's quantised types (``qint8`` …) carry a scale outside the bytes and its ``bits*`` and ``uint1``-``uint7`` shells
have no arithmetic; neither is storable.
"""
