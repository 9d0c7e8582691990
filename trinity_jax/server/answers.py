"""What goes back to clients of OpenAI's API."""

from __future__ import annotations

import codecs
import functools
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from trinity_jax.experience import StopReason
from trinity_jax.explorer.answer import Answer
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.server.protocol import Ask


class Writer:
  """Writes the answers to one request.

  Args:
    model: the name under which the policy is served.
    version: the policy version when the request came; below 0 for a model that no run trained.
  """

  def __init__(self, ask: Ask, tokenizer: Tokenizer, model: str, version: int):
    self._ask, self._tokenizer = ask, tokenizer
    self._chat = ask.messages is not None
    self._head = {
      "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
      "created": int(time.time()),
      "model": model,
      "system_fingerprint": f"version-{version}" if version >= 0 else None,
    }

  def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """The answer that is not streamed."""
    kind = "chat.completion" if self._chat else "text_completion"
    choices = []
    for i, answer in enumerate(answers):
      body = {"message": answer.message} if self._chat else {"text": answer.message["content"]}
      choices.append({"index": i, **body, **self._end(answer)})
    return {**self._head, "object": kind, "choices": choices, "usage": self.usage(answers)}

  def text(self, index: int, piece: str) -> dict[str, Any]:
    """A piece of a choice's text."""
    return self._chunk(index, {"content": piece} if self._chat else piece)

  def reasoning(self, index: int, piece: str) -> dict[str, Any]:
    """A piece of a chat's reasoning."""
    return self._chunk(index, {"reasoning_content": piece})

  def role(self, index: int) -> dict[str, Any]:
    """The first chunk of a chat's choice."""
    return self._chunk(index, {"role": "assistant", "content": ""})

  def last(self, index: int, answer: Answer, streamed: bool) -> list[dict[str, Any]]:
    """What ends a choice: its text and calls where they were not streamed, then its reason."""
    out, message = [], answer.message
    if not streamed and "reasoning_content" in message:
      out.append(self.reasoning(index, message["reasoning_content"]))
    if not streamed and message["content"]:
      out.append(self.text(index, message["content"]))
    calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
    if calls:
      out.append(self._chunk(index, {"tool_calls": calls}))
    out.append(self._chunk(index, {} if self._chat else "", **self._end(answer)))
    return out

  def totals(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """The chunk with the usage."""
    return {**self._chunk(0, ""), "choices": [], "usage": self.usage(answers)}

  def _chunk(self, index: int, piece: Any, **end: Any) -> dict[str, Any]:
    choice = {"index": index, ("delta" if self._chat else "text"): piece}
    choice |= end or {"finish_reason": None, "logprobs": None}
    kind = "chat.completion.chunk" if self._chat else "text_completion"
    usage = {"usage": None} if self._ask.usage else {}
    return {**self._head, "object": kind, "choices": [choice], **usage}

  def _end(self, answer: Answer) -> dict[str, Any]:
    c = answer.completion
    reason = "stop" if c.stop_reason is StopReason.STOP else "length"
    if "tool_calls" in answer.message:
      reason = "tool_calls"
    out: dict[str, Any] = {"finish_reason": reason, "logprobs": None}
    if self._ask.logprobs:
      out["logprobs"] = self._logprobs(c.tokens.tolist(), c.logprobs.tolist())
    if self._ask.token_ids:
      out["prompt_token_ids"] = list(answer.prompt)
      out["token_ids"] = c.tokens.tolist()
      out["versions"] = c.versions.tolist()
    return out

  def _logprobs(self, tokens: list[int], logprobs: list[float]) -> dict[str, Any]:
    known = {t: token_bytes(self._tokenizer, t) for t in set(tokens)}
    texts = [known[t].decode(errors="replace") for t in tokens]
    if self._chat:
      content = [
        {"token": text, "logprob": p, "bytes": list(known[t]), "top_logprobs": []}
        for t, text, p in zip(tokens, texts, logprobs)
      ]
      return {"content": content, "refusal": None}
    starts = _starts([known[t] for t in tokens])
    return {
      "tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": starts,
    }  # fmt: skip

  def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
    """Prompts are counted once per prompt, not once per choice."""
    prompt = sum(len(a.prompt) for a in answers[:: self._ask.n])
    written = sum(len(a.completion.tokens) for a in answers)
    return {
      "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
    }  # fmt: skip


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
  """What a token stands for, which may be part of a character."""
  name = tokenizer.token_name(token)
  if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # SentencePiece's fallback
    return bytes.fromhex(byte[1])
  text = tokenizer.decode([token], skip_special_tokens=False)
  if "\ufffd" not in text:
    # A decoder leaves out the space that a text of SentencePiece begins with.
    return (" " * (name.startswith("\u2581") and not text.startswith(" ")) + text).encode()
  letters = _letters()
  return bytes(letters[c] for c in name) if set(name) <= letters.keys() else text.encode()


@functools.cache
def _letters() -> dict[str, int]:
  """The letters by which byte-level tokenizers write bytes."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = (b for b in range(256) if b not in plain)
  return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def _starts(pieces: Sequence[bytes]) -> list[int]:
  """Where in the text each token begins; those within a character have its place."""
  decoder, at, out = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
  for piece in pieces:
    out.append(at)
    at += len(decoder.decode(piece))
  return out
