"""Checks and measurements on one GPU, in ten minutes: `python -m benchmarks.gpu` (docs/gpu.md)."""
