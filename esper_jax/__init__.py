"""Grow neural networks while they train, in JAX and Flax."""
