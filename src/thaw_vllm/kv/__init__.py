"""WHAT IS CACHED: prefixes of tokens and the blocks of KV cache that stand for them; knows no engine and no torch."""
