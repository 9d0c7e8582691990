"""One append-only token log and the messages it stands for.

Text is tokenised once. Messages that extend what was recorded continue the log token for token:
the template is rendered with a mark in place of the last reply, and only what follows the mark is
tokenised, so that it does not matter how a template writes earlier turns (Qwen3's strips their
reasoning).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.tool_calls import canonical, for_template, reasoning_of
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Completion

LONG = 16_384  # characters; longer dialogues are tokenised off the event loop

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclasses.dataclass
class Turn:
  """A recorded reply: where tokens and messages stand after it, and its reward so far."""

  tokens: int
  messages: int
  reward: float | None = None


class Dialogue:
  """One token log.

  Attributes:
    number: which of its run's logs.
    tokens: everything the policy was shown and wrote.
    messages: the same as text, as they were given; empty for a log of bare tokens.
    turns: replies so far; `inherited` of them belong to the log that this one branched from, and
      are prompt here.
    busy: a request that continues the log is under way.
    stop_reason: of the last reply.
  """

  def __init__(self, tokenizer: Tokenizer, number: int = 0):
    self.number = number
    self.tokens: list[int] = []
    self.messages: list[dict[str, Any]] = []
    self.turns: list[Turn] = []
    self.inherited = 0
    self.busy = False
    self.stop_reason = StopReason.RUNNING
    self._tokenizer = tokenizer
    self._known: list[tuple[str, str]] = []  # what the messages say, and their reasoning
    self._tools = ""
    self._bare = False
    self._parts: list[tuple[np.ndarray, ...]] = []

  @property
  def recorded(self) -> int:
    """Replies that are this log's own."""
    return len(self.turns) - self.inherited

  @property
  def bare(self) -> bool:
    """Whether tokens were given that no messages stand for."""
    return self._bare

  def extended_by(self, messages: Messages, tools: Tools) -> int:
    """How many of the turns `messages` keep as they were, 0 for another dialogue.

    Clients may leave the reasoning of earlier replies out, but not change it.
    """
    if self._bare or not self.turns or _tools(tools) != self._tools:
      return 0
    same = 0
    for (said, thought), theirs in zip(self._known, messages):
      if said != canonical(theirs) or reasoning_of(theirs) not in ("", thought):
        break
      same += 1
    return sum(turn.messages <= same for turn in self.turns)

  def branch(self, turns: int, number: int) -> Dialogue:
    """A new log that begins with this one's first turns as its prompt, none of it trained on."""
    out, at = Dialogue(self._tokenizer, number), self.turns[turns - 1]
    out.messages, out._known = self.messages[: at.messages], self._known[: at.messages]
    out._tools, out.inherited = self._tools, turns
    out.turns = [Turn(t.tokens, t.messages) for t in self.turns[:turns]]
    out._show(self.tokens[: at.tokens])
    return out

  def prompt(self, messages: Messages, tools: Tools) -> list[int]:
    """Token ids i32[n] for the next reply, beginning with the whole log.

    Raises:
      UserError: the template refuses the messages, or leaves replies out.
    """
    for_us = [for_template(m) for m in messages]
    if not self.turns:
      return self._tokenizer.encode(self._render(for_us, tools))
    mark, whole = "reply-mark", json.dumps(for_us, default=str)
    while mark in whole:
      mark += "k"
    for turn in self.turns:  # what was said before the mark does not matter, only that it renders
      if calls := for_us[turn.messages - 1].get("tool_calls"):
        for_us[turn.messages - 1]["tool_calls"] = calls[:1]  # Llama's template allows no more
    last = self.turns[-1].messages - 1
    for_us[last] = {"role": "assistant", "content": mark}
    text = self._render(for_us, tools)
    _, found, after = text.rpartition(mark)
    if not found:
      raise UserError(
        f"the chat template leaves the reply of turn {len(self.turns) - 1} out of the dialogue, so "
        "no later turn can continue its tokens; use a template that keeps replies"
      )
    return self.tokens + self._after_stop(self._tokenizer.encode(after))

  def _render(self, messages: Messages, tools: Tools) -> str:
    return self._tokenizer.chat_text(messages, add_generation_prompt=True, tools=tools or None)

  def _after_stop(self, ids: list[int]) -> list[int]:
    """What follows a reply, without the template's end of turn if the policy wrote one itself."""
    stops = self._tokenizer.stop_ids
    if self.tokens[-1] not in stops:
      return ids
    for i, token in enumerate(ids):
      if token in stops:
        return ids[i + 1 :]
      if self._tokenizer.decode([token]).strip():
        break
    return ids

  def record(
    self, prompt: Sequence[int], reply: Completion, messages: Messages | None, tools: Tools = ()
  ) -> None:
    """Appends a turn.

    Args:
      prompt: what was asked; begins with the log.
      messages: the whole dialogue after the reply; None where only tokens were given.
    """
    seen = len(self.tokens)
    if list(prompt[:seen]) != self.tokens:
      raise AssertionError("a prompt that does not begin with the log")
    self._show(prompt[seen:])
    self._append(reply.tokens, reply.logprobs, reply.versions, reply.mixed, action=True)
    if messages is None:
      self._bare = True
    elif not self._bare:
      self.messages = [dict(m) for m in messages]
      self._known = [(canonical(m), reasoning_of(m)) for m in messages]
      self._tools = _tools(tools)
    self.turns.append(Turn(len(self.tokens), len(self.messages)))
    self.stop_reason = reply.stop_reason

  def _show(self, tokens: Sequence[int]) -> None:
    n = len(tokens)
    self._append(tokens, np.zeros(n), np.full(n, -1), np.zeros(n, bool), action=False)

  def _append(self, tokens, logprobs, versions, mixed, action: bool) -> None:
    self.tokens.extend(int(t) for t in tokens)
    mask = np.full(len(tokens), action)
    self._parts.append((np.asarray(tokens, np.int32), mask, logprobs, versions, mixed))

  def columns(self) -> dict[str, np.ndarray]:
    """tokens i32[L], action_mask bool[L], logprobs f32[L], versions i32[L], mixed bool[L]."""
    names = ("tokens", "action_mask", "logprobs", "versions", "mixed")
    return dict(zip(names, (np.concatenate(column) for column in zip(*self._parts))))

  def token_rewards(self, final: float) -> np.ndarray | None:
    """f32[L], each turn's reward on its last token and `final` on the last; None without rewards.

    They add up to the experience's reward.
    """
    if all(t.reward is None for t in self.turns):
      return None
    out = np.zeros(len(self.tokens), np.float32)
    for turn in self.turns[self.inherited :]:
      out[turn.tokens - 1] += turn.reward or 0.0
    out[-1] += final
    return out

  def experience(
    self, id: ExperienceId, score: Score, temperature: float, info: dict[str, Any]
  ) -> Experience:
    """The log as an experience with the run's score and its turns' own rewards."""
    c = self.columns()
    response = int(c["action_mask"].sum())
    return Experience(
      c["tokens"],
      c["action_mask"],
      c["logprobs"],
      c["versions"],
      id,
      mixed=c["mixed"] if c["mixed"].any() else None,
      reward=score.total + sum(t.reward or 0.0 for t in self.turns),
      token_rewards=self.token_rewards(score.total),
      stop_reason=self.stop_reason,
      temperature=temperature,
      messages=self.messages,
      metrics={
        **{f"rewards/{name}": float(value) for name, value in score.components.items()},
        "response_length": response,
        "prompt_length": len(self.tokens) - response,
        "num_turns": self.recorded,
        "mixed_tokens": int(c["mixed"].sum()),
      },
      info=info,
    )


def _tools(tools: Tools) -> str:
  return json.dumps(list(tools), sort_keys=True)
