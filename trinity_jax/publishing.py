"""Weights across processes: the trainer writes snapshots, explorers read them.

A folder of snapshots has one writer and any number of readers, on every host that mounts it. What
readers see changes in one step, when the manifest is replaced (see snapshots). They are told by a
bell and never poll.

Versions and lineages. Version v is the policy after v trainer steps. A trainer that was killed
after it had published version 12, and resumes from its checkpoint of step 10, makes versions 11 and
12 again, and nothing guarantees the same bits. So what is published is ordered by (lineage,
version). The first version that a process publishes is the one it starts or resumes from, and it
decides:

  above the manifest's version       the lineage goes on: explorers notice nothing
  equal to it, with equal checksums  nothing is written: the same weights are there already
  below it, or equal and different   the lineage's number goes up by one

After that versions go up, or publish raises. A reader serves one lineage for all its life. When the
manifest changes to another, everyone who waits, now or later, gets `LineageChanged`: their explorer
abandons what it has under way and begins again with a new reader and a new sampler, as it does when
it is itself restarted. No explorer ever holds version 12 of one lineage and goes on to version 12
or 13 of another as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from trinity_jax import snapshots
from trinity_jax.checksums import checksums, compare
from trinity_jax.distributed import ALONE, World
from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.placement import take_part
from trinity_jax.probe import Probe
from trinity_jax.snapshots import Manifest, SnapshotGone


class LineageChanged(RunFailed):
  """The trainer went back behind a version that was published: begin again with a new reader."""


class Bell(Protocol):
  """Something changed; see buffer.bell."""

  def ring(self) -> None: ...

  def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
    """Calls back from any thread after each ring, until the returned function is called."""
    ...


class SnapshotPublisher:
  """Writes versions into a folder; the trainer's thread owns it.

  Args:
    directory: made when it is not there. One publisher at a time.
    keep: newest snapshots that stay.
    dtype: what is published is cast to it; None = as it is.
    bell: rung after each publish.
    probe: how to evaluate what is published; None = no probe.
    launch: of the mesh that holds the params, where other threads use it too.
    world: the processes that hold the params; the first one writes.
  """

  def __init__(
    self,
    directory: Path | str,
    *,
    keep: int,
    dtype: Any = None,
    bell: Bell | None = None,
    probe: Probe | None = None,
    launch: LaunchOrder | None = None,
    world: World = ALONE,
  ):
    if keep < 1:
      raise ValueError(f"keep = {keep}, expected at least 1")
    self.directory = Path(directory).absolute()
    self._keep, self._bell, self._probe, self._world = keep, bell, probe, world
    self._run = launch or (lambda program, *args: program(*args))
    self._launch = launch
    self._cast = None if dtype is None else _caster(dtype)
    self._first = True
    self._newest: Manifest | None = None
    if not world.leader:
      return
    with snapshots.writing(self.directory):
      self.directory.mkdir(parents=True, exist_ok=True)
      self._newest = snapshots.read_manifest(self.directory)
      known = snapshots.kept(self.directory)
      snapshots.clean(self.directory, self._newest)
    # Without a manifest nobody knows what was published: nothing of it may come again.
    self._next_lineage = known[-1][0] + 1 if known else 0

  @property
  def newest(self) -> Manifest | None:
    """What readers see, None before the first publish ever."""
    return self._newest

  def publish(self, version: int, params: Any, *, step: int | None = None) -> Manifest | None:
    """Writes params as `version`, makes it the newest and rings; returns its manifest.

    Of several processes all call it, and those that do not write get None.

    Args:
      params: any layout; whole when this returns, so they may be donated then.
      step: the trainer's step, when it is beyond `version`.

    Raises:
      ValueError: not above the version that was published before.
      RunFailed: the folder cannot be written, or the probe is not finite; what was published
        before stays.
    """
    newest = self._newest
    if not self._first and newest is not None and version <= newest.version:
      raise ValueError(f"version {version} published after version {newest.version}")
    if self._cast is not None:
      params = self._run(self._cast, params)
    sums = checksums(params, launch=self._launch)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    there = self._world.agree(self._first and self._is_newest(version, sums, dtype))
    probe = self._probe.record(version, params) if self._probe and not there else {}
    if not self._world.leader:
      if not there:
        take_part(params, self._launch)
      return None
    if there:
      assert newest is not None
      manifest = dataclasses.replace(newest, finished=False)
    else:
      lineage = self._lineage_of(version)
      manifest = Manifest(
        version=version,
        lineage=lineage,
        path=snapshots.folder(lineage, version),
        step=version if step is None else step,
        dtype=dtype,
        checksums=sums,
        probe=probe,
        finished=False,
        written_at=time.time(),
      )
      with snapshots.writing(self.directory):
        snapshots.write(self.directory, manifest, params, self._launch)
    self._announce(manifest)
    self._first = False
    for old in snapshots.kept(self.directory)[: -self._keep]:
      snapshots.delete(self.directory, snapshots.folder(*old))
    return manifest

  def finish(self) -> None:
    """Says that no version will come; those who wait for one are told."""
    if self._newest is not None:
      self._announce(dataclasses.replace(self._newest, finished=True))

  def _announce(self, manifest: Manifest) -> None:
    if manifest != self._newest:
      with snapshots.writing(self.directory):
        manifest.write(self.directory)
      self._newest = manifest
    if self._bell is not None:
      self._bell.ring()

  def _is_newest(self, version: int, sums: dict[str, int], dtype: str) -> bool:
    """Whether this very snapshot is there already."""
    n = self._newest
    return (
      n is not None
      and (n.version, n.checksums, n.dtype) == (version, sums, dtype)
      and (self._probe is None) == (not n.probe)
      and n.order in snapshots.kept(self.directory)
    )

  def _lineage_of(self, version: int) -> int:
    n = self._newest
    if n is None:
      return self._next_lineage
    return n.lineage if version > n.version else n.lineage + 1


class SnapshotReader:
  """Reads the versions that a SnapshotPublisher writes; the explorer's Synchronizer.

  Thread-safe. Every tensor's checksum is compared after it has been laid out on the devices.

  Args:
    directory: the publisher's; made when it is not there yet.
    shardings: where each tensor goes; a pytree of the parameters' structure.
    dtype: of the params that are returned.
    bell: rings when the manifest has changed. Who subscribes to it later than the reader finds
      `version` and `failure` up to date when called.
    timeout: seconds to wait for a version (sync.timeout).
    probe: evaluates what was read and compares; None = no probe.
    launch: of the mesh of `shardings`, where other threads use it too.
  """

  def __init__(
    self,
    directory: Path | str,
    shardings: Any,
    dtype: Any,
    *,
    bell: Bell,
    timeout: float,
    probe: Probe | None = None,
    launch: LaunchOrder | None = None,
  ):
    self.directory = Path(directory).absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    self._shardings, self._timeout, self._probe = shardings, timeout, probe
    self._launch, self._bell = launch, bell
    self._run = launch or (lambda program, *args: program(*args))
    self._cast, self._dtype = _caster(dtype), jnp.dtype(dtype)
    self._lock = threading.Lock()
    self._looking, self._loading = threading.Lock(), threading.Lock()
    self._newest: Manifest | None = None
    self._loaded: tuple[int, Any] | None = None
    self._waiters: list[tuple[int, Future]] = []
    self._closed: BaseException | None = None
    self._unsubscribe: Callable[[], None] = lambda: None
    self._unsubscribe = bell.subscribe(self._look)
    self._look()  # after that, so that nothing is missed in between
    if self._closed is not None:
      self._unsubscribe()

  @property
  def version(self) -> int:
    """The newest published version, -1 before the first."""
    with self._lock:
      return -1 if self._newest is None else self._newest.version

  @property
  def lineage(self) -> int:
    """The lineage that this reader serves, -1 before the first version."""
    with self._lock:
      return -1 if self._newest is None else self._newest.lineage

  @property
  def finished(self) -> bool:
    """Whether the trainer has ended: no version will come."""
    with self._lock:
      return self._newest is not None and self._newest.finished

  async def wait_for(self, version: int) -> tuple[int, Any]:
    """Waits until `version` exists; returns (version, params).

    The params are of this very version while its snapshot is kept, else of the newest.

    Raises:
      RunFailed: it did not come within the timeout, or cannot come any more; a tensor's checksum
        or the probe differs; the reader was closed.
      LineageChanged: the trainer has gone back; begin again with a new reader.
    """
    future = self._future(version)
    try:
      # Not asyncio.wait_for, which in Python 3.11 may lose a cancellation.
      async with asyncio.timeout(self._timeout):
        await asyncio.wrap_future(future)
    except TimeoutError:
      raise RunFailed(
        f"the explorer waited {self._timeout:.0f} s (sync.timeout) for version {version}; the "
        f"trainer's newest in {self.directory} is {self.version}; does it run?"
      ) from None
    finally:
      with self._lock:
        self._waiters = [w for w in self._waiters if w[1] is not future]
    return await asyncio.to_thread(self._load, version)

  def close(self, error: BaseException) -> None:
    """Fails everyone who waits, now and later; rings."""
    with self._lock:
      self._closed = self._closed or error
      waiters, self._waiters = self._waiters, []
    self._unsubscribe()
    for _, future in waiters:
      future.set_exception(self._ended())
    self._bell.ring()

  @property
  def failure(self) -> RunFailed | None:
    """Why no version will come any more (LineageChanged, a damaged manifest, `close`), or None."""
    return None if self._closed is None else self._ended()

  def _ended(self) -> RunFailed:
    error = self._closed
    if isinstance(error, RunFailed):
      return type(error)(*error.args, cause=error)
    return RunFailed(f"the reader of {self.directory} is closed: no version will come", error)

  # --- what is there -----------------------------------------------------------------------------

  def _look(self) -> None:
    """Takes note of the manifest as it is now; the bell calls this from any thread."""
    try:
      with self._looking:  # so that two looks cannot be noted in the wrong order
        ready = self._note(snapshots.read_manifest(self.directory))
    except Exception as error:  # nobody hears a callback's error: who waits shall
      self.close(error)
      return
    for future, failure in ready:
      if failure is None:
        future.set_result(None)
      else:
        future.set_exception(failure)

  def _note(self, found: Manifest | None) -> list[tuple[Future, RunFailed | None]]:
    """Returns the waits that have ended, and how."""
    with self._lock:
      before = self._newest
      if self._closed is not None or found is None:
        return []
      if before is not None and found.lineage != before.lineage:
        raise LineageChanged(
          f"{self.directory}: the trainer went back: it published version {before.version} of "
          f"lineage {before.lineage}, and now version {found.version} of lineage {found.lineage}; "
          "what was under way is abandoned"
        )
      if before is not None and found.version < before.version:
        raise RunFailed(
          f"{self.directory}: version {found.version} came after version {before.version} of the "
          "same lineage: do two trainers write there?"
        )
      self._newest = found
      ready = [w for w in self._waiters if w[0] <= found.version or found.finished]
      self._waiters = [w for w in self._waiters if w not in ready]
    return [(f, None if v <= found.version else _never(v, found)) for v, f in ready]

  def _future(self, version: int) -> Future:
    future: Future = Future()
    future.set_running_or_notify_cancel()  # a waiter that gives up must not fail who publishes
    with self._lock:
      newest = self._newest
      if self._closed is not None:
        future.set_exception(self._ended())
      elif newest is not None and newest.version >= version:
        future.set_result(None)
      elif newest is not None and newest.finished:
        future.set_exception(_never(version, newest))
      else:
        self._waiters.append((version, future))
    return future

  # --- reading -----------------------------------------------------------------------------------

  def _load(self, version: int) -> tuple[int, Any]:
    """The exact version when it is kept, else the newest; checked. Blocks."""
    with self._loading:
      while True:
        with self._lock:
          if self._closed is not None:
            raise self._ended()
          newest = self._newest
        assert newest is not None, "a wait has ended, so there is one"
        exact = self.directory / snapshots.folder(newest.lineage, version)
        manifest = newest if version == newest.version else snapshots.read_manifest(exact) or newest
        if self._loaded is not None and self._loaded[0] == manifest.version:
          return self._loaded
        self._loaded = None  # so that it need not stay in memory beside the new one
        try:
          self._loaded = manifest.version, self._read(manifest)
          return self._loaded
        except SnapshotGone as gone:
          self._look()
          if manifest is newest and self._newest == newest:
            raise RunFailed(f"{gone}: its manifest names it, but it is not there") from gone

  def _read(self, manifest: Manifest) -> Any:
    params = snapshots.read(self.directory, manifest, self._shardings)
    what = f"version {manifest.version} read from {self.directory / manifest.path}"
    compare(manifest.checksums, checksums(params, launch=self._launch), what)
    if jnp.dtype(manifest.dtype) != self._dtype:
      params = self._run(self._cast, params)
    if self._probe is not None:
      self._probe.check(manifest.version, params, manifest.probe)
    return params


def _caster(dtype: Any) -> Callable[[Any], Any]:
  return jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params))


def _never(version: int, newest: Manifest) -> RunFailed:
  return RunFailed(
    f"version {version} will not come: the trainer has finished with version {newest.version}"
  )
