"""Weights of a running engine swapped in place, and an engine parked: what must hold, and doing it."""
