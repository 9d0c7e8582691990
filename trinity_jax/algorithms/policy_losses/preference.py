"""Preference pairs: DPO. A pair's loss stands at every token of both of its members.

With aggregation seq-mean-token-mean the step's loss is then the mean over the pairs (a member
without tokens has nothing to carry its half). Both members of a pair must be in one micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import masked, sequence_sum
from trinity_jax.algorithms.parts import by_option, whole_step
from trinity_jax.algorithms.policy_losses.common import (
  POSITIVE,
  Loss,
  check,
  check_choice,
  to_tokens,
)


class Pairs(NamedTuple):
  """Per sequence, [N]: the other member, whether it is the preferred one, whether there is one."""

  partner: jax.Array
  chosen: jax.Array
  paired: jax.Array


def find_pairs(rewards: jax.Array, pair_ids: jax.Array, valid: jax.Array | None) -> Pairs:
  """Who belongs to whom. A pair is two valid sequences of one number >= 0 with unequal rewards."""
  rewards, pair_ids = jnp.asarray(rewards), jnp.asarray(pair_ids)
  there = pair_ids >= 0 if valid is None else (pair_ids >= 0) & valid
  same = (pair_ids[:, None] == pair_ids[None, :]) & there[:, None] & there[None, :]
  same &= ~jnp.eye(len(pair_ids), dtype=bool)
  partner = jnp.argmax(same, axis=1)
  other = rewards[partner]
  # Written so that a NaN is no preference.
  paired = (jnp.sum(same, axis=1) == 1) & ((rewards > other) | (rewards < other))
  return Pairs(partner, paired & (rewards > other), paired)


def _margins(logprob, ref_logprob, mask, sequence_index, num_sequences, pairs):
  """([N] log pi(y)/ref(y), [N] that of the chosen less that of the rejected)."""
  logprob, ref_logprob = masked(mask, logprob, ref_logprob)
  gain = sequence_sum(logprob - ref_logprob, mask, sequence_index, num_sequences)
  other = gain[pairs.partner]
  return gain, jnp.where(pairs.paired, jnp.where(pairs.chosen, gain - other, other - gain), 0)


def _loss(margin, label_smoothing):
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * (
    jax.nn.log_sigmoid(-margin)
  )


def _stats(gain, margin, pairs, mask, sequence_index, num_sequences, beta):
  # A micro-batch counts the pairs it holds.
  tokens = sequence_sum(jnp.ones(jnp.shape(mask)), mask, sequence_index, num_sequences)
  here = pairs.chosen & ((tokens > 0) | (tokens[pairs.partner] > 0))
  lonely = (tokens > 0) & ~pairs.paired
  return {
    "dpo/accuracy": stats.mean(margin > 0, here),
    "dpo/margin": stats.mean(beta * margin, here),
    "dpo/chosen": stats.mean(beta * gain, here),
    "dpo/rejected": stats.mean(beta * gain[pairs.partner], here),
    "dpo/pairs": stats.total(here),
    "dpo/unpaired": stats.total(lonely),
  }


def total_margin(
  prox_logprob: jax.Array,
  ref_logprob: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  rewards: jax.Array,
  pair_ids: jax.Array,
  valid: jax.Array | None = None,
) -> jax.Array:
  """The sum of all pairs' margins over the step, at every token (X)."""
  pairs = find_pairs(rewards, pair_ids, valid)
  _, margin = _margins(prox_logprob, ref_logprob, mask, sequence_index, num_sequences, pairs)
  return jnp.broadcast_to(jnp.sum(jnp.where(pairs.chosen, margin, 0)), jnp.shape(mask))


@whole_step(step_margin=total_margin)
def dpo_summed(
  logprob: jax.Array,
  ref_logprob: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  rewards: jax.Array,
  pair_ids: jax.Array,
  step_margin: jax.Array,
  valid: jax.Array | None = None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  variant: str = "trinity",
) -> Loss:
  """`dpo` of the sum of all margins, as Trinity-RFT 0.6 released it: one -log sigmoid(beta sum).

  There the sum is over a micro-batch; here over the optimizer step, so that it does not depend on
  the split. One confident pair switches the gradients of all others off. The sum is
  taken with the policy as it is when the step begins; value and gradient under seq-mean-token-mean
  are exactly those of the loss above.

  Args and raises: see dpo; step_margin is `total_margin`'s.
  """
  check("beta", beta, POSITIVE)
  check("label_smoothing", label_smoothing, 0.0, 1.0)
  check_choice("variant", variant, ("trinity",))
  pairs = find_pairs(rewards, pair_ids, valid)
  gain, margin = _margins(logprob, ref_logprob, mask, sequence_index, num_sequences, pairs)
  # The mean over pairs divides by their number.
  count = jnp.sum(pairs.chosen)
  own = to_tokens(count * (margin - jax.lax.stop_gradient(margin)), mask, sequence_index)
  (step_margin,) = masked(mask, step_margin)
  loss = _loss(beta * (step_margin + own), label_smoothing)
  paired = to_tokens(pairs.paired, mask, sequence_index)
  return jnp.where(paired, loss, 0), _stats(
    gain, margin, pairs, mask, sequence_index, num_sequences, beta
  )


@by_option("variant", {"trinity": dpo_summed})
def dpo(
  logprob: jax.Array,
  ref_logprob: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  rewards: jax.Array,
  pair_ids: jax.Array,
  valid: jax.Array | None = None,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  nll_coef: float = 0.0,
  variant: str = "paper",
) -> Loss:
  """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) for each pair, e = label_smoothing.

  d = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected), sums over the responses' tokens.
  DPO, arXiv 2305.18290, eq. 7; smoothing: conservative DPO. Sequences without a partner, or with
  one of equal reward, have loss 0 and count as `dpo/unpaired`.

  The margin alone may grow while both responses lose probability (`dpo/chosen` falls below 0);
  nll_coef x -log pi(chosen) per token of it, added to the pair's loss, holds the chosen one up
  (arXiv 2404.19733, eq. 1).

  Args:
    logprob: of the policy being trained (differentiated).
    ref_logprob: under the reference model.
    mask: bool, True at the tokens of the responses.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static N.
    rewards: [N]; the chosen response is the one with the higher reward.
    pair_ids: int [N]; two sequences of one number are a pair, -1 belongs to none.
    valid: bool [N], None for all.
    beta: strength of the tie to the reference.
    label_smoothing: probability that a preference is recorded the wrong way round.
    nll_coef: weight of the chosen response's negative log-likelihood.
    variant: "paper", or "trinity" for `dpo_summed` (by name, in configs and policy_loss()).

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check("beta", beta, POSITIVE)
  check("label_smoothing", label_smoothing, 0.0, 1.0)
  check("nll_coef", nll_coef, 0.0)
  check_choice("variant", variant, ("paper",))
  pairs = find_pairs(rewards, pair_ids, valid)
  gain, margin = _margins(logprob, ref_logprob, mask, sequence_index, num_sequences, pairs)
  loss = _loss(beta * margin, label_smoothing)
  if nll_coef:
    tokens = sequence_sum(jnp.ones(jnp.shape(mask)), mask, sequence_index, num_sequences)
    total = sequence_sum(logprob, mask, sequence_index, num_sequences)
    nll = -total / jnp.maximum(tokens, 1)
    loss += nll_coef * jnp.where(pairs.chosen, nll, nll[pairs.partner])
  loss = jnp.where(pairs.paired, loss, 0)
  return to_tokens(loss, mask, sequence_index), _stats(
    gain, margin, pairs, mask, sequence_index, num_sequences, beta
  )
