"""Do prompts fit? Looked at before a run starts, over a sample, so that it stays cheap."""

from __future__ import annotations

from collections.abc import Sequence

from trinity_jax.config import SamplerConfig, TasksetConfig
from trinity_jax.errors import UserError
from trinity_jax.experience import ExperienceId, Task
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.tasks.demonstrations import given

SAMPLE = 256  # tasks looked at: about 0.1 s of tokenising


def spread(tasks: Sequence[Task], most: int = SAMPLE) -> list[Task]:
  """At most `most` tasks, evenly spaced."""
  count = min(most, len(tasks))
  return [tasks[i * len(tasks) // count] for i in range(count)]


def check_given(
  data: str, tasks: Sequence[Task], tokenizer: Tokenizer, limits: SamplerConfig
) -> None:
  """Raises UserError, naming the row, when one of a sample of given texts does not fit."""
  for task in spread(tasks):
    given(data, task, tokenizer, ExperienceId(0, task.index, 0, 0), limits)


def check_prompts(
  config: TasksetConfig, tasks: Sequence[Task], tokenizer: Tokenizer, limit: int
) -> str:
  """Tokenises up to SAMPLE prompts of a taskset that is sampled from.

  A prompt that is too long ends its run with StopReason.PROMPT_TOO_LONG. That is a value, not an
  error, but when no prompt fits, a run would sample and train nothing.

  Args:
    config: of the taskset; workflows other than single_turn build their own prompts: not checked.
    limit: sampler.max_prompt_length.

  Returns:
    A warning when some prompts are too long, else "".

  Raises:
    UserError: none of the prompts fits, or the chat template refuses one.
  """
  if config.workflow != "single_turn":
    return ""
  looked_at = spread(tasks)
  count = len(looked_at)
  lengths = [
    len(tokenizer.apply_chat_template(t.messages, add_generation_prompt=True)) for t in looked_at
  ]
  long = [(n, t.index) for n, t in zip(lengths, looked_at) if n > limit]
  if not long:
    return ""
  of = "all" if count == len(tasks) else f"a sample of {count} of {len(tasks)}"
  if len(long) == count:
    shortest, row = min(long)
    raise UserError(
      f"taskset {config.name!r}: no prompt ({of}) fits config.sampler.max_prompt_length = {limit};"
      f" the shortest has {shortest} tokens with its chat template (row {row}, counted from 0); "
      f"raise the limit to at least {max(lengths)}"
    )
  longest, row = max(long)
  return (
    f"taskset {config.name!r}: {len(long)} of {count} prompts looked at are longer than "
    f"sampler.max_prompt_length = {limit} (the longest: {longest} tokens, row {row}, counted from "
    "0); their runs end as prompt_too_long and teach nothing"
  )
