"""Servers: the OpenAI-compatible API over a sampler, and the rollout viewer."""
