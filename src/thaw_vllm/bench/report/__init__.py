"""docs/benchmarks.md and its plots, made from the recorded results and from nothing else."""
