"""Tasksets: what the explorer works on, and in which order."""

from trinity_jax.tasks.formats import Row, read_rows, to_task
from trinity_jax.tasks.taskset import Taskset, load_taskset

__all__ = ["Row", "Taskset", "load_taskset", "read_rows", "to_task"]
