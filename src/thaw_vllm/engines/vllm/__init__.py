"""vLLM: a plugin that teaches every vLLM process ``load_format="thaw"``."""
