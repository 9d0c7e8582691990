"""A remote inference server (vLLM, SGLang) as a rollout engine: token ids in, token ids out."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import openai_wire as wire
from trinity_jax.sampler.request import Completion, Request, join

_LONGEST_BACKOFF = 30.0  # seconds
_RELOAD = "/update_weights_from_disk"


class OpenAIEngine:
  """A RolloutEngine over HTTP. What the servers must be, and how they run: see openai_wire.

  Versions: no request is in flight while weights change. After `set_params` those in flight end
  first, then the server loads the weights, then the requests that waited are sent. So each
  completion is of one version, the one the server had been told when it was sent, and `mixed` is
  False throughout: an answer does not say at which token weights changed, and SGLang only loads
  while idle. Where the server labels its answers with the weights that made them, a label that is
  not ours is an error: somebody else changes them.

  A failure of one request fails that request. A failure to load weights ends the engine.

  Admission is the server's, so `enter` and `leave` only count, and runs through it repeat only as
  far as the server's seeds do. One event loop, that of the first `generate`, may use an engine.

  Args:
    base_url: http(s)://host:port, with or without /v1.
    model: the name that the server gives to the model.
    vocab_size: ids at or above it in an answer are an error.
    max_prompt, max_response: tokens; longer requests are refused here.
    dialect: "vllm" or "sglang".
    api_key: sent as a bearer token; never shown.
    logprobs: "raw": nothing is known of how the server runs, so only requests whose log-probs are
      right either way are accepted (temperature 0 or 1, no truncation). "processed": the user
      vouches that its log-probs are of the distribution sampled from.
    concurrency: requests in flight at most; the others wait here.
    timeout: seconds without an answer until a request, or the loading of weights, is given up.
    retries: further attempts after a connection error, 429 or 5xx, `backoff` seconds after the
      first, then twice as long each time.
    weights: "frozen": the server has the weights of the first version given, and keeps them.
      "disk" (sglang): each version is written to weights_folder/v<version> as a Hugging Face
      folder, which the server must see under the same path; the newest two are kept.
    model_config, tokenizer_dir: of the folders written, see models.hf.save.

  Raises:
    UserError: arguments that do not fit together.
  """

  def __init__(
    self,
    base_url: str,
    *,
    model: str,
    vocab_size: int,
    max_prompt: int,
    max_response: int,
    dialect: str = "vllm",
    api_key: str | None = None,
    logprobs: str = "raw",
    concurrency: int = 64,
    timeout: float = 600.0,
    retries: int = 4,
    backoff: float = 0.5,
    weights: str = "frozen",
    weights_folder: str | Path | None = None,
    model_config: ModelConfig | None = None,
    tokenizer_dir: str | Path | None = None,
  ):
    _check_choices(dialect, logprobs, weights, weights_folder, model_config)
    _check_numbers(concurrency, timeout, retries, backoff)
    self._base, self._dialect = _base(base_url), dialect
    self._url = self._base + wire.PATHS[dialect]
    self._model, self._vocab_size = model, vocab_size
    self._max_prompt, self._max_response = max_prompt, max_response
    self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    self._processed, self._concurrency = logprobs == "processed", concurrency
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    self._frozen, self._folder = weights == "frozen", Path(weights_folder or ".").absolute()
    self._model_config, self._tokenizer_dir = model_config, tokenizer_dir
    self._written: list[Path] = []
    self._lock = threading.Lock()  # of the next four
    self._next_params: tuple[int, Any] | None = None
    self._newest = -1
    self._participants = 0
    self._closed = False
    self._loop: asyncio.AbstractEventLoop | None = None
    self._client: Any = None
    self._loading: asyncio.Task | None = None
    self._open: set[tuple[int, ...]] = set()
    self._waiting = 0
    self._totals = dict.fromkeys(
      ("requests", "sampled_tokens", "prompt_tokens", "retries", "weight_updates"), 0
    )
    self.version = -1
    self.error: BaseException | None = None

  # --- any thread --------------------------------------------------------------------------------

  def start(self) -> None:
    """Nothing to start: the first request connects."""

  def close(self) -> None:
    """Closes the connections; open requests fail with RunFailed."""
    with self._lock:
      self._closed, self._next_params = True, None
    loop, client = self._loop, self._client
    if client is None or loop is None or not loop.is_running():
      return  # never connected, or its loop has ended and the sockets go with it
    closing = asyncio.run_coroutine_threadsafe(client.aclose(), loop)
    if threading.get_ident() != self._thread:
      closing.result(timeout=30)

  def release(self) -> None:
    """Nothing: the server's memory is its own."""

  def set_params(self, version: int, params: Any) -> None:
    """Gives the server new weights before the next request; see RolloutEngine and the class."""
    with self._lock:
      if self._closed or self.error is not None:
        raise self._failure()
      if version < self._newest:
        raise ValueError(f"version {version} offered to an engine that has {self._newest}")
      if version == self._newest:
        return
      if self._frozen and self._newest >= 0:
        raise UserError(
          f"version {version} offered to {self._base}, whose weights are frozen at version "
          f"{self._newest}: weights = 'frozen' serves one version only (evaluation, generated "
          "data); to train use weights = 'disk' with an SGLang server, or the native engine"
        )
      self._newest = version
      if self._frozen:
        self.version = version
      else:
        self._next_params = (version, params)

  def member(self, order: Sequence[int]) -> OpenAIEngine:
    """The engine that serves runs of this order: this one."""
    return self

  def enter(self) -> None:
    """Counts only: a remote server's admission cannot be made deterministic from here."""
    with self._lock:
      self._participants += 1

  def leave(self) -> None:
    """Counts only, as `enter`."""
    with self._lock:
      self._participants -= 1

  def describe(self) -> str:
    """Who is where, for the message of a wait that expired."""
    running = sorted(self._open)
    loading = ", loading weights" if self._loading is not None else ""
    return (
      f"{self._dialect} server {self._base} at version {self.version}{loading}: {len(running)} "
      f"requests in flight {running[:4]}, {self._waiting} waiting, {self._participants} runs open"
    )

  def metrics(self) -> dict[str, float]:
    """Gauges: requests in flight and requests that wait for their turn."""
    return {"sampler/running": float(len(self._open)), "sampler/waiting": float(self._waiting)}

  @property
  def stats(self) -> dict[str, float]:
    """Counters since the start: requests, tokens, retries, weight updates."""
    return {k: float(v) for k, v in self._totals.items()}

  def check_sampling(
    self, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
  ) -> None:
    """Raises UserError for sampling whose log-probs could be wrong; `generate` does so too."""
    wire.check_sampling(self._dialect, self._processed, temperature, top_p, top_k, min_p)

  def _failure(self) -> RunFailed:
    """A new exception for each who waits: they are raised in several tasks."""
    if self.error is None:
      return RunFailed(f"the engine of {self._base} was closed")
    why = f"the engine of {self._base} could not change its weights: {self.error}"
    return RunFailed(why, self.error)

  def _check(self, request: Request) -> None:
    prompt = len(request.tokens)
    if not 1 <= prompt <= self._max_prompt:
      raise UserError(f"prompt of {prompt} tokens: the engine serves 1 to {self._max_prompt}")
    if not 1 <= request.limit <= self._max_response:
      raise UserError(f"response limit {request.limit}: must be 1 to {self._max_response}")
    self.check_sampling(request.temperature, request.top_p, request.top_k, request.min_p)

  # --- the event loop ----------------------------------------------------------------------------

  async def generate(self, request: Request) -> Completion:
    """Samples one sequence. Cancelling closes its connection, by which the server gives it up.

    At Request.deadline the same happens: what the server had sampled is lost, so the completion
    is empty.
    """
    self._check(request)
    self._attach()
    left = None if request.deadline is None else request.deadline - time.monotonic()
    try:
      async with asyncio.timeout(left):
        return await self._in_turn(request)
    except TimeoutError:  # the deadline's; httpx's are told by _post
      return join((), StopReason.TIMEOUT)

  async def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Refused: a remote server is only asked for what it samples itself.

    Raises:
      UserError: always.
    """
    raise UserError(
      f"{self._base}: log-probs of given tokens are not asked of a remote engine; use "
      "config.sampler.engine = 'native'"
    )

  def _attach(self) -> None:
    """Makes the client on first use, in the loop that uses it."""
    import httpx

    loop = asyncio.get_running_loop()
    if self._loop is None:
      self._loop, self._thread = loop, threading.get_ident()
      self._slots = asyncio.Semaphore(self._concurrency)
      self._idle = asyncio.Event()
      self._client = httpx.AsyncClient(
        headers=self._headers,
        timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, 30.0)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency),
      )
    elif self._loop is not loop:
      raise RunFailed(f"the engine of {self._base} was used from two event loops: make one each")

  async def _in_turn(self, request: Request) -> Completion:
    self._waiting += 1
    waits = True
    try:
      async with self._slots:
        await self._until_settled()
        self._waiting, waits = self._waiting - 1, False
        version = self.version  # nothing was awaited since it was settled
        self._open.add(request.order)
        self._idle.clear()
        try:
          return await self._sample(request, version)
        finally:
          self._open.discard(request.order)
          if not self._open:
            self._idle.set()
    finally:
      self._waiting -= waits

  async def _until_settled(self) -> None:
    """Waits until the server has the newest weights given; has it load them when it is idle."""
    while True:
      if self._closed or self.error is not None:
        raise self._failure()
      if self._loading is not None:
        await asyncio.shield(self._loading)
      elif self._next_params is None:
        break
      elif self._open:
        await self._idle.wait()
      else:
        self._loading = asyncio.create_task(self._load())
    if self.version < 0:
      raise RunFailed(f"{self._base}: a request before set_params: its tokens have no version")

  async def _load(self) -> None:
    """Writes the newest weights and has the server load them."""
    try:
      with self._lock:
        if self._next_params is None:  # closed meanwhile
          return
        (version, params), self._next_params = self._next_params, None
      path = self._folder / f"v{version}"
      await asyncio.to_thread(self._write, path, params)
      body = {"model_path": str(path), "weight_version": str(version), "flush_cache": True}
      answer = await self._post(self._base + _RELOAD, body)
      if wire.at(answer, "success") is not True:
        fix = f"the server must see {path} and serve a model of the same architecture"
        came = repr(answer)[:300]
        raise wire.unusable(self._base + _RELOAD, came, "success: true", fix)
      self.version = version
      self._totals["weight_updates"] += 1
      await asyncio.to_thread(self._forget_old)
    except Exception as e:  # told by every request from now on
      self.error = e
    finally:
      self._loading = None

  def _write(self, path: Path, params: Any) -> None:
    from trinity_jax.models import hf

    assert self._model_config is not None
    hf.save(path, params, self._model_config, self._tokenizer_dir)
    self._written.append(path)

  def _forget_old(self) -> None:
    """Deletes all but the newest two. One still open over NFS stays listed for the next time."""
    for path in self._written[:-2]:
      shutil.rmtree(path, ignore_errors=True)
    self._written = [p for p in self._written if p.exists()]

  async def _sample(self, request: Request, version: int) -> Completion:
    body = wire.ask(self._dialect, request, self._model)
    answer = wire.read(self._dialect, self._url, await self._post(self._url, body))
    if not self._frozen and answer.weights not in (None, str(version)):
      came, fix = f"from weights {answer.weights!r}", "give the run a server of its own"
      raise wire.unusable(self._url, came, f"{str(version)!r}, which it was told to load", fix)
    out = wire.believe(answer, request, version, self._vocab_size)
    self._totals["requests"] += 1
    self._totals["sampled_tokens"] += len(out.tokens)
    self._totals["prompt_tokens"] += len(request.tokens)
    return out

  async def _post(self, url: str, body: dict[str, Any]) -> Any:
    """Posts until there is an answer; returns its JSON.

    Raises:
      RunFailed: refused, or no answer within the attempts or the time.
    """
    import httpx

    last, cause = "", None
    for attempt in range(self._retries + 1):
      if attempt:
        self._totals["retries"] += 1
        await asyncio.sleep(min(self._backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF))
      if self._closed:
        raise self._failure()
      try:
        response = await self._client.post(url, json=body)
      except (httpx.ReadTimeout, httpx.WriteTimeout) as e:  # it works on it: again would be worse
        raise RunFailed(
          f"{url}: no answer within timeout = {self._timeout:g} s; raise it, lower concurrency = "
          f"{self._concurrency}, or see why the server hangs"
        ) from e
      except httpx.TransportError as e:
        last, cause = f"{type(e).__name__}: {e}", e
        continue
      status = f"HTTP {response.status_code}: {response.text[:300]}"
      if response.status_code == 429 or response.status_code >= 500:
        last, cause = status, None
        continue
      if response.status_code != 200:
        fix = (
          f"are base_url, model = {self._model!r}, api_key and dialect = {self._dialect!r} this "
          "server's, and is its context long enough?"
        )
        raise wire.unusable(url, status, "HTTP 200", fix)
      try:
        return response.json()
      except ValueError as e:
        raise wire.unusable(url, status, "JSON", "is base_url this server's?") from e
    if self._closed:
      raise self._failure()
    raise RunFailed(
      f"{url}: no answer after {self._retries + 1} attempts, the last: {last}; is the server up?"
    ) from cause


def _check_choices(dialect, logprobs, weights, weights_folder, model_config) -> None:
  _one_of("dialect", dialect, tuple(wire.PATHS))
  _one_of("logprobs", logprobs, ("raw", "processed"))
  _one_of("weights", weights, ("frozen", "disk"))
  if weights == "disk" and dialect == "vllm":
    raise UserError(
      "weights = 'disk' with dialect = 'vllm': vLLM documents weight transfer over NCCL and CUDA "
      "IPC only, not from a folder; use dialect = 'sglang' or weights = 'frozen'"
    )
  if weights == "disk" and (weights_folder is None or model_config is None):
    raise UserError(
      "weights = 'disk' needs weights_folder, a folder that the server sees under the same path, "
      "and model_config"
    )


def _check_numbers(concurrency: int, timeout: float, retries: int, backoff: float) -> None:
  if concurrency < 1 or timeout <= 0 or retries < 0 or backoff < 0:
    raise UserError(
      f"concurrency = {concurrency} (at least 1), timeout = {timeout} (above 0), retries = "
      f"{retries}, backoff = {backoff} (not negative): out of range"
    )


def _base(url: str) -> str:
  parts = urlsplit(url)
  if parts.username or parts.password:
    raise UserError("base_url holds a name or password, which messages would show: use api_key")
  if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
    raise UserError(f"base_url = {url!r}: expected http://host:port or https://host:port")
  return url.rstrip("/").removesuffix("/v1")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise UserError(f"{name} = {value!r}: expected one of {', '.join(map(repr, choices))}")
