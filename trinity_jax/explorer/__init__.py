"""Rollouts: workflows talk to the sampler and to environments, and become experiences."""
