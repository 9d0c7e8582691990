"""What a workflow sees: a Model that records every token it was shown and every token it wrote.

A workflow is `async def run(task, model) -> float | dict[str, float] | None`: it talks to the
model and returns a reward, a dict of reward components (their sum counts), or None to have the
last response graded by the taskset's reward function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from trinity_jax import plugins
from trinity_jax.errors import UserError, suggestion
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.rewards import Score
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.rollout_engine import Member
from trinity_jax.sampler.sampling import request_key

Reward = float | Mapping[str, float] | None
Workflow = Callable[[Task, "Model"], Awaitable[Reward]]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How responses are drawn: temperature (0 is greedy), top_p, top_k, tokens per response."""

  temperature: float
  limit: int
  top_p: float = 1.0
  top_k: int = 0


class PromptTooLong(UserError):
  """The dialogue no longer fits the sampler; ends the run with StopReason.PROMPT_TOO_LONG."""


class Model:
  """One run's handle on the policy, with an append-only token log.

  Token in, token out: turn t's prompt is a prefix of turn t + 1's, which `generate` asserts; text
  is tokenised once and never again to train on.
  """

  def __init__(
    self,
    sampler: Member,
    tokenizer: Tokenizer,
    id: ExperienceId,
    seed: int,
    params: SamplingParams,
    max_prompt: int,
    stream: int = 0,
    priority: int = 0,
  ):
    self.tokenizer = tokenizer
    self.id = id
    self.text = ""  # the last response
    self.messages: list[dict[str, Any]] = []
    self.stop_reason = StopReason.RUNNING
    self.turns = 0
    self.in_sampler: Callable[[], AbstractContextManager] = nullcontext  # entered while it waits
    self._asking = False
    self._sampler, self._seed, self._params = sampler, seed, params
    self._max_prompt, self._stream, self._priority = max_prompt, stream, priority
    self._log: list[tuple[np.ndarray, ...]] = []
    self._tokens: list[int] = []

  async def generate(self, tokens: Sequence[int]) -> np.ndarray:
    """Continues a token log; returns the sampled tokens i32[n] (stop token included).

    Args:
      tokens: the whole prompt so far; must extend what this run has already seen and written.

    Raises:
      PromptTooLong: the prompt exceeds sampler.max_prompt_length.
      ValueError: the prompt rewrites history, or another call has not ended yet.
    """
    if self._asking:
      raise ValueError(
        f"run {self.id}: a second call to the model before the first has ended; a run's turns form "
        "one token log, so await them one after the other"
      )
    tokens = [int(t) for t in tokens]
    seen = len(self._tokens)
    if tokens[:seen] != self._tokens:
      raise ValueError(
        f"run {self.id}: the prompt of turn {self.turns} does not start with the tokens of the "
        f"turns before ({seen}); append to the log instead of rewriting it"
      )
    if len(tokens) > self._max_prompt:
      raise PromptTooLong(
        f"prompt of {len(tokens)} tokens exceeds sampler.max_prompt_length = {self._max_prompt}; "
        "raise it or shorten the task"
      )
    p = self._params
    request = Request(
      tokens=np.array(tokens, np.int32),
      key=request_key(self._seed, self._stream, *self.id, self.turns),
      order=(self._stream, *self.id, self.turns),
      limit=p.limit,
      stop_ids=self.tokenizer.stop_ids,
      temperature=p.temperature,
      top_p=p.top_p,
      top_k=p.top_k,
      priority=self._priority,
      salt=(self._stream, self.id.batch),
    )
    self._asking = True
    try:
      with self.in_sampler():
        out = await self._sampler.generate(request)
    finally:
      self._asking = False
    new = np.array(tokens[seen:], np.int32)
    n = len(new)
    self._append(new, np.zeros(n), np.full(n, -1), np.zeros(n, bool), action=False)
    self._append(out.tokens, out.logprobs, out.versions, out.mixed, action=True)
    self.stop_reason, self.turns = out.stop_reason, self.turns + 1
    return out.tokens

  async def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
    """One turn of a dialogue as text: renders the template once, returns the response's text."""
    tokens = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    response = await self.generate(tokens)
    self.text = self.tokenizer.decode(response.tolist())
    self.messages = [*map(dict, messages), {"role": "assistant", "content": self.text}]
    return self.text

  def _append(self, tokens, logprobs, versions, mixed, action: bool) -> None:
    self._tokens.extend(int(t) for t in tokens)
    mask = np.full(len(tokens), action)
    self._log.append((np.asarray(tokens, np.int32), mask, logprobs, versions, mixed))

  def experience(self, score: Score, info: dict[str, Any]) -> Experience:
    """The run, of at least one turn, as one experience."""
    tokens, mask, logprobs, versions, mixed = (np.concatenate(x) for x in zip(*self._log))
    response = int(mask.sum())
    return Experience(
      tokens=tokens,
      action_mask=mask,
      logprobs=logprobs,
      versions=versions,
      mixed=mixed if mixed.any() else None,
      id=self.id,
      reward=score.total,
      stop_reason=self.stop_reason,
      temperature=self._params.temperature or 1.0,
      messages=self.messages,
      metrics={
        **{f"rewards/{name}": float(value) for name, value in score.components.items()},
        "response_length": response,
        "prompt_length": len(tokens) - response,
        "num_turns": self.turns,
        "mixed_tokens": int(mixed.sum()),
      },
      info=info,
    )


def find_workflow(name: str) -> Workflow:
  """Returns a built-in workflow or the user's 'module:function'.

  Raises:
    UserError: no such workflow.
  """
  from trinity_jax.explorer.workflows import WORKFLOWS  # they import this module

  if name in WORKFLOWS:
    return WORKFLOWS[name]
  if ":" in name:
    return plugins.load(name, "workflow")
  raise UserError(
    f"config.taskset.workflow = {name!r}: no such workflow{suggestion(name, WORKFLOWS)} (or name "
    "your own as 'module:function')"
  )
