"""Supervised data: a task's demonstration as an experience."""

from __future__ import annotations

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, Source, StopReason, Task
from trinity_jax.models.tokenizer import Tokenizer


def demonstration(
  task: Task, tokenizer: Tokenizer, id: ExperienceId, max_prompt: int, max_response: int
) -> Experience:
  """Prompt (chat template) plus response plus stop token; the last two are trained on.

  Raises:
    UserError: the row has no response, or is longer than the limits.
  """
  if task.response is None:
    raise UserError(
      f"{task.taskset} row {task.index} has no demonstration; supervised training needs "
      "config.taskset.response_key"
    )
  prompt = tokenizer.apply_chat_template(task.messages, add_generation_prompt=True)
  response = [*tokenizer.encode(task.response), tokenizer.stop_ids[0]]
  for what, tokens, limit in (
    ("prompt", prompt, max_prompt),
    ("response", response, max_response),
  ):
    if len(tokens) > limit:
      raise UserError(
        f"{task.taskset} row {task.index}: its {what} has {len(tokens)} tokens, more than "
        f"sampler.max_{what}_length = {limit}; raise the limit or leave the row out"
      )
  tokens = np.array([*prompt, *response], np.int32)
  return Experience(
    tokens=tokens,
    action_mask=np.arange(len(tokens)) >= len(prompt),
    logprobs=np.zeros(len(tokens)),
    versions=np.full(len(tokens), -1),
    id=id,
    source=Source.EXPERT,
    stop_reason=StopReason.DEMONSTRATION,
    messages=[*task.messages, {"role": "assistant", "content": task.response}],
    metrics={"response_length": len(response), "prompt_length": len(prompt)},
  )
