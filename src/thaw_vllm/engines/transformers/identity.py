"""Who a transformers model is: the identity that a file of its cache must agree with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from ...errors import FormatError, MissingDependencyError, UnsupportedError, UsageError
from ...format import identity as rules
from ...format.identity import Identity
from ...format.limits import HASH_BLOCK
from ...transport import parallel
from ...weights.capture import capture, module_tensors, persistent_buffers
from ...weights.checkpoint import config_hash
from ...weights.digest import block_digests, bytes_digest
from ...weights.freeze import tensors_id
from ...weights.layout import dtype_name, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install 'transformers>=4.56'"


def model_identity(model: PreTrainedModel) -> Identity:
    """The identity of a cache that this model makes, the model id left open.

    Raises:
        UsageError: not a model of transformers itself.
        UnsupportedError: one whose keys and values depend on more than the identity and token ids say.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"transformers cannot be imported ({error}); {INSTALL}") from None
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(
            f"a {type(model).__name__} is not a model of transformers; of one that is compiled or wrapped, give what "
            "it wraps"
        )
    config = model.config
    for found, what in (
        (config.is_encoder_decoder, "encoder-decoder models, whose caches depend on what the encoder read"),
        (
            not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config,
            "models that take more than tokens (images, sound)",
        ),
        (
            getattr(model, "_hf_peft_config_loaded", False),
            "models with adapters, which can be switched without a trace; merge them first",
        ),
        (getattr(model, "tp_size", None) not in (None, 1), "tensor-parallel models"),
    ):
        if found:
            raise UnsupportedError(f"a file cannot tell whose cache it is: {what} are not supported in this version")
    model_device(model)
    return Identity(
        stage="kv",
        engine="transformers",
        engine_version=transformers.__version__,
        architecture=type(model).__name__,
        config=_config_hash(model),
        dtype=dtype_name(model.dtype),
        quantization=_quantization(config),
    )


def model_device(model: PreTrainedModel) -> torch.device:
    """Where all of the model is.

    Raises:
        UnsupportedError: spread over several devices, offloaded, or without a parameter.
    """
    devices: set[torch.device] = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        shown = ", ".join(sorted(map(str, devices))) or "none"
        raise UnsupportedError(f"the model must be on one device, and is on: {shown}; load it without device_map")
    return devices.pop()


def own_id(model: PreTrainedModel) -> str:
    """The model id over the tensors as they are now, as ``freeze_model`` computes it; reads all of them.

    Raises:
        UnsupportedError: quantised weights, part of which is not among the tensors.
    """
    if _quantization(model.config) is not None:
        raise UnsupportedError(
            "the weights are quantised, and their tensors alone do not say which model it is; ask 'thaw id MODEL' and "
            "pass what it says (model_id=...)"
        )
    captured = capture(module_tensors(model))
    settle(captured.tensors)
    digests = [""] * len(captured.storages)

    def digest(number: int) -> None:
        storage, blocks = captured.storages[number], list[bytes]()
        for at in range(0, storage.length, HASH_BLOCK):
            blocks += block_digests(storage.read(at, min(HASH_BLOCK, storage.length - at)))
        digests[number] = bytes_digest(blocks)

    parallel.run(range(len(digests)), digest, parallel.default_workers())
    return tensors_id(captured, digests)


def checked_id(given: str) -> str:
    """A model id that the caller gave.

    Raises:
        UsageError: it has not the form of one.
    """
    try:
        return rules.model_id(given, "model_id")
    except FormatError as error:
        raise UsageError(f"{error}; 'thaw id MODEL' prints one") from None


def _config_hash(model: PreTrainedModel) -> str:
    """Of every value in memory, defaults too: they may differ between versions of transformers.

    And of the dtypes of what the model id does not cover: ``model.to(torch.bfloat16)`` rounds the rotary table too,
    ``from_pretrained(dtype=torch.bfloat16)`` does not.
    """
    known = json.loads(model.config.to_json_string(use_diff=False))
    # Filled in by saving only; the identity names the architecture.
    known.pop("architectures", None)
    saved = persistent_buffers(model)
    derived = {name: dtype_name(buffer.dtype) for name, buffer in model.named_buffers() if name not in saved}
    return config_hash(known, {"buffers": derived})


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))
