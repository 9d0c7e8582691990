"""The decoder, its configurations, checkpoints, tokenizers and shardings."""
