"""A pytest plugin for versions of vLLM whose compiled kernels do not fit the installed torch.

Their model code only looks the kernels up while a model is built; loading and thawing weights runs none of them. So the
missing ones are declared without an implementation: a call fails, and nothing pretends to compute.
"""

import torch

NAMES = ("silu_and_mul", "mul_and_silu", "gelu_and_mul", "gelu_tanh_and_mul", "gelu_new", "gelu_fast", "gelu_quick")
NAMES += ("rotary_embedding", "rms_norm", "fused_add_rms_norm")

library = torch.library.Library("_C", "FRAGMENT")
for name in NAMES:
    if not hasattr(torch.ops._C, name):
        library.define(f"{name}(Tensor! out, Tensor input) -> ()")
