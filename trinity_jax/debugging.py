"""One task through one workflow against a live sampler, with everything printed.

For whoever writes a workflow, an environment or a reward: what the model was shown token by token,
what it wrote with which log-probs, what the reward made of it, and the traceback of what raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trinity_jax import build
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.config import Config, resolve
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, Task
from trinity_jax.explorer.grading import grading
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.rewards import make_reward
from trinity_jax.explorer.workflow import SamplingParams
from trinity_jax.latest import exploring_stage, newest_model, sampling
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.monitor.text import sanitize
from trinity_jax.sampler.rollout_engine import RolloutEngine

MOST_TEXT = 4000  # characters of one prompt or response


def debug(
  config: Any, workdir: str | Path, task: int = 0, *, report: Callable[[str], None] = print
) -> Experience:
  """Runs task number `task` of the training taskset once; returns what became of it, its last
  token log where the run has several (explorer.max_logs says how many at most).

  The policy is the newest one that WORKDIR holds in Hugging Face form, else the one that the run
  would start from.

  Args:
    config: ConfigDict or Config; of several stages the first that explores counts.
    report: called with each part of what is printed.

  Raises:
    UserError: no stage explores, or the taskset has no such task.
    RunFailed: the sampler died.
  """
  config = config if isinstance(config, Config) else resolve(config)
  workdir = Path(workdir).absolute()
  stage = exploring_stage(config)
  model_path = newest_model(config, workdir)
  taskset = build.training_taskset(stage, make_algorithm(stage.algorithm))
  if not 0 <= task < len(taskset):
    raise UserError(f"--task={task}: the taskset has the tasks 0 to {len(taskset) - 1}")
  chosen = taskset.tasks[task]
  tokenizer = Tokenizer.load(model_path)
  report(f"model: {model_path}\nworkflow: {stage.taskset.workflow}  reward: {stage.taskset.reward}")
  report(describe_task(chosen))
  with sampling(stage, model_path) as engine:
    logs = asyncio.run(_run(engine, stage, tokenizer, chosen))
  for i, experience in enumerate(logs):
    if len(logs) > 1:
      report(f"--- token log {i + 1} of {len(logs)}")
    report(describe_run(experience, tokenizer))
  return logs[-1]


async def _run(engine: RolloutEngine, stage: Config, tokenizer: Tokenizer, task: Task):
  groups = Groups(stage, engine, tokenizer, lambda _: contextlib.nullcontext())
  reward = make_reward(
    stage.taskset.reward, stage.taskset.reward_args, workers=stage.explorer.reward_workers
  )
  s = stage.sampler
  runner = groups.runner(
    stage.taskset.workflow,
    grading(reward),
    SamplingParams(s.temperature, s.max_response_length, s.top_p, s.top_k),
    TRAIN_STREAM,
  )
  ids = group_ids(1, [0], 1)
  groups.announce(TRAIN_STREAM, ids)
  async with contextlib.aclosing(groups):
    return await groups.run(runner, task, ids[0])


def describe_task(task: Task) -> str:
  """A task as text."""
  lines = [f"task {task.index}"]
  lines += [f"  {m['role']}: {_text(str(m['content']))}" for m in task.messages]
  if task.truth:
    lines.append(f"  truth: {_text(task.truth)}")
  return "\n".join(lines)


def describe_run(experience: Experience, tokenizer: Tokenizer) -> str:
  """A run as text: what was shown, what was written with its log-probs, how it ended."""
  e, lines, start = experience, [], 0
  for action, length in ((k, len(list(g))) for k, g in itertools.groupby(e.action_mask.tolist())):
    tokens = e.tokens[start : start + length]
    if action:
      logprobs = e.logprobs[start : start + length]
      versions = sorted(set(e.versions[start : start + length].tolist()))
      lines.append(
        f"wrote {length} tokens (mean log-prob {logprobs.mean():.3f}, version "
        f"{', '.join(map(str, versions))}):"
      )
      lines.append("  " + _pieces(tokenizer, tokens, logprobs))
    else:
      lines.append(f"was shown {length} tokens:")
      lines.append("  " + _text(tokenizer.decode(tokens.tolist(), skip_special_tokens=False)))
    start += length
  lines.append(f"ended: {e.stop_reason.name.lower()}")
  if e.reward is not None:
    parts = {k: v for k, v in e.metrics.items() if k.startswith("rewards/")}
    lines.append(f"reward: {e.reward:g} ({', '.join(f'{k} {v:g}' for k, v in parts.items())})")
  rest = {k: v for k, v in e.metrics.items() if not k.startswith("rewards/")}
  lines.append("metrics: " + ", ".join(f"{k} {v:.4g}" for k, v in rest.items()))
  for name, value in e.info.items():
    first, *more = str(value).splitlines() or [""]
    lines += [f"{name}: {_text(first)}", *(f"  {_text(line)}" for line in more)]
  return "\n".join(lines)


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, logprobs: np.ndarray) -> str:
  pieces = [tokenizer.decode([t], skip_special_tokens=False) for t in tokens.tolist()]
  return _text(" ".join(f"{p}({x:.2f})" for p, x in zip(pieces, logprobs)))


def _text(text: str) -> str:
  return sanitize(text, MOST_TEXT)
