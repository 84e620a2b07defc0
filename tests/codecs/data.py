"""Bytes of every kind that codec 1 meets."""

import random

import torch

from thaw_vllm.codecs import planes


def torch_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02


N = 3 * planes.BLOCK + 5 * planes.ROW + 7
EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
DATA = {
    "bfloat16": (torch_bytes(normal(N).bfloat16()), 2, 0.68),
    "float16": (torch_bytes(normal(N).half()), 2, 0.86),
    "float32": (torch_bytes(normal(N)), 4, 0.85),
    "float32 of bfloat16": (torch_bytes(normal(N).bfloat16().float()), 4, 0.37),
    "float8_e4m3fn": (torch_bytes((normal(N) * 20).to(torch.float8_e4m3fn)), 1, 0.83),
    "float8_e5m2": (torch_bytes((normal(N) * 20).to(torch.float8_e5m2)), 1, 0.72),
    "int8": (torch_bytes((normal(N) * 1500).clamp(-127, 127).to(torch.int8)), 1, 0.9),
    "int64": (torch_bytes(torch.arange(N)), 8, 0.6),
    "every bfloat16": (torch_bytes(torch.cat([normal(N).bfloat16().view(torch.int16), EVERY])), 2, 0.92),
    "zeros": (bytes(N), 2, 0.03),
    "ones": (torch_bytes(torch.ones(N, dtype=torch.bfloat16)), 2, 0.03),
    "not a number": (torch_bytes(torch.full((N,), float("nan"))), 4, 0.04),
    "infinite and denormal": (torch_bytes(torch.tensor([float("inf"), 1e-44, -0.0, -float("inf")]).repeat(N)), 4, 0.3),
    "one byte in thousands": (bytes(1 if n % 4999 == 17 else 0 for n in range(N)), 1, 0.03),
    "one row": (b"ab" * 600, 1, 1),
    "odd": (torch_bytes(normal(N).bfloat16())[:-1], 2, 0.68),
    "counted up": (bytes(range(256)) * 100, 1, 0.95),
    "every pattern": (torch_bytes(EVERY), 2, None),
    "random": (random.Random(0).randbytes(100_001), 2, None),
    "one": (b"x", 1, None),
    "less than a row": (bytes(planes.ROW * 2 - 1), 2, None),
    "none": (b"", 2, None),
}
"""Of each kind the bytes, those of an element, and which share of them is left; None where nothing is gained."""
