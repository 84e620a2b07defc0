"""What ``thaw serve`` keeps and runs beside vLLM's own servers."""
