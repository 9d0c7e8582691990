"""A reply as it is sampled: text that grows token by token, and strings that end it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from trinity_jax.experience import StopReason
from trinity_jax.explorer import reasoning
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Completion, Request, join
from trinity_jax.sampler.rollout_engine import Member


@dataclasses.dataclass(frozen=True)
class Reply:
  """What was sampled, and its text (before the stop string that ended it).

  Attributes:
    thinking: the prompt ends with the tag of reasoning, so that the text begins within it.
  """

  completion: Completion
  text: str
  thinking: bool = False

  @property
  def whole(self) -> str:
    """The text with the tag that the prompt ended with."""
    return reasoning.OPEN + self.text if self.thinking else self.text


class Reader:
  """Turns tokens into text, one at a time.

  Bytes that are no whole character yet, and what may be the beginning of a stop string, are held
  back until they are.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self.text = ""
    self.stopped = False
    self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
    self._ids: list[int] = []
    self._context = self._read = self._given = 0
    self._before = ""  # the text of what is read already, from the context on

  def push(self, *tokens: int) -> bool:
    """Takes the next tokens; True once a stop string is complete.

    To know which token completes one, give them one at a time.
    """
    self._ids.extend(tokens)
    now = self._tokenizer.decode(self._ids[self._context :])
    if len(now) > len(self._before) and not now.endswith("\ufffd"):
      self._add(now[len(self._before) :])
      self._context, self._read = self._read, len(self._ids)
      self._before = self._tokenizer.decode(self._ids[self._context :])
    return self.stopped

  def _add(self, piece: str) -> None:
    old = len(self.text)
    self.text += piece
    found = [self.text.find(s, max(0, old - len(s) + 1)) for s in self._stop]
    if any(i >= 0 for i in found):
      self.text, self.stopped = self.text[: min(i for i in found if i >= 0)], True

  def finish(self) -> None:
    """No token follows: nothing is held back any longer."""
    if not self.stopped:
      whole = self._tokenizer.decode(self._ids)
      if not whole.startswith(self.text):
        whole = self.text + self._tokenizer.decode(self._ids[self._read :])
      self._add(whole[len(self.text) :])
    self._stop = []

  def take(self) -> str:
    """The text that is certain and was not taken before."""
    held = 0
    if not self.stopped:
      for s in self._stop:
        most = min(len(s) - 1, len(self.text))
        held = max(held, next((n for n in range(most, 0, -1) if self.text.endswith(s[:n])), 0))
    end = max(self._given, len(self.text) - held)
    out, self._given = self.text[self._given : end], end
    return out


async def sample(
  member: Member,
  request: Request,
  tokenizer: Tokenizer,
  *,
  stop: Sequence[str] = (),
  on_text: Callable[[str], None] | None = None,
) -> Reply:
  """Samples a reply; cancelling it frees its slot.

  Args:
    stop: strings that end the reply with StopReason.STOP; the token that completes one is the
      last of the completion, and sampling ends there.
    on_text: called with each new piece of text; must not block.

  Raises:
    UserError, RunFailed: see Member.generate.
  """
  end = tokenizer.decode(request.tokens[-_TAG:].tolist(), skip_special_tokens=False)
  thinking = reasoning.goes_on(end)
  if not stop and on_text is None:
    completion = await member.generate(request)
    return Reply(completion, tokenizer.decode(completion.tokens.tolist()), thinking)
  reader, parts = Reader(tokenizer, stop), []
  stream = getattr(member, "stream", None)
  if stream is None:
    parts.append(_read(reader, await member.generate(request), stop))
  else:
    async with contextlib.aclosing(stream(request)) as chunks:
      async for chunk in chunks:
        parts.append(_read(reader, chunk, stop))
        if reader.stopped:
          break
        if on_text and (piece := reader.take()):
          on_text(piece)
  reader.finish()
  if on_text and (piece := reader.take()):
    on_text(piece)
  return Reply(join(parts, parts[-1].stop_reason), reader.text, thinking)


_TAG = 12  # tokens, enough for the tag and newlines behind it


def _read(reader: Reader, chunk: Completion, stop: Sequence[str]) -> Completion:
  """Reads a stretch of tokens, up to the end of a stop string."""
  if not stop:
    reader.push(*chunk.tokens.tolist())
    return chunk
  for n, token in enumerate(chunk.tokens.tolist(), start=1):
    if reader.push(token):
      kept = {k: getattr(chunk, k)[:n] for k in ("tokens", "logprobs", "versions", "mixed")}
      return Completion(**kept, stop_reason=StopReason.STOP)
  return chunk
