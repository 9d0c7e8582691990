"""A local web page over a run's folder: curves, and every rollout that is still stored.

Nothing is written: stages' metrics.jsonl and replay buffers (SQLite or PostgreSQL) are read,
during a run or after it.
"""

from trinity_jax.server.viewer.app import Viewer, make_app

__all__ = ["Viewer", "make_app"]
