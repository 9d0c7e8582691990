"""Serves a model through JetStream: its orchestrator and gRPC server over the sampler's engine.

  pip install 'trinity_jax[jetstream]' && pip install --no-deps google-jetstream==0.2.2
  python -m trinity_jax.sampler.jetstream --model FOLDER --port 9000

--no-deps, because google-jetstream's own requirements pull TensorFlow; the project called
`jetstream` on PyPI is another one. Clients use JetStream's proto (OrchestratorStub.Decode). The
server has no authentication: it binds 127.0.0.1 unless told otherwise.

JetStream is for serving, not for rollouts: its protocol has no log-probs, no sampling parameters
per request and no abort (see scheduler.Sampler for all of them). The tokens are those of the
scheduler, less the stop token, which JetStream drops. BOS goes in front of a prompt if the
tokenizer has one, unless the request's `session_cache` is not empty. What cannot be served as asked
for (a prompt or max_tokens beyond the limits, ids outside the vocabulary) is refused with
INVALID_ARGUMENT. A JetStream thread that fails kills its process: give it one of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.engine import SLOTS, STOP_IDS, DecodeState, Requests
from trinity_jax.sampler.jetstream_compat import Piece, install
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.sampling import request_key

PREFILL_LENGTHS = tuple(2**i for i in range(4, 16))  # JetStream pads prompts to one of these
REMEMBERED = 65_536  # prompts whose repetitions are counted


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How every token of an engine is sampled; see sampling.sample. Temperature 0 is greedy.

  Raises:
    UserError: a value out of range.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  min_p: float = 0.0
  top_k: int = 0
  seed: int = 0

  def __post_init__(self):
    rules = (
      ("temperature", self.temperature >= 0, "0 (greedy) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
    )
    for name, ok, expected in rules:
      if not ok:
        raise UserError(f"{name} = {getattr(self, name)}: expected {expected}")


def prompt_key(seed: int, tokens: Any, repeat: int) -> np.ndarray:
  """Randomness u32[2] of the answer to a prompt i32[T] that was asked `repeat` times before.

  JetStream's requests carry no seed. So an answer depends on the engine's seed, the prompt and how
  often it was asked since the engine was made (REMEMBERED prompts are counted), on nothing else:
  asked n times it gives n independent samples, the same ones after a restart and among any others.
  """
  return request_key(seed, repeat, *tokens)


class Prefix(NamedTuple):
  """What `prefill` gives: a prompt. Its keys and values are computed into the slot it gets."""

  tokens: np.ndarray  # i32[T]
  key: np.ndarray  # u32[2]


@dataclasses.dataclass(frozen=True)
class Serving:
  """JetStream's decode state. `engine` is donated by `insert` and `generate`.

  Attributes:
    data: i32[S, 3], the result handed out last.
    fresh: bool[S], slots filled since then. A fresh slot's first token is not handed out yet.
    entries, most: i32[S], cache entries of each slot: an upper bound now, and at its end.
  """

  engine: DecodeState
  data: Any
  fresh: np.ndarray
  entries: np.ndarray
  most: np.ndarray


class Weights:
  """The box that JetStream keeps as `params`: what is in it may change while it serves."""

  def __init__(self):
    self.current: tuple[int, Any] = (-1, None)  # version, prepared params; replaced as one


class TextTokenizer:
  """Our tokenizer as JetStream's tokenizer_api.Tokenizer."""

  def __init__(self, tokenizer: Tokenizer):
    self._inner = tokenizer
    self.pad_id = tokenizer.pad_id
    self.eos_id = tokenizer.stop_ids[0]
    self.bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id  # -1: none is added
    self.stop_tokens = set(tokenizer.stop_ids)
    # Some tokenizers drop the space before the first word of a text: begin with another word.
    self._before = tokenizer.encode("a")[-1:]
    self._before_text = tokenizer.decode(self._before)

  def encode(self, s: str, **kwargs: Any) -> tuple[Any, int]:
    """(tokens padded to a prefill length, true length); kwargs of token_utils.pad_tokens."""
    pad = install().token_utils.pad_tokens
    return pad(self._inner.encode(s), self.bos_id, self.pad_id, **kwargs)

  def decode(self, token_ids: list[int], **_: Any) -> str:
    """The text of one token or of several."""
    one = len(token_ids) == 1
    return Piece.of(self, token_ids[0]) if one else self.text(token_ids)

  def text(self, token_ids: list[int]) -> str:
    """Text of tokens in the middle of a sequence."""
    text = self._inner.decode([*self._before, *token_ids])
    if text.startswith(self._before_text):
      return text[len(self._before_text) :]
    return self._inner.decode(token_ids)

  def prompt(self, request: Any) -> list[int]:
    """The tokens that a DecodeRequest will be prefilled with."""
    text = request.WhichOneof("content") == "text_content"
    ids = self._inner.encode(request.text_content.text) if text else request.token_content.token_ids
    bos = [self.bos_id] if self.bos_id >= 0 and not request.session_cache else []
    return [*bos, *ids]


class _Engine:
  """The members of engine_api.Engine; `engine_class` joins them to it.

  Args:
    programs: compiled.
    launch: that `programs` launch through.
    max_prompt: longest prompt, one of PREFILL_LENGTHS.

  Raises:
    UserError: a max_prompt that JetStream or the cache does not allow; too many stop tokens.
  """

  def __init__(
    self,
    programs: Programs,
    launch: LaunchOrder,
    tokenizer: Tokenizer,
    *,
    max_prompt: int,
    sampling: Sampling,
  ):
    spec = programs.spec
    check_max_prompt(max_prompt)
    if max_prompt + spec.max_response > spec.cache_length:
      raise UserError(
        f"max_prompt = {max_prompt}: the cache of {spec.cache_length} entries leaves "
        f"{spec.cache_length - spec.max_response} beside responses of {spec.max_response}"
      )
    if len(tokenizer.stop_ids) > STOP_IDS:
      raise UserError(f"{len(tokenizer.stop_ids)} stop tokens: at most {STOP_IDS}")
    self.programs, self.sampling = programs, sampling
    self._launch, self._stop_ids = launch, tokenizer.stop_ids
    self._tokenizer = TextTokenizer(tokenizer)
    self._max_prompt = max_prompt
    self._weights = Weights()
    self._asked: collections.OrderedDict[bytes, int] = collections.OrderedDict()
    self._pack = _compile_pack(programs)

  # --- weights (any thread) ----------------------------------------------------------------------

  @property
  def version(self) -> int:
    """The version that samples now, -1 before the first."""
    return self._weights.current[0]

  def set_params(self, version: int, params: Any) -> None:
    """Swaps weights between two steps. Sequences under way go on with the cache they have.

    Raises:
      ValueError: an older version than the one it has.
    """
    if version < self.version:
      raise ValueError(f"version {version} offered to an engine that has {self.version}")
    self._weights.current = (version, self.programs.prepare(params))

  def load_params(self, *_: Any, **__: Any) -> Weights:
    """The box that `set_params` puts weights into."""
    if self.version < 0:
      raise UserError("load_params: the engine has no weights yet; call set_params first")
    return self._weights

  # --- serving -----------------------------------------------------------------------------------

  def init_decode_state(self, *_: Any, **__: Any) -> Serving:
    S = self.programs.spec.slots
    none = np.zeros(S, np.int32)
    return Serving(
      self.programs.init_state(), np.zeros((S, 3), np.int32), np.zeros(S, bool), none, none
    )

  def prefill(
    self,
    *,
    params: Weights,
    existing_prefix: Prefix | None = None,
    padded_tokens: Any,
    true_length: int,
  ) -> Prefix:
    """Takes a prompt in; all computing is left to `insert`, on the thread that owns the slots.

    Raises:
      UserError: a prompt that JetStream has cut.
    """
    del params
    tokens = np.asarray(padded_tokens, np.int32)
    if true_length > len(tokens):
      raise UserError(f"prompt of {true_length} tokens: at most {self._max_prompt}")
    tokens = tokens[:true_length]
    if existing_prefix is not None:
      tokens = np.concatenate([np.asarray(existing_prefix.tokens), tokens])
    name = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
    repeat = self._asked.pop(name, 0)
    self._asked[name] = repeat + 1
    if len(self._asked) > REMEMBERED:
      self._asked.popitem(last=False)
    return Prefix(tokens, prompt_key(self.sampling.seed, tokens, repeat))

  def insert(self, prefix: Prefix, decode_state: Serving, slot: int) -> Serving:
    """Computes a prompt's keys and values in a slot and samples its first token."""
    programs, S, s = self.programs, self.programs.spec.slots, decode_state
    tokens = np.asarray(prefix.tokens)
    version, params = self._weights.current  # one version for all chunks
    count, longest = programs.prompt_counts[0], programs.prompt_lengths[-1]
    shard, local = divmod(slot, S // programs.shards)
    row = shard * count  # the first row of the slot's shard
    P, state, logits = count * programs.shards, s.engine, None
    for start in range(0, len(tokens), longest):
      part = tokens[start : start + longest]
      chunk = np.zeros((P, bucket_for(len(part), programs.prompt_lengths)), np.int32)
      chunk[row, : len(part)] = part
      starts, counts, slots = _at(P, row, start), _at(P, row, len(part)), _at(P, row, local, -1)
      state, logits = programs.extend(params, state, chunk, starts, counts, slots)
    limit, requests = programs.spec.max_response, Requests.empty(S)
    for name in ("temperature", "top_p", "min_p", "top_k"):
      getattr(requests, name)[slot] = getattr(self.sampling, name)
    requests.key[slot], requests.limit[slot] = prefix.key, limit
    requests.stop_ids[slot, : len(self._stop_ids)] = self._stop_ids
    n = len(tokens)
    state = programs.start(state, logits, _at(S, slot, 0, -1), _at(S, slot, n), requests, version)
    new = np.arange(S) == slot
    return dataclasses.replace(
      s,
      engine=state,
      fresh=s.fresh | new,
      entries=np.where(new, n, s.entries),
      most=np.where(new, n + limit - 1, s.most),
    )

  def generate(self, params: Weights, decode_state: Serving) -> tuple[Serving, Any]:
    """Hands out each slot's newest token, then decodes the next one.

    The tokens are those that exist before the step, so that the first one, sampled by `insert`, is
    among them and nobody waits for a step that comes after. A slot's length counts them up to this
    one: JetStream ends a request when it exceeds max_tokens, or at the first invalid token.
    """
    s, programs = decode_state, self.programs
    version, weights = params.current
    data = self._launch(self._pack, s.engine.token, s.engine.generated, s.data, s.fresh)
    result = install().engine_api.ResultTokens(data, (0, 1), (1, 2), (2, 3), 1)
    # JetStream does not tell when a request has ended: its slot counts until it is filled again.
    needed = min(int(s.entries.max()) + 1, programs.spec.cache_length)
    live = bucket_for(needed, programs.live_lengths)
    state, _ = programs.generate(weights, s.engine, version, 1, programs.spec.slots, live)
    entries = np.minimum(s.entries + 1, s.most)
    return Serving(state, data, np.zeros_like(s.fresh), entries, s.most), result

  def refuse(self, request: Any) -> str | None:
    """Why a DecodeRequest cannot be served, or None."""
    spec = self.programs.spec
    if request.WhichOneof("content") is None:
      return "no content; expected text_content or token_content"
    tokens = self._tokenizer.prompt(request)
    if not 1 <= len(tokens) <= self._max_prompt:
      return f"prompt of {len(tokens)} tokens: expected 1 to {self._max_prompt}"
    if not 0 <= min(tokens) <= max(tokens) < spec.model.vocab_size:
      return f"token ids {min(tokens)} to {max(tokens)}: expected 0 to {spec.model.vocab_size - 1}"
    if not 1 <= request.max_tokens <= spec.max_response:
      return f"max_tokens = {request.max_tokens}: expected 1 to {spec.max_response}"
    return None

  # --- what JetStream asks about -----------------------------------------------------------------

  def get_prefix_destination_sharding(self) -> Any:
    """None: prefixes stay on the host."""
    return None

  def get_tokenizer(self) -> Any:
    return install().tokenizer_pb2.TokenizerParameters()

  def build_tokenizer(self, metadata: Any) -> TextTokenizer:
    del metadata  # was loaded with the model
    return self._tokenizer

  @property
  def max_concurrent_decodes(self) -> int:
    return self.programs.spec.slots

  @property
  def samples_per_slot(self) -> int:
    return 1

  @property
  def max_prefill_length(self) -> int:
    return self._max_prompt

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.programs.mesh

  @property
  def colocated_cpus(self) -> None:
    return None


@functools.cache
def engine_class() -> type:
  """The engine, a jetstream.engine.engine_api.Engine; its arguments are those of `_Engine`.

  Raises:
    UserError: google-jetstream is not installed.
  """
  own = {"__doc__": _Engine.__doc__, "__module__": __name__}
  return type("JetStreamEngine", (_Engine, install().engine_api.Engine), own)


def check_max_prompt(length: int) -> None:
  if length not in PREFILL_LENGTHS:
    raise UserError(
      f"max_prompt = {length}: JetStream pads prompts to one of {PREFILL_LENGTHS}; use "
      f"{next((n for n in PREFILL_LENGTHS if n > length), PREFILL_LENGTHS[-1])}"
    )


def _at(size: int, index: int, value: int, rest: int = 0) -> np.ndarray:
  """i32[size] of `rest`, but `value` at `index`."""
  out = np.full(size, rest, np.int32)
  out[index] = value
  return out


def _compile_pack(programs: Programs) -> Any:
  """(token, generated, last data, fresh) -> data i32[S, 3]: token, whether it is new, length."""

  def pack(token, generated, last, fresh):
    new = fresh | (generated > last[:, 2])
    return jnp.stack([token, new.astype(jnp.int32), generated], axis=1)

  S = programs.spec.slots
  slots = NamedSharding(programs.mesh, PartitionSpec(SLOTS))
  ints = jax.ShapeDtypeStruct((S,), jnp.int32)
  shapes = (ints, ints, jax.ShapeDtypeStruct((S, 3), jnp.int32), jax.ShapeDtypeStruct((S,), bool))
  return jax.jit(pack, in_shardings=(slots,) * 4, out_shardings=slots).lower(*shapes).compile()


if __name__ == "__main__":
  from trinity_jax.sampler import jetstream_server

  sys.exit(jetstream_server.main(sys.argv))
