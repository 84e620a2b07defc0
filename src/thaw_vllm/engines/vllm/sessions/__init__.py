"""Sessions of a vLLM engine: kept in a store, and taken up again."""
