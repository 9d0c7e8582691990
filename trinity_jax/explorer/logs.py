"""The token logs of one run: which of them a call continues, and which it begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trinity_jax.explorer.dialogue import Dialogue, Messages, Tools
from trinity_jax.models.tokenizer import Tokenizer


class Logs:
  """Logs that begin when a call fits none, and stay if it brought a reply.

  Attributes:
    all: every log, those included whose first reply is still to come.
    recent: logs by their last replies, the latest last.
  """

  def __init__(self, tokenizer: Tokenizer):
    self.all: list[Dialogue] = []
    self.recent: list[Dialogue] = []
    self._tokenizer = tokenizer

  @property
  def recorded(self) -> list[Dialogue]:
    """Those with replies of their own, in the order in which they began."""
    return sorted((d for d in self.all if d.recorded), key=lambda d: d.number)

  def latest(self) -> Dialogue:
    """The log that bare tokens go to: that of the last reply, else the first, else a new one."""
    return next(reversed(self.recent), None) or next(iter(self.all), None) or self._begin()

  def for_messages(self, messages: Messages, tools: Tools) -> Dialogue:
    """The log that the messages continue, or a new one."""
    kept = [(d.extended_by(messages, tools), not d.busy, -d.number) for d in self.all]
    if not kept or max(kept)[0] == 0:
      return self._begin()
    turns, log = max(kept)[0], self.all[kept.index(max(kept))]
    if turns == len(log.turns) and not log.busy:
      return log
    return self._begin(log.branch(turns, self._number()))

  def for_tokens(self, tokens: Sequence[int]) -> Dialogue:
    """The longest log that the tokens extend, or a new one."""
    fits = [d for d in self.all if not d.busy and list(tokens[: len(d.tokens)]) == d.tokens]
    return max(fits, key=lambda d: len(d.tokens), default=None) or self._begin()

  @contextmanager
  def held(self, log: Dialogue) -> Iterator[None]:
    """Nobody else continues the log meanwhile; one without a reply of its own is dropped again."""
    log.busy = True
    try:
      yield
    finally:
      log.busy = False
      if not log.recorded:
        self.all.remove(log)

  def replied(self, log: Dialogue) -> None:
    """The log has got the run's last reply."""
    self.recent = [*(d for d in self.recent if d is not log), log]

  def _begin(self, log: Dialogue | None = None) -> Dialogue:
    log = log or Dialogue(self._tokenizer, self._number())
    self.all.append(log)
    return log

  def _number(self) -> int:
    used = {d.number for d in self.all}
    return next(i for i in range(len(used) + 1) if i not in used)
