"""What goes over the wire to vLLM and SGLang, and what is believed of what comes back.

Two dialects, as the servers document them:

- "vllm": POST /v1/completions with `return_token_ids` (vLLM 0.10.2 and later). Its log-probs are
  those of the model before temperature and truncation unless it runs with
  `--logprobs-mode processed_logprobs`.
- "sglang": POST /generate with `input_ids` and `return_logprob`; SGLang's OpenAI endpoints answer
  with text. Its log-probs follow the temperature (unless its environment sets
  SGLANG_RETURN_ORIGINAL_LOGPROB) but not top-k and min-p. It honours seeds under
  `--enable-deterministic-inference` only.

Both include the stop token and its log-prob. Penalties are sent as "none": both servers else take
them from the model's generation_config.json, and log-probs would be of another distribution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler.request import Completion, Request

PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}

_NO_PROBABILITY = -9999.0  # what vLLM makes of a log-prob of -inf
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_SERVERS = "is it vLLM 0.10.2 or later (dialect = 'vllm') or SGLang (dialect = 'sglang')?"


@dataclasses.dataclass(frozen=True)
class Answer:
  """A server's answer, not yet believed: fields hold whatever JSON was there, None for nothing.

  Attributes:
    url: whose answer.
    prompt: token ids as the server saw them; weights: its label of its weights.
  """

  url: str
  prompt: Any
  tokens: Any
  logprobs: Any
  finish: Any
  weights: Any


def unusable(url: str, came: str, expected: str, fix: str) -> RunFailed:
  """The error for an answer that cannot be trained on."""
  return RunFailed(f"{url} answered {came}; expected {expected}: {fix}")


def ask(dialect: str, request: Request, model: str) -> dict[str, Any]:
  """The body to post to PATHS[dialect]."""
  common = {
    "temperature": request.temperature,
    "top_p": request.top_p,
    "top_k": request.top_k or -1,
    "min_p": request.min_p,
    "stop_token_ids": list(request.stop_ids),
    "skip_special_tokens": False,
    **_PENALTIES,
  }
  if dialect == "sglang":  # no ignore_eos: SGLang takes it for stop_token_ids too
    params = {
      **common,
      "max_new_tokens": request.limit,
      "sampling_seed": seed_of(request.key),
    }
    ids = request.tokens.tolist()
    return {"input_ids": ids, "return_logprob": True, "sampling_params": params}
  return {
    **common,
    "model": model,
    "prompt": request.tokens.tolist(),
    "max_tokens": request.limit,
    "seed": seed_of(request.key),
    "logprobs": 0,  # of the sampled token only
    "ignore_eos": True,  # the sequence ends at stop_token_ids only
    "return_token_ids": True,
    "add_special_tokens": False,
  }


def read(dialect: str, url: str, data: Any) -> Answer:
  """Finds in an answer's JSON what there is."""
  if dialect == "vllm":
    choice = at(data, "choices", 0)
    prompt, tokens = at(choice, "prompt_token_ids"), at(choice, "token_ids")
    logprobs = at(choice, "logprobs", "token_logprobs")
    return Answer(url, prompt, tokens, logprobs, at(choice, "finish_reason"), None)
  meta = at(data, "meta_info")
  finish, matched = at(meta, "finish_reason", "type"), at(meta, "finish_reason", "matched")
  if isinstance(matched, str):  # no stop string was sent; SGLang reports NaN logits this way
    finish = f"{finish}: {matched}"
  rows, weights = at(meta, "output_token_logprobs"), at(meta, "weight_version")
  if not isinstance(rows, list):
    return Answer(url, None, rows, rows, finish, weights)
  # [log-prob, id, text]: ids and log-probs from one list cannot drift apart.
  return Answer(url, None, [at(r, 1) for r in rows], [at(r, 0) for r in rows], finish, weights)


def believe(answer: Answer, request: Request, version: int, vocab_size: int) -> Completion:
  """Checks an answer against its request; every token is of `version`.

  Raises:
    RunFailed: names the url, what came, what was expected and what to do.
  """
  url, tokens, logprobs = answer.url, answer.tokens, answer.logprobs
  for name, value in ("token ids", tokens), ("log-probs", logprobs):
    if not isinstance(value, list):
      raise unusable(url, f"{name} {value!r}", f"a list of {name}", _SERVERS)
  if len(tokens) != len(logprobs):
    came = f"{len(tokens)} token ids and {len(logprobs)} log-probs"
    raise unusable(url, came, "as many of each", _SERVERS)
  for token in tokens:
    if type(token) is not int or not 0 <= token < vocab_size:
      expected = f"0 to {vocab_size - 1}"
      raise unusable(url, f"token id {token!r}", expected, "is it the same model?")
  for value in logprobs:
    if type(value) not in (int, float) or not math.isfinite(value) or value > 1e-3:
      raise unusable(url, f"log-prob {value!r}", "a finite number up to 0", _SERVERS)
    if value <= _NO_PROBABILITY:
      expected = "the log-prob of a token that can be sampled"
      raise unusable(url, f"log-prob {value!r}", expected, "which log-probs does it return?")
  if answer.prompt is not None and answer.prompt != request.tokens.tolist():
    raise unusable(url, "another prompt", "the prompt sent", "does it truncate or add tokens?")
  n = len(tokens)
  return Completion(
    np.array(tokens, np.int32),
    np.array(logprobs, np.float32),
    np.full(n, version, np.int32),
    np.zeros(n, bool),
    _reason(answer, request, tokens),
  )


def _reason(answer: Answer, request: Request, tokens: Sequence[int]) -> StopReason:
  """StopReason from the server's reason and the last token, which must agree.

  A stop token at the limit is a STOP, as in the native engine; SGLang calls it "length".
  """
  url, finish, n = answer.url, answer.finish, len(tokens)
  early = [t for t in tokens[:-1] if t in request.stop_ids]
  if early:
    fix = "does it know stop_token_ids?"
    raise unusable(url, f"more tokens after stop token {early[0]}", "none", fix)
  if n > request.limit:
    raise unusable(url, f"{n} tokens", f"at most {request.limit}", "does it know the limit?")
  if finish == "abort":
    return StopReason.ABORTED
  if finish not in ("stop", "length"):
    expected = "stop, length or abort"
    raise unusable(url, f"finish reason {finish!r}", expected, "see the server's log")
  if n and tokens[-1] in request.stop_ids:
    return StopReason.STOP
  if finish == "stop":
    # Also a server that drops the stop token, which nobody can append without its log-prob.
    last = f"token {tokens[-1]}" if n else "no token"
    expected = f"a stop token ({', '.join(map(str, request.stop_ids))}) at the end"
    fix = (
      "let the tokenizer and the server agree on stop tokens (vLLM: --generation-config vllm, so "
      "that it adds none)"
    )
    raise unusable(url, f"finish reason 'stop' after {last}", expected, fix)
  if n < request.limit:
    fix = "raise the server's context length (vLLM: --max-model-len, SGLang: --context-length)"
    raise unusable(url, f"finish reason 'length' after {n} tokens", str(request.limit), fix)
  return StopReason.LENGTH


def check_sampling(
  dialect: str, processed: bool, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
  """Refuses sampling that the server's log-probs are not, or perhaps not, right for.

  Args:
    processed: the user vouches that they are of the distribution sampled from.

  Raises:
    UserError: says what to set, here and on the server.
  """
  truncated = top_p < 1 or top_k > 0 or min_p > 0
  if temperature in (0, 1) and not truncated:
    return  # raw and processed are the same
  what = f"temperature = {temperature}, top_p = {top_p}, top_k = {top_k}, min_p = {min_p}"
  if truncated and temperature == 0:
    raise UserError(f"{what}: greedy decoding needs no truncation; leave it out")
  if truncated and dialect == "sglang":
    raise UserError(
      f"{what}: SGLang's log-probs leave top-k and min-p out, and top-p in some releases, so they "
      "are not of the distribution sampled from; sample without truncation"
    )
  if processed:
    return
  fix = {
    "vllm": "vLLM's log-probs are by default of temperature 1 without truncation: start it with "
    "--logprobs-mode processed_logprobs",
    "sglang": "SGLang's log-probs follow the temperature unless SGLANG_RETURN_ORIGINAL_LOGPROB is "
    "set: start it without",
  }[dialect]
  raise UserError(f"{what}: {fix} and say so with logprobs = 'processed'")


def seed_of(key: np.ndarray) -> int:
  """Key u32[2] as a seed that both servers take: its low 63 bits."""
  return (int(key[0]) << 32 | int(key[1])) & (2**63 - 1)


def at(data: Any, *path: str | int) -> Any:
  """What is there in nested JSON, None when it is not."""
  for key in path:
    if isinstance(key, int):
      data = data[key] if isinstance(data, list) and len(data) > key else None
    else:
      data = data.get(key) if isinstance(data, dict) else None
  return data
