"""Sampler against trainer, and how full the computed rows were: metrics of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trinity_jax.experience import Batch, Experience
from trinity_jax.monitor import metrics as metric


def packing_metrics(batch: Batch) -> dict[str, float]:
  """How full the computed rows were."""
  micros = int(batch.num_micro)
  live = batch.segment_ids[:micros] > 0
  return {
    "packing/efficiency": float(live.mean()) if live.size else 0.0,
    "packing/rows": int(live.any(axis=-1).sum()),
    "packing/micro_batches": micros,
  }


def mixed_tokens(batch: Batch, experiences: Sequence[Experience]) -> np.ndarray:
  """bool[M, B, T]: tokens whose context several versions have computed (Experience.mixed)."""
  out = np.zeros_like(batch.action_mask)
  for i, e in enumerate(experiences):
    if e.mixed is not None and e.mixed.any():
      out[(batch.sequence_index == i) & (batch.segment_ids > 0)] = e.mixed
  return out


def mismatch(
  batch: Batch, logprobs: dict[int, np.ndarray], mixed: np.ndarray
) -> dict[str, float]:
  """Sampler against trainer: both log-probs of a token under the version that sampled it.

  Args:
    batch: packed (numpy).
    logprobs: version -> the trainer's f32[M, B, T].
    mixed: of mixed_tokens: no single version gives these tokens' log-probs.

  Returns:
    logprob_diff/* over the other tokens whose version is among `logprobs`, k1, k3 and ESS of the
    implied importance weights; staleness/* over all sampled tokens.
  """
  trainer, known = np.zeros_like(batch.logprobs), np.zeros_like(batch.action_mask)
  for version, values in logprobs.items():
    here = batch.action_mask & ~mixed & (batch.versions == version)
    trainer[here], known = values[here], known | here
  out = {}
  if known.any():
    difference = trainer[known].astype(np.float64) - batch.logprobs[known]
    ratio = np.exp(np.clip(difference, -20, 20))
    out |= metric.stats(np.abs(difference), "logprob_diff", ("mean", "max"))
    out |= metric.tail(np.abs(difference), "logprob_diff")
    out |= {
      "mismatch/k1": float(-difference.mean()),
      "mismatch/k3": float((ratio - 1 - difference).mean()),
      "mismatch/ess": float(ratio.sum() ** 2 / (ratio**2).sum() / ratio.size),
    }
  sampled = batch.action_mask & (batch.versions >= 0)
  if sampled.any():
    out["staleness/mixed_tokens"] = float(mixed[sampled].mean())
    newest = max(logprobs)
    out |= metric.stats(newest - batch.versions[sampled], "staleness", ("mean", "max"))
  return out
