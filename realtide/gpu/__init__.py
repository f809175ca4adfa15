"""Checks and times the models on a machine with one NVIDIA GPU (docs/gpu.md).

Needs PyTorch and NumPy and no other package, so that it runs where nothing can be installed.
"""
