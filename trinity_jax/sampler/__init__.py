"""Continuous-batching token sampler: pure prefill / insert / generate and a host scheduler."""
