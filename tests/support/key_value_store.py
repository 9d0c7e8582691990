"""JAX's key-value store, for threads."""

from __future__ import annotations

import threading

import jax


class Store:
  """What a `World` or a `Channel` asks of the runtime's client."""

  def __init__(self):
    self._changed = threading.Condition()
    self._over = False
    self.values = {}

  def end(self):
    """The runtime has ended: everyone who waits is told."""
    with self._changed:
      self._over = True
      self._changed.notify_all()

  def key_value_set_bytes(self, key, value):
    with self._changed:
      assert key not in self.values, "JAX refuses to overwrite"
      self.values[key] = value
      self._changed.notify_all()

  def key_value_delete(self, key):
    with self._changed:
      del self.values[key]

  def blocking_key_value_get_bytes(self, key, milliseconds):
    seconds = min(milliseconds / 1000, threading.TIMEOUT_MAX)
    with self._changed:
      self._changed.wait_for(lambda: key in self.values or self._over, seconds)
      if key not in self.values:
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
      return self.values[key]
