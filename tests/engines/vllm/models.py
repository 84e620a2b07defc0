"""Tiny checkpoints with seeded random weights, made with transformers or written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BASE = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)


def llama(
    directory: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0, kv_heads: int = 2
) -> Path:
    """Grouped-query attention, untied or tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = BASE | {"num_key_value_heads": kv_heads}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied, dtype=dtype)).to(dtype)
    model.save_pretrained(directory)
    return with_tokenizer(directory)


def biased(directory: Path) -> Path:
    """Biases on queries, keys and values, one head of keys and values, and rows of padding in the vocabulary."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    shape = BASE | {"num_key_value_heads": 1, "vocab_size": 500}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False, dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(directory)
    return with_tokenizer(directory)


def tied_with_lm_head(directory: Path) -> Path:
    """The config says tied, the checkpoint ships an lm_head of its own that differs."""
    llama(directory, tied=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return directory


def mixed_dtypes(directory: Path) -> Path:
    """Checkpoint tensors in bf16, fp16 and fp32; vLLM casts while loading."""
    llama(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    mixed = {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(sorted(tensors.items()))}
    save_file(mixed, path, metadata={"format": "pt"})
    return directory


def mixture_of_experts(directory: Path) -> Path:
    """Four experts, two a token, fused by vLLM while loading."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        **BASE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return with_tokenizer(directory)


def int8_quantised(directory: Path) -> Path:
    """compressed-tensors W8A8: int8 weights with a scale a channel, activations quantised as they come."""
    llama(directory)
    path = directory / "model.safetensors"
    quantised: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            quantised[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
            quantised[name + "_scale"] = scale
        else:
            quantised[name] = tensor
    save_file(quantised, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "global_compression_ratio": 1.0,
        "kv_cache_scheme": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def with_tokenizer(directory: Path) -> Path:
    """A word-level tokenizer of the words t0 … t511, so that engines and servers can speak."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(BASE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t1", unk_token="t2")
    wrapped.save_pretrained(directory)
    return directory


def sliding_window(directory: Path) -> Path:
    """Layers that attend to everything and layers that see a window of 64 tokens, one in three and two in three."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=64,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        architectures=["Gemma3ForCausalLM"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def latent_attention(directory: Path) -> Path:
    """Multi-head latent attention: one cached vector a token and layer, for all heads."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    )
    DeepseekV2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def groups_of_experts(directory: Path) -> Path:
    """Four experts in two groups, which vLLM can place in turns; the first layer is dense."""
    latent_attention(directory)
    config = json.loads((directory / "config.json").read_text())
    grouped = {"first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    return _with_weights(directory, config | grouped)


def _with_weights(directory: Path, config: dict[str, Any]) -> Path:
    """Random weights for another configuration of the same architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


KINDS: dict[str, Callable[[Path], Path]] = {
    "untied": llama,
    "tied": lambda d: llama(d, tied=True),
    "tied-with-lm-head": tied_with_lm_head,
    "biased": biased,
    "fp16": lambda d: llama(d, dtype=torch.float16),
    "fp32": lambda d: llama(d, dtype=torch.float32),
    "mixed-dtypes": mixed_dtypes,
    "moe": mixture_of_experts,
    "int8": int8_quantised,
    "sliding-window": sliding_window,
    "latent-attention": latent_attention,
    "groups-of-experts": groups_of_experts,
}
