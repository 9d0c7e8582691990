"""Kernels: leaf package, imported only by trinity_jax/ops.py."""
