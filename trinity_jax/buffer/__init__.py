"""Replay between exploration and learning."""
