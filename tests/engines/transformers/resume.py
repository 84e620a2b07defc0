"""A fresh process that restores caches and goes on from them: ``python -m tests.engines.transformers.resume``.

Reads cases from stdin, ``[{"model": directory, "dtype": name, "path": file, "room": of a StaticCache or null,
"token": next one}]``, and writes what became of each, as JSON.
"""

import hashlib
import json
import sys

import torch

STEPS = 8


def digest(tensor):
    """Shape, dtype and the SHA-256 of a tensor's bytes in row-major order."""
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return [list(tensor.shape), str(tensor.dtype), hashlib.sha256(data).hexdigest()]


def held(cache, tokens):
    """Keys and values of each layer."""
    return [digest(t[:, :, :tokens]) for layer in cache.layers for t in (layer.keys, layer.values)]


def go_on(model, cache, token):
    """Greedy tokens after ``token``, and the logits of every step."""
    tokens, logits = [], []
    with torch.no_grad():
        for _ in range(STEPS):
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[:, -1]
            token = int(out.argmax())
            tokens.append(token)
            logits.append(digest(out))
    return tokens, logits


def main():
    from transformers import LlamaForCausalLM, StaticCache

    import thaw_vllm

    found = []
    for case in json.load(sys.stdin):
        model = LlamaForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"])).eval()
        room = case["room"] and StaticCache(config=model.config, max_cache_len=case["room"])
        cache, ids = thaw_vllm.restore_cache(model, case["path"], cache=room)
        kind, before = type(cache).__name__, held(cache, len(ids))
        found.append([kind, ids, before, *go_on(model, cache, case["token"])])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
