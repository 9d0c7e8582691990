"""The optimizer: optax AdamW (or SGD), learning-rate schedule, global norm clipping."""

from __future__ import annotations

import jax
import optax

from trinity_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then constant, cosine or linear decay to min_ratio x peak."""
  peak, end = config.learning_rate, config.learning_rate * config.min_ratio
  rest = max(1, total_steps - config.warmup_steps)
  after = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, rest, config.min_ratio),
    "linear": optax.linear_schedule(peak, end, rest),
  }[config.schedule]
  if not config.warmup_steps:
    return after
  # Step 0 already learns: warm-up runs over peak/w, 2 peak/w, ..., peak.
  first = peak / config.warmup_steps
  warmup = optax.linear_schedule(first, peak, max(1, config.warmup_steps - 1))
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(specs) -> object:
  """Weight decay applies to matrices only: True where a ParamSpec has two dims besides layers."""
  return jax.tree.map(
    lambda s: len([a for a in s.axes if a != "layers"]) >= 2,
    specs,
    is_leaf=lambda s: hasattr(s, "axes"),
  )


def make_optimizer(
  config: OptimizerConfig, total_steps: int, specs, updates_per_step: int = 1
) -> optax.GradientTransformation:
  """Returns clip-by-global-norm followed by AdamW (Loshchilov & Hutter 2019) or SGD.

  Args:
    config: hyper-parameters.
    total_steps: length of the schedule.
    specs: pytree of ParamSpec, for the weight decay mask.
    updates_per_step: optax counts updates, the schedule steps.
  """
  of_step = learning_rate(config, total_steps)
  rate = of_step
  if updates_per_step > 1:
    rate = lambda count: of_step(count // updates_per_step)
  if config.name == "sgd":
    update = optax.sgd(rate)
  else:
    update = optax.adamw(
      rate,
      b1=config.beta1,
      b2=config.beta2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask(specs),
    )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
