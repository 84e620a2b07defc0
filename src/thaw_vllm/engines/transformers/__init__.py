"""Hugging Face transformers: the cache of one prompt, frozen and restored; knows no other engine."""
