"""A pytest plugin for versions of vLLM whose compiled kernels do not fit the installed torch.

Their model code only looks the kernels up while a model is built; loading and thawing weights runs none of them. So the
missing ones are declared without an implementation: a call fails, and nothing pretends to compute. The exception is
the packing of weights for the processor, which some versions do after loading: its fakes give them back unpacked.
"""

import sys

import torch

# Loading kernels built for another torch can end the process, so the modules that hold them are kept out.
for module in ("_C", "_C_AVX2", "_C_AVX512"):
    sys.modules[f"vllm.{module}"] = None  # type: ignore[assignment]

NAMES = ("silu_and_mul", "mul_and_silu", "gelu_and_mul", "gelu_tanh_and_mul", "gelu_new", "gelu_fast", "gelu_quick")
NAMES += ("rotary_embedding", "rms_norm", "fused_add_rms_norm")

library = torch.library.Library("_C", "FRAGMENT")
for name in NAMES:
    if not hasattr(torch.ops._C, name):
        library.define(f"{name}(Tensor! out, Tensor input) -> ()")


def unpacked(weight: torch.Tensor, packed: torch.Tensor, isa: str) -> None:
    """Stands for packing the experts' weights."""
    packed.copy_(weight)


if not hasattr(torch.ops._C, "convert_weight_packed"):
    library.define("convert_weight_packed(Tensor weight) -> Tensor")
    library.impl("convert_weight_packed", torch.clone, "CPU")
if not hasattr(torch.ops._C, "prepack_moe_weight"):
    library.define("prepack_moe_weight(Tensor weight, Tensor! packed, str isa) -> ()")
    library.impl("prepack_moe_weight", unpacked, "CPU")
