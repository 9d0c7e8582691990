"""Takes secrets out of what leaves this process: the config that W&B and MLflow are given.

Key names decide first (`api_key`, `hf_token`, `db_password`, ...; `max_tokens` and `tokenizer` are
no secrets), then values that look like one whatever their key: user info and credential query
parameters in URLs, and the well-known prefixes of service tokens. Better one value too many.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

_WORDS = {"token", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd",
          "credential", "credentials", "apikey", "auth", "authorization", "bearer", "cookie",
          "cookies"}
_KEYS_BEFORE = {"api", "access", "private", "ssh", "signing", "encryption", "account", "secret"}
_TOKENS_BEFORE = {"api", "auth", "access", "bearer", "refresh", "hf", "session"}
_VALUE = re.compile(
  r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abprs]-|wandb_v\d_|dapi)[A-Za-z0-9_-]{8,}"
  r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}"
  r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
  r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"([?&](?:[\w-]*(?:token|key|secret|password|sig|signature))=)[^&\s#]+", re.I)


def is_secret_key(key: str) -> bool:
  """True when a config key's name says that its value is a credential."""
  words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", str(key))
  words = [w.lower() for w in words]
  if _WORDS & set(words):
    return True
  pairs = list(zip(words, words[1:]))
  return any((a in _KEYS_BEFORE and b in ("key", "keys")) or (a in _TOKENS_BEFORE and b == "tokens")
             for a, b in pairs)


def redact_text(text: str) -> str:
  """Replaces what looks like a credential inside a string."""
  text = _USER_INFO.sub(REDACTED + "@", text)
  text = _QUERY.sub(lambda m: m.group(1) + REDACTED, text)
  return _VALUE.sub(REDACTED, text)


def redact(node: Any) -> Any:
  """Returns a plain copy (dicts, lists, scalars) of a config without its secrets.

  Takes ConfigDicts, dataclasses, mappings, sequences and scalars; anything else becomes its
  redacted `str`. Below a secret key every value but None, booleans and "" is replaced.
  """
  if hasattr(node, "to_dict"):
    node = node.to_dict()
  elif dataclasses.is_dataclass(node) and not isinstance(node, type):
    # Not asdict: it deep-copies leaves.
    node = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
  if isinstance(node, Mapping):
    return {redact_text(str(k)): _hide(v) if is_secret_key(str(k)) else redact(v)
            for k, v in node.items()}
  if isinstance(node, (list, tuple, set, frozenset)):
    return [redact(v) for v in node]
  if node is None or isinstance(node, (bool, int, float)):
    return node
  return redact_text(str(node))


def _hide(value: Any) -> Any:
  return value if value is None or isinstance(value, bool) or value == "" else REDACTED


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
  """Returns `{"a.b": value}` of nested dicts; lists stay as they are."""
  if not isinstance(node, Mapping):
    return {prefix: node}
  out: dict[str, Any] = {}
  for key, value in node.items():
    out.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
  return out
