"""How vLLM's layers divide their parameters among tensor-parallel ranks, from what the layers say of themselves.

Only what vLLM's own layers load in vLLM's own way is understood: a parameter is known by the method that loads it, and
one without a method, of a module that holds no divided layers, is the same on every rank. A model with a loader of its
own may place bytes in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers import linear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, row_parallel_weight_loader

from ...errors import UnsupportedError
from ...weights.division import WHOLE, Division, Part
from .versions import parallel_groups, routed_experts

if TYPE_CHECKING:
    import torch


def divisions(model: torch.nn.Module, names: Iterable[str]) -> dict[str, Division]:
    """How each of these parameters and buffers of an unquantised model is divided, whatever the number of ranks.

    Raises:
        UnsupportedError: the first of which that is not known.
    """
    ranks = parallel_groups()["tp"][1]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = parameters.get(name, getattr(module, attribute))
        try:
            found[name] = _division(module, attribute, parameter, ranks)
        except (AttributeError, TypeError, ValueError) as error:
            raise _unknown(name, f"{type(module).__name__} is not as it is known here ({error})") from None
        except UnsupportedError as error:
            raise _unknown(name, str(error)) from None
    return found


def _unknown(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"how ranks divide {name!r} is not known: {why}")


def _division(module: torch.nn.Module, attribute: str, parameter: torch.Tensor, ranks: int) -> Division:
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    if loader is default_weight_loader:
        if parameter.numel() > 1 and _holds_divided(module):
            raise UnsupportedError(f"{type(module).__name__} may give each rank its own part, as of what is beside it")
        return WHOLE
    if loader is row_parallel_weight_loader:
        return WHOLE if parameter.dim() == 1 else Division(0, (Part(parameter.shape[0] * ranks),))
    layer, method = getattr(loader, "__self__", None), getattr(loader, "__func__", None)
    if method is None:
        raise UnsupportedError("the model loads it in its own way")
    for kind, of in _KINDS:
        if method in (getattr(kind, name, None) for name in ("weight_loader", "weight_loader_v2")):
            return of(layer, attribute, parameter, ranks)
    experts = routed_experts()
    if experts is not None and method is experts.weight_loader:
        return _experts(layer, attribute, parameter, ranks)
    raise UnsupportedError(f"{type(layer).__name__} loads it in its own way")


def _holds_divided(module: torch.nn.Module) -> bool:
    return any(isinstance(child, _DIVIDED) and not getattr(child, "disable_tp", False) for child in module.children())


def _divided(module: Any, ranks: int) -> bool:
    """Whether a layer takes part in tensor parallelism.

    Raises:
        UnsupportedError: among other ranks than the model's.
    """
    if module.disable_tp:
        return False
    if module.tp_size != ranks:
        raise UnsupportedError(f"it is divided among {module.tp_size} of {ranks} ranks")
    return True


def _column(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    return _stacked(module, parameter, ranks, (Part(module.output_size),))


def _merged(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    return _stacked(module, parameter, ranks, tuple(map(Part, module.output_sizes)))


def _qkv(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    heads, shared = module.total_num_heads, module.total_num_kv_heads
    parts = (
        Part(heads * module.head_size),
        Part(shared * module.head_size, shared),
        Part(shared * module.v_head_size, shared),
    )
    return _stacked(module, parameter, ranks, parts)


def _stacked(module: Any, parameter: Any, ranks: int, parts: tuple[Part, ...]) -> Division:
    dim = getattr(parameter, "output_dim", None)
    return Division(dim, parts) if dim is not None and _divided(module, ranks) else WHOLE


def _row(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    dim = getattr(parameter, "input_dim", None)
    return Division(dim, (Part(module.input_size),)) if dim is not None and _divided(module, ranks) else WHOLE


def _vocabulary(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    dim = getattr(parameter, "output_dim", None)
    if dim is None or getattr(module, "disable_tp", False):
        return WHOLE
    if module.tp_size != ranks or getattr(module, "parallel_group", None) is not None:
        raise UnsupportedError("it is divided among other ranks than the model's")
    if module.num_embeddings != module.org_vocab_size:
        raise UnsupportedError("it has rows for adapters")
    return Division(dim, (Part(module.org_vocab_size),), module.num_embeddings_padded)


def _whole(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    return WHOLE


def _experts(module: Any, attribute: str, parameter: Any, ranks: int) -> Division:
    config = module.moe_config
    if config.ep_size != 1 or config.tp_size != ranks:
        raise UnsupportedError("experts are divided among ranks")
    if config.intermediate_size_per_partition_unpadded != config.intermediate_size_per_partition:
        raise UnsupportedError("it is padded for its kernels")
    size = config.intermediate_size_per_partition * ranks
    if attribute == "w2_weight":
        return Division(2, (Part(size),))
    if attribute == "w13_weight":
        return Division(1, (Part(size),) * (parameter.shape[1] * ranks // size))
    raise UnsupportedError("of experts their weights alone are")


_DIVIDED = (linear.ColumnParallelLinear, linear.RowParallelLinear)
"""Layers beside which a model's own loading may have divided a parameter, such as one for each head."""

_KINDS: tuple[tuple[type, Callable[[Any, str, Any, int], Division]], ...] = (
    (linear.ReplicatedLinear, _whole),
    (linear.QKVParallelLinear, _qkv),
    (linear.MergedColumnParallelLinear, _merged),
    (linear.ColumnParallelLinear, _column),
    (linear.RowParallelLinear, _row),
    (VocabParallelEmbedding, _vocabulary),
)
"""By whose method a parameter is loaded."""
