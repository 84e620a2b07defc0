"""Measurements: ours, the limit and the rivals in one run, alternating, with the bytes compared afterwards."""
