"""Publishes (version, params): train layout -> rollout layout, on the mesh, without a host copy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.checksums import verify
from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder


def publishing(shardings: Any, dtype: Any) -> Any:
  """The jitted program params -> params as published: cast and resharded, always a copy."""
  return jax.jit(
    lambda params: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params),
    out_shardings=shardings,
  )


class Synchronizer:
  """Holds the published versions; explorers wait for the one they need.

  A published pytree never aliases the train state, which is donated. The newest `keep` versions
  stay, so that the trainer can recompute the log-probs of older samples. `bell` is rung at each, in
  this process: no other sees these versions.

  Args:
    pinned: whether a version stays although there are `keep` newer ones.
    localize: where samplers have other devices than the ones that train: what was published -> what
      they get.
  """

  def __init__(
    self,
    shardings: Any,
    dtype: Any,
    launch: LaunchOrder,
    *,
    keep: int,
    timeout: float,
    bell: ThreadBell | None = None,
    pinned: Callable[[int], bool] = lambda version: False,
    localize: Callable[[Any], Any] = lambda params: params,
  ):
    self._pinned, self._localize = pinned, localize
    self._cast = publishing(shardings, dtype)
    self._launch = launch
    self._keep = keep
    self._timeout = timeout
    self._bell = bell or ThreadBell()
    self._lock = threading.Lock()
    self._versions: dict[int, tuple[Any, Any]] = {}  # as published, as samplers get it
    self._waiters: list[tuple[int, Future]] = []
    self._closed: BaseException | None = None
    self._asked = False

  @property
  def version(self) -> int:
    """The newest published version, -1 before the first."""
    with self._lock:
      return max(self._versions, default=-1)

  def publish(self, version: int, params: Any) -> None:
    """Casts and reshards params to the rollout layout and makes them version `version`.

    Raises:
      RunFailed: what came out has other checksums than what went in; names the tensors.
      ValueError: the version is not newer than the newest.
    """
    published = jax.block_until_ready(self._launch(self._cast, params))
    verify(
      params,
      published,
      what=f"version {version} in the rollout layout",
      source_launch=self._launch,
      published_launch=self._launch,
    )
    local = self._localize(published)
    with self._lock:
      newest = max(self._versions, default=-1)
      if version <= newest:
        raise ValueError(f"version {version} published after version {newest}")
      self._versions[version] = published, local
      for old in sorted(self._versions)[: -self._keep]:
        if not self._pinned(old):
          del self._versions[old]
      ready = [w for w in self._waiters if w[0] <= version]
      self._waiters = [w for w in self._waiters if w[0] > version]
    for _, future in ready:
      future.set_result(None)
    self._bell.ring_here()

  def ask(self) -> None:
    """An explorer wants newer weights than it has (explorer_driven)."""
    with self._lock:
      self._asked = True

  def take_request(self) -> bool:
    """Whether somebody has asked since the last call."""
    with self._lock:
      asked, self._asked = self._asked, False
      return asked

  def params(self, version: int) -> Any | None:
    """The published params of exactly this version, or None when no longer kept."""
    with self._lock:
      return self._versions.get(version, (None, None))[0]

  def recent(self, version: int) -> Any | None:
    """`params` of one of the newest `keep`: the same on every process, whatever is pinned here."""
    with self._lock:
      known = version in sorted(self._versions)[-self._keep :]
    return self.params(version) if known else None

  def _future(self, version: int) -> Future:
    future: Future = Future()
    future.set_running_or_notify_cancel()  # a waiter that gives up must not fail who publishes
    with self._lock:
      if self._closed is not None:
        future.set_exception(self._ended())
      elif max(self._versions, default=-1) >= version:
        future.set_result(None)
      else:
        self._waiters.append((version, future))
    return future

  def _newest_up_to(self, version: int) -> tuple[int, Any]:
    """The exact version when it is kept, else (after a resume) the newest."""
    with self._lock:
      found = version if version in self._versions else max(self._versions)
      return found, self._versions[found][1]

  async def wait_for(self, version: int) -> tuple[int, Any]:
    """Waits until `version` exists; returns (version, params).

    Raises:
      RunFailed: it did not come within the timeout, or the synchronizer was closed.
    """
    future = self._future(version)
    try:
      # Not asyncio.wait_for, which in Python 3.11 may lose a cancellation.
      async with asyncio.timeout(self._timeout):
        await asyncio.wrap_future(future)
    except TimeoutError:
      raise self._late(version) from None
    finally:
      self._forget(future)
    return self._newest_up_to(version)

  def wait(self, version: int) -> tuple[int, Any]:
    """`wait_for`, of a thread."""
    future = self._future(version)
    try:
      future.result(self._timeout)
    except TimeoutError:
      raise self._late(version) from None
    finally:
      self._forget(future)
    return self._newest_up_to(version)

  def _late(self, version: int) -> RunFailed:
    return RunFailed(
      f"the explorer waited {self._timeout:.0f} s (sync.timeout) for version {version}; the "
      f"trainer's newest is {self.version}"
    )

  def _forget(self, future: Future) -> None:
    with self._lock:
      self._waiters = [w for w in self._waiters if w[1] is not future]

  def close(self, error: BaseException) -> None:
    """Fails everyone who waits, now and later."""
    with self._lock:
      self._closed = error
      waiters, self._waiters = self._waiters, []
    for _, future in waiters:
      future.set_exception(self._ended())
    self._bell.ring_here()

  @property
  def failure(self) -> RunFailed | None:
    """Why no version will come any more, once this was closed."""
    return self._ended() if self._closed is not None else None

  def _ended(self) -> RunFailed:
    return RunFailed("the synchronizer is closed: no version will come", self._closed)
