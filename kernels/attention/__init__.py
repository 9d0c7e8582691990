"""Causal, segmented, grouped-query attention over packed rows, and over a cache."""
