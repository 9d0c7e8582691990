"""Several samplers behind one interface: one per sub-mesh or process, each with its own cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trinity_jax.sampler.remote import RemoteSampler
from trinity_jax.sampler.scheduler import Sampler


class SamplerPool:
  """Independent samplers that share nothing but the weights they are given.

  A group of runs always goes to the same sampler, chosen by its number and not by load, so that
  prompts are prefilled once and deterministic admission needs no agreement between samplers.
  """

  def __init__(self, samplers: Sequence[Sampler | RemoteSampler]):
    self.samplers = list(samplers)

  @property
  def version(self) -> int:
    """What every sampler has reached."""
    return min(s.version for s in self.samplers)

  @property
  def error(self) -> BaseException | None:
    return next((s.error for s in self.samplers if s.error is not None), None)

  def member(self, order: Sequence[int]) -> Sampler | RemoteSampler:
    """The sampler of the runs whose order begins with (stream, batch, task)."""
    return self.samplers[sum(order[:3]) % len(self.samplers)]

  def start(self) -> None:
    for s in self.samplers:
      s.start()

  def close(self) -> None:
    """Closes all of them, whatever one of them says."""
    errors = []
    for s in self.samplers:
      try:
        s.close()
      except Exception as e:  # the others must not stay behind
        errors.append(e)
    if errors:
      raise errors[0]

  def set_params(self, version: int, params: Any) -> None:
    for s in self.samplers:
      s.set_params(version, params)

  def release(self) -> None:
    for s in self.samplers:
      s.release()

  def describe(self) -> str:
    return "; ".join(f"sampler {i}: {s.describe()}" for i, s in enumerate(self.samplers))

  def metrics(self) -> dict[str, float]:
    """Sums; shares as means."""
    each = [s.metrics() for s in self.samplers]
    return {k: v / (len(each) if k.endswith("_use") else 1) for k, v in _sums(each).items()}

  @property
  def stats(self) -> dict[str, float]:
    """Sums of the samplers' counters; seconds are of all of them together."""
    return _sums([s.stats for s in self.samplers])


def _sums(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """By key; another process's sampler has said nothing yet before its first answer."""
  return {k: sum(m.get(k, 0.0) for m in each) for k in each[0]}
