"""Inference engines: the only place that imports one. Each subpackage is a stranger to the others."""
