"""Makes google-jetstream 0.2.2 work without TensorFlow and on a current jax.

Its orchestrator and gRPC server are used as they are but for what `install` mends:

- seqio (which pulls TensorFlow), tiktoken and shortuuid have stand-ins while it is imported, where
  they are missing. They load other tokenizers than ours.
- It asserts that some slot is in use when it decodes, while another thread may free the last one:
  now and then a server that ran out of requests would end. It is compiled without the assertion.
- Importing it sets the root logger to DEBUG, onto stdout: undone. It logs to "jetstream" instead.
- It calls jax.tree_map, which is gone, and pads lists as if they were arrays.
- It cuts prompts that are too long without a word, and other mistakes of a client end the process
  (a thread that fails sends SIGKILL). An engine's `refuse` answers them with INVALID_ARGUMENT.
- It turns tokens into text one by one, which splits characters: see `Piece`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trinity_jax.errors import UserError

INSTALL = (
  "pip install grpcio prometheus-client && pip install --no-deps google-jetstream==0.2.2"
  " (--no-deps: its own requirements pull TensorFlow)"
)


class JetStream(NamedTuple):
  """The modules that are used."""

  config_lib: Any
  engine_api: Any
  orchestrator: Any
  server_lib: Any
  token_utils: Any
  tokenizer_pb2: Any


class Piece(str):
  """Text of one token that knows its id.

  A token may hold part of a character. Such pieces wait in the orchestrator until one follows that
  is whole, or the sequence ends, and then become text together.

  Attributes:
    token: its id; tokenizer: has text(ids) -> str.
  """

  token: int
  tokenizer: Any

  @classmethod
  def of(cls, tokenizer: Any, token: int) -> Piece:
    piece = cls(tokenizer.text([token]))
    piece.token, piece.tokenizer = token, tokenizer
    return piece

  @property
  def whole(self) -> bool:
    return bool(self) and not self.endswith("\ufffd")


@functools.cache
def install() -> JetStream:
  """Imports and mends JetStream; the same modules each time.

  Raises:
    UserError: it is not installed, or another distribution or version is.
  """
  _check_distribution()
  root = logging.getLogger()
  level = root.level
  try:
    with _stand_ins():
      _import_without_assertions("jetstream.core.orchestrator")
      found = JetStream(*(importlib.import_module(f"jetstream.{name}") for name in _MODULES))
  except ImportError as e:
    raise UserError(f"google-jetstream needs {e.name or e}, which is missing; {INSTALL}") from e
  if hasattr(found.engine_api, "ExistingPrefix"):
    raise UserError(f"google-jetstream 0.3 has another engine API; use 0.2.2: {INSTALL}")
  root.setLevel(level)
  root.removeHandler(found.orchestrator.handler)
  _mend(found)
  return found


_MODULES = (
  "core.config_lib", "engine.engine_api", "core.orchestrator", "core.server_lib",
  "engine.token_utils", "engine.tokenizer_pb2",
)  # fmt: skip


def _check_distribution() -> None:
  spec = importlib.util.find_spec("jetstream")
  if spec is None:
    raise UserError(f"google-jetstream is not installed; {INSTALL}")
  folders = list(spec.submodule_search_locations or [])
  if not any((Path(f) / "engine" / "engine_api.py").is_file() for f in folders):
    where = spec.origin or ", ".join(folders)
    raise UserError(
      f"{where} is another project named jetstream, not google-jetstream; "
      f"pip uninstall jetstream && {INSTALL}"
    )


class _WithoutAssertions(importlib.machinery.SourceFileLoader):
  def get_code(self, fullname: str) -> types.CodeType:
    path = self.get_filename(fullname)
    return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)


def _import_without_assertions(name: str) -> None:
  found = importlib.util.find_spec(name)
  assert found is not None and found.origin is not None
  loader = _WithoutAssertions(name, found.origin)
  spec = importlib.util.spec_from_file_location(name, found.origin, loader=loader)
  assert spec is not None
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  loader.exec_module(module)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
  """Modules that JetStream imports and we do not need, where they are missing.

  They go again afterwards: others ask sys.modules what is installed.
  """

  class Unavailable:
    def __init__(self, *_, **__):
      raise UserError("JetStream's own tokenizers need seqio or tiktoken; use build_tokenizer")

  def module(name: str, **members: Any) -> types.ModuleType:
    out = types.ModuleType(name)
    vars(out).update(members)
    return out

  vocabularies = module(
    "seqio.vocabularies", Vocabulary=Unavailable, SentencePieceVocabulary=Unavailable
  )
  load = module("tiktoken.load", load_tiktoken_bpe=Unavailable)
  families = (
    (module("seqio", vocabularies=vocabularies), vocabularies),
    (module("tiktoken", load=load), load),
    (module("shortuuid", uuid=lambda: uuid.uuid4().hex),),
  )
  missing = [
    m
    for family in families
    if family[0].__name__ not in sys.modules
    and importlib.util.find_spec(family[0].__name__) is None
    for m in family
  ]
  sys.modules.update({m.__name__: m for m in missing})
  try:
    yield
  finally:
    for m in missing:
      del sys.modules[m.__name__]


def _mend(js: JetStream) -> None:
  log = logging.getLogger("jetstream")
  for m in (js.orchestrator, js.server_lib, js.token_utils):
    m.logging = log  # the functions of `logging` itself would configure the root logger
  js.server_lib.orchestrator = js.orchestrator  # where it was imported before
  js.orchestrator.delete_pytree = _delete
  js.orchestrator.LLMOrchestrator = _refusing(js.orchestrator)
  pad, is_byte, join = (
    getattr(js.token_utils, n) for n in ("pad_tokens", "is_byte_token", "text_tokens_to_str")
  )

  def pad_tokens(tokens, bos_id, pad_id, is_bos=True, *args, **kwargs):
    is_bos = is_bos and bos_id >= 0  # a model without one
    return pad(np.asarray(tokens, np.int32), bos_id, pad_id, is_bos, *args, **kwargs)

  def is_byte_token(s):
    return not s.whole if isinstance(s, Piece) else is_byte(s)

  def text_tokens_to_str(tokens):
    tokens = list(tokens)
    if tokens and all(isinstance(t, Piece) for t in tokens):
      return tokens[0].tokenizer.text([t.token for t in tokens])
    return join(tokens)

  js.token_utils.pad_tokens = pad_tokens
  js.token_utils.is_byte_token = is_byte_token
  js.token_utils.text_tokens_to_str = text_tokens_to_str


def _delete(tree: Any) -> None:
  jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, tree)


def _refusing(orchestrator: Any) -> type:
  """LLMOrchestrator that asks the engine about each request before it accepts it."""

  class Orchestrator(orchestrator.LLMOrchestrator):
    async def Decode(self, request, context=None):
      refuse = getattr(self._driver._prefill_engines[0], "refuse", None)
      reason = refuse(request) if refuse else None
      if reason is not None:
        code = orchestrator.grpc.StatusCode.INVALID_ARGUMENT
        await orchestrator._abort_or_raise(context, code, reason)
        return
      async for response in super().Decode(request, context):
        yield response

  return Orchestrator
