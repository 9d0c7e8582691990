"""What a workflow sees: a Model that records every token it was shown and every token it wrote.

A workflow is `async def run(task, model) -> float | dict[str, float] | None`: it talks to the
model and returns a reward, a dict of reward components (their sum counts), or None to have the
last response graded by the taskset's reward function. A run of several dialogues may return a
reward for each, or its experiences (see `outcome`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer import tool_calls
from trinity_jax.explorer.answer import Answer, PromptTooLong, RunEnded, SamplingParams
from trinity_jax.explorer.dialogue import LONG, Dialogue, Messages, Tools
from trinity_jax.explorer.logs import Logs
from trinity_jax.explorer.outcome import Returned, Reward, experiences_of, read_scores
from trinity_jax.explorer.replies import Reply, sample
from trinity_jax.explorer.threads import in_thread
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.rollout_engine import Member
from trinity_jax.sampler.sampling import request_key

Workflow = Callable[[Task, "Model"], Awaitable[Returned]]


class Model:
  """One run's handle on the policy, which records every token it was shown and every one it wrote.

  Token in, token out: text is tokenised once and never again to train on. A dialogue that extends
  what was recorded continues its log; one that rewrites history begins a log of its own.

  Attributes:
    id: the run.
    text, message: the last reply as text and as a message (with `tool_calls`).
    messages: the dialogue of the last call to `chat`, reply included.
    stop_reason: of the last reply.
    turns: replies so far, of all logs.
    forks: logs begun though there was one already.
    tool_errors: why replies that look like tool calls are none.
    in_sampler: entered while the run waits for the sampler.
    server: whose `session` makes this run an endpoint for any agent; see `openai`.
    processes: environments.process.Processes that the run's environments may live in.
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
    self.id, self.params = id, params
    self.text = ""
    self.message: dict[str, Any] = {}
    self.messages: list[dict[str, Any]] = []
    self.stop_reason = StopReason.RUNNING
    self.turns = self.forks = 0
    self.tool_errors: list[str] = []
    self.in_sampler: Callable[[], AbstractContextManager] = nullcontext
    self.server: Any = None
    self.processes: Any = None
    self._logs = Logs(tokenizer)
    self.sampler, self._seed = sampler, seed
    self._max_prompt, self._stream, self._priority = max_prompt, stream, priority
    self._asking: set[asyncio.Task] = set()
    self._sampling = 0  # of them that sample
    self._waiting = ExitStack()
    self._session: Any = None
    self._closed = False

  # --- asking ------------------------------------------------------------------------------------

  async def generate(self, tokens: Sequence[int]) -> np.ndarray:
    """Continues a token log; returns the sampled tokens i32[n] (stop token included).

    Args:
      tokens: the whole prompt so far; must extend what this run has already seen and written.

    Raises:
      PromptTooLong: the prompt exceeds sampler.max_prompt_length.
      ValueError: the prompt rewrites history, or another call has not ended yet.
    """
    log = self._logs.latest()
    if log.busy:
      raise ValueError(
        f"run {self.id}: a second call to the model before the first has ended; a run's turns form "
        "one token log, so await them one after the other"
      )
    tokens, seen = [int(t) for t in tokens], len(log.tokens)
    with self._logs.held(log):
      if tokens[:seen] != log.tokens:
        raise ValueError(
          f"run {self.id}: the prompt of turn {self.turns} does not start with the tokens of the "
          f"turns before ({seen}); append to the log instead of rewriting it"
        )
      reply = await self._turn(log, tokens)
      log.record(tokens, reply.completion, None)
    return reply.completion.tokens

  async def chat(self, messages: Messages, tools: Tools | None = None) -> str:
    """One turn of a dialogue as text: returns the response's text, `message` has its tool calls.

    Args:
      messages: the whole dialogue so far in OpenAI's form. What begins with a recorded dialogue
        continues its tokens; what rewrites one is recorded as a log of its own.
      tools: OpenAI's function tools, offered through the chat template.

    Raises:
      PromptTooLong: the dialogue exceeds sampler.max_prompt_length.
      UserError: the chat template refuses the messages.
    """
    await self.complete(messages, tools or ())
    return self.text

  async def complete(
    self,
    messages: Messages,
    tools: Tools = (),
    *,
    parse: bool = True,
    single_call: bool = False,
    **ask: Any,
  ) -> Answer:
    """`chat` with everything that came back.

    Args:
      parse: False: a reply is text whatever it looks like.
      single_call: keep the first of several tool calls only.
      ask: limit (tokens), stop (strings), seed, on_text; see `_turn`.
    """
    log = self._logs.for_messages(messages, tools)
    with self._logs.held(log):
      if sum(len(str(m.get("content"))) for m in messages) > LONG:
        prompt = await in_thread(log.prompt, messages, tools)
      else:
        prompt = log.prompt(messages, tools)
      reply = await self._turn(log, prompt, **ask)
      parsed = tool_calls.parse(reply.whole, tools if parse else ())
      if single_call:
        parsed = dataclasses.replace(parsed, calls=parsed.calls[:1])
      ids = [tool_calls.call_id(*self._order(log), i) for i in range(len(parsed.calls))]
      message = tool_calls.message(parsed, ids)
      log.record(prompt, reply.completion, [*messages, message], tools)
    if parsed.error:
      self.tool_errors.append(parsed.error)
    self.text, self.message = reply.text, message
    self.messages = [*map(dict, messages), message]
    return Answer(message, prompt, reply.completion, parsed.error)

  async def continue_tokens(self, tokens: Sequence[int], **ask: Any) -> Answer:
    """`generate` that begins a log of its own where the tokens extend none."""
    log = self._logs.for_tokens(tokens)
    with self._logs.held(log):
      reply = await self._turn(log, list(tokens), **ask)
      log.record(tokens, reply.completion, None)
    self.text = reply.text
    return Answer({"role": "assistant", "content": reply.text}, list(tokens), reply.completion)

  async def logprobs(
    self, tokens: Sequence[int], temperature: float | None = None
  ) -> np.ndarray:
    """Log-probs f32[n] of given tokens by the weights that sample now; recorded nowhere.

    Each is given the tokens before it; the first, which has none, gets 0.

    Args:
      temperature: above 0; None: the run's own, 1 where it is greedy. Top-p and top-k are not
        applied.

    Raises:
      UserError: config.sampler.scores is off, or tokens that the engine cannot take.
      RunEnded: the run has ended.
    """
    self._refuse_if_closed()
    if temperature is None:
      temperature = self.params.temperature or 1.0
    with self._in_sampler(samples=False):
      return await self.sampler.logprobs(tokens, temperature)

  def reward(self, value: float) -> None:
    """Adds to the reward of the last turn: its last token's entry in token_rewards.

    Raises:
      ValueError: no turn yet, or not a finite number.
    """
    if not self._logs.recent or not self._logs.recent[-1].recorded:
      raise ValueError(f"run {self.id}: a reward before the first reply; there is no turn it is of")
    if not math.isfinite(value):
      raise ValueError(f"run {self.id}: reward({value!r}): expected a finite number")
    turn = self._logs.recent[-1].turns[-1]
    turn.reward = (turn.reward or 0.0) + float(value)

  def openai(self, *, sync: bool = False, **kwargs: Any) -> Any:
    """An official AsyncOpenAI client (OpenAI if `sync`) whose calls are this run's turns.

    Its `base_url` and `api_key` make any other agent's calls turns of this run too.

    Raises:
      UserError: no server was wired to this run, or the package `openai` is missing.
    """
    if self.server is None:
      raise UserError("model.openai(): no server runs beside this sampler")
    try:
      import openai
    except ImportError as e:
      raise UserError("model.openai() needs the package openai: pip install openai") from e
    if self._session is None:
      self._session = self.server.session(self)
    make = openai.OpenAI if sync else openai.AsyncOpenAI
    return make(base_url=self._session.base_url, api_key=self._session.token, **kwargs)

  async def feedback(self) -> float | None:
    """Waits for the reward that the agent's side gives through POST /feedback.

    None: it ended the session (POST /commit) without one.

    Raises:
      UserError: the run has no session; ask for `openai` first.
    """
    if self._session is None:
      raise UserError("model.feedback(): this run has no session; call model.openai() first")
    return await asyncio.wrap_future(self._session.feedback)

  def close(self) -> None:
    """Ends the handle: calls under way are cancelled, later ones refused.

    From its own loop, and not from within a call.
    """
    self._closed = True
    if self._session is not None:
      self._session.close()
    for task in list(self._asking):
      task.cancel()

  async def aclose(self) -> None:
    """`close`, and waits until the sampler knows of every call that was cancelled."""
    open_ = list(self._asking)
    self.close()
    await asyncio.gather(*open_, return_exceptions=True)

  # --- one turn ----------------------------------------------------------------------------------

  def _order(self, log: Dialogue) -> tuple[int, ...]:
    return (self._stream, *self.id[:3], self.id.step + log.number, len(log.turns))

  async def _turn(
    self,
    log: Dialogue,
    prompt: list[int],
    *,
    limit: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
  ) -> Reply:
    """Samples one reply, with the run's own temperature and truncation."""
    self._refuse_if_closed()
    if len(prompt) > self._max_prompt:
      raise PromptTooLong(
        f"prompt of {len(prompt)} tokens exceeds sampler.max_prompt_length = {self._max_prompt}; "
        "raise it or shorten the task"
      )
    p, order = self.params, self._order(log)
    request = Request(
      tokens=np.array(prompt, np.int32),
      key=request_key(self._seed, *order, *(() if seed is None else (seed,))),
      order=order,
      limit=p.limit if limit is None else min(limit, p.limit),
      stop_ids=self.tokenizer.stop_ids,
      temperature=p.temperature,
      top_p=p.top_p,
      top_k=p.top_k,
      priority=self._priority,
      salt=(self._stream, self.id.batch),
    )
    with self._in_sampler():
      reply = await sample(self.sampler, request, self.tokenizer, stop=stop, on_text=on_text)
    self.forks += not log.recorded and bool(self._logs.recorded)
    self.stop_reason, self.turns = reply.completion.stop_reason, self.turns + 1
    self._logs.replied(log)
    return reply

  def _refuse_if_closed(self) -> None:
    if self._closed:
      raise RunEnded(f"run {self.id} has ended; its model answers no more")

  @contextmanager
  def _in_sampler(self, samples: bool = True) -> Iterator[None]:
    """The run waits while any of its calls does; the sampler counts it once, not per call."""
    task = _current()
    if not self._asking:
      self._waiting.enter_context(self.in_sampler())
    if samples and self._sampling:
      self.sampler.enter()
    self._asking.add(task)
    self._sampling += samples
    try:
      yield
    finally:
      self._asking.discard(task)
      self._sampling -= samples
      if samples and self._sampling:
        self.sampler.leave()
      if not self._asking:
        self._waiting.close()

  # --- what was recorded -------------------------------------------------------------------------

  @property
  def logs(self) -> list[Dialogue]:
    """The token logs with replies, in the order in which they began."""
    return self._logs.recorded

  def experience(self, reward: Reward, info: dict[str, Any] | None = None) -> Experience:
    """The log of the last reply as one experience; see `experiences`."""
    (out,) = self.experiences(reward, info, most=1)
    return out

  def experiences(
    self,
    reward: Reward | Sequence[Reward] = 0.0,
    info: dict[str, Any] | None = None,
    *,
    most: int | None = None,
  ) -> list[Experience]:
    """The token logs as experiences, in the order in which they began; ids differ in `step`.

    Args:
      reward: of the run: every log gets it, and what `reward` was given for turns of any of them;
        or a list, one a log: each gets its own and that of its own turns.
      info: goes with each.
      most: the latest so many, by their last replies.

    Raises:
      ValueError: a reward that is not finite, or not one a log; no reply yet.
    """
    logs = self.logs
    if not logs:
      raise ValueError(f"run {self.id}: no call to the model yet, so it has no experience")
    score = read_scores(reward, len(logs))
    if score is None:
      raise ValueError(f"run {self.id}: experiences(None): expected a reward")
    recent = [d for d in self._logs.recent if d.recorded]
    kept = recent if most is None else recent[-most:]
    more: dict[str, Any] = {"forks": self.forks} if self.forks else {}
    if self.tool_errors:
      more["tool_errors"] = self.tool_errors[-_MOST_ERRORS:]
    return experiences_of(
      logs, kept, self.id, score, self.params.temperature or 1.0, {**(info or {}), **more}
    )


def _current() -> asyncio.Task:
  task = asyncio.current_task()
  assert task is not None, "only coroutines of a task ask a model"
  return task


_MOST_ERRORS = 8  # kept with an experience
