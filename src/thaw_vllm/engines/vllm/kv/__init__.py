"""vLLM's KV cache as a file: what is cached, its pages, and back into another engine's pool."""
