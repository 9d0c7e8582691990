"""Reasoning before the answer: `<think>...</think>`, as Qwen3, DeepSeek-R1 and others write it.

Clients get it as `reasoning_content` beside `content`, as vLLM and SGLang name it.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Splitter:
  """Takes a reply apart as it streams in.

  Reasoning is what the reply begins with between the tags, without the newlines at its ends; the
  answer is the rest, without those it begins with. A reply without the tag is answer as it is.

  Args:
    thinking: the reply begins within reasoning, see `goes_on`.
  """

  def __init__(self, thinking: bool = False):
    self._held, self._state = "", "open" if thinking else "start"

  def push(self, piece: str, *, last: bool = False) -> tuple[str, str]:
    """What of (reasoning, answer) has become certain.

    Args:
      last: nothing follows; an unfinished tag is text.
    """
    self._held += piece
    if self._state == "start" and not self._begin(last):
      return "", ""
    reasoning = self._reasoning(last) if self._state in ("open", "reasoning") else ""
    if self._state == "gap":
      self._held = self._held.lstrip("\n")
    if self._state not in ("gap", "answer") or not self._held:
      return reasoning, ""
    self._state, answer, self._held = "answer", self._held, ""
    return reasoning, answer

  def _begin(self, last: bool) -> bool:
    """Finds out whether there is reasoning; False: not yet."""
    head = self._held.lstrip()
    if head.startswith(OPEN):
      self._state, self._held = "open", head[len(OPEN) :]
    elif OPEN.startswith(head) and not last:
      return False
    else:
      self._state = "answer"
    return True

  def _reasoning(self, last: bool) -> str:
    if self._state == "open":
      self._held = self._held.lstrip("\n")
      self._state = "reasoning" if self._held else "open"
    text, closed, rest = self._held.partition(CLOSE)
    if closed:
      self._state, self._held = "gap", rest
      return text.rstrip("\n")
    if not last:
      most = min(len(CLOSE) - 1, len(text))
      text = text[: len(text) - next(n for n in range(most, -1, -1) if text.endswith(CLOSE[:n]))]
    text = text.rstrip("\n")
    self._held = "" if last else self._held[len(text) :]
    return text


def goes_on(prompt: str) -> bool:
  """Whether a reply to the prompt begins within reasoning: templates may open it themselves."""
  return prompt.rstrip().endswith(OPEN)


def split(text: str) -> tuple[str, str]:
  """(reasoning, answer) of a whole reply."""
  return Splitter().push(text, last=True)
