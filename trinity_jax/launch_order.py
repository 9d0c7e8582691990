"""Who may start a device program: one thread at a time per mesh.

Programs with collectives must reach every device in the same order. Trainer and sampler threads
that share devices therefore launch through one LaunchOrder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh


class LaunchOrder:
  """Serialises launches; on several CPU devices also their execution.

  The CPU backend runs a program's devices on a shared thread pool: two programs with collectives
  at once can each hold threads that the other waits for.
  """

  def __init__(self, mesh: Mesh):
    self._lock = threading.Lock()
    self._finish = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

  def __call__(self, program: Callable[..., Any], *args) -> Any:
    with self._lock:
      out = program(*args)
      return jax.block_until_ready(out) if self._finish else out
