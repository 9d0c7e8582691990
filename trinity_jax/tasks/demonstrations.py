"""Given texts as experiences: demonstrations, preference pairs, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity_jax.config import SamplerConfig
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, Source, StopReason, Task
from trinity_jax.models.tokenizer import Tokenizer

# Fields of a task that each kind of data needs (algorithms.table.DATA).
REQUIRED = {
  "rollouts": (), "demonstrations": ("response",), "text": ("text",),
  "preferences": ("chosen", "rejected"),
}  # fmt: skip
PER_TASK = {"demonstrations": 1, "text": 1, "preferences": 2}


def given(
  data: str, task: Task, tokenizer: Tokenizer, id: ExperienceId, limits: SamplerConfig
) -> list[Experience]:
  """What is learned from a task without sampling: PER_TASK[data] experiences.

  Args:
    data: demonstrations, text, or preferences (chosen with reward 1, rejected with reward 0).
    id: of the first; the second is the task's next run.

  Raises:
    UserError: the row lacks a text, or one is longer than the limits.
  """
  prompt, response = limits.max_prompt_length, limits.max_response_length
  if data == "text":
    return [plain_text(task, tokenizer, id, prompt + response)]
  if data == "demonstrations":
    return [demonstration(task, task.response, tokenizer, id, prompt, response)]
  return [
    demonstration(task, text, tokenizer, id._replace(run=run), prompt, response, reward)
    for run, (text, reward) in enumerate(((task.chosen, 1.0), (task.rejected, 0.0)))
  ]


def plain_text(task: Task, tokenizer: Tokenizer, id: ExperienceId, limit: int) -> Experience:
  """A text and its end, every token but the first trained on (continued pre-training).

  Raises:
    UserError: the text is empty or longer than `limit` tokens.
  """
  tokens = [*tokenizer.encode(task.text or ""), tokenizer.stop_ids[0]]
  if len(tokens) < 2:
    raise UserError(f"{task.taskset} row {task.index}: its text is empty")
  if len(tokens) > limit:
    raise UserError(
      f"{task.taskset} row {task.index}: its text has {len(tokens)} tokens, more than "
      f"sampler.max_prompt_length + max_response_length = {limit}; raise a limit or split the text"
    )
  return _written(task, tokens, 1, id, [{"role": "text", "content": task.text}])


def demonstration(
  task: Task,
  text: str | None,
  tokenizer: Tokenizer,
  id: ExperienceId,
  max_prompt: int,
  max_response: int,
  reward: float | None = None,
) -> Experience:
  """Prompt (chat template) plus `text` plus stop token; the last two are trained on.

  Raises:
    UserError: the row has no such text, or is longer than the limits.
  """
  if text is None:
    raise UserError(
      f"{task.taskset} row {task.index} has no demonstration; supervised training needs "
      "config.taskset.response_key"
    )
  prompt = tokenizer.apply_chat_template(task.messages, add_generation_prompt=True)
  response = [*tokenizer.encode(text), tokenizer.stop_ids[0]]
  for what, tokens, limit in (
    ("prompt", prompt, max_prompt),
    ("response", response, max_response),
  ):
    if len(tokens) > limit:
      raise UserError(
        f"{task.taskset} row {task.index}: its {what} has {len(tokens)} tokens, more than "
        f"sampler.max_{what}_length = {limit}; raise the limit or leave the row out"
      )
  messages = [*task.messages, {"role": "assistant", "content": text}]
  return _written(task, [*prompt, *response], len(prompt), id, messages, reward)


def _written(
  task: Task, tokens: Sequence[int], prompt: int, id: ExperienceId, messages: Any, reward=None
) -> Experience:
  count = len(tokens)
  return Experience(
    tokens=np.array(tokens, np.int32),
    action_mask=np.arange(count) >= prompt,
    logprobs=np.zeros(count),
    versions=np.full(count, -1),
    id=id,
    reward=reward,
    source=Source.EXPERT,
    stop_reason=StopReason.DEMONSTRATION,
    messages=messages,
    metrics={"response_length": count - prompt, "prompt_length": prompt},
  )
