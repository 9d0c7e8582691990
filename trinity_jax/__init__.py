"""trinity_jax: reinforcement fine-tuning of language models on TPU and GPU in plain JAX."""

__version__ = "0.1.0"
