"""Polar-gradient optimizers for PyTorch, on one device, under DDP and under FSDP2."""

__version__ = "0.1.0"
