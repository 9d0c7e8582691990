"""Which slots hold which token prefixes: a host-side index of the cache.

Prefixes are found by chained hashes of token blocks, so a lookup costs one hash per block and the
memory is bounded by the cache itself: one entry per block of each slot.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

BLOCK = 16  # tokens; shorter prefixes are not worth finding
_MOST = 8  # slots compared token by token in one lookup


class PrefixIndex:
  """Slots by the tokens whose keys and values they hold.

  A prefix is found only under the salt it was put with; the scheduler's salt begins with the policy
  version, since another version's keys and values are other numbers.
  """

  def __init__(self):
    self._slots: dict[bytes, dict[int, None]] = {}  # chained hash -> slots, in order of arrival
    self._held: dict[int, tuple[np.ndarray, list[bytes]]] = {}

  def __len__(self) -> int:
    """Entries: blocks known, over all slots."""
    return sum(len(chain) for _, chain in self._held.values())

  def put(self, slot: int, salt: tuple[int, ...], tokens: np.ndarray) -> None:
    """Slot holds, or is about to hold, exactly these tokens."""
    self.drop(slot)
    chain = list(_chain(salt, tokens))
    for link in chain:
      self._slots.setdefault(link, {})[slot] = None
    self._held[slot] = (tokens, chain)

  def drop(self, slot: int) -> None:
    """Forgets what a slot holds."""
    _, chain = self._held.pop(slot, (None, []))
    for link in chain:
      del self._slots[link][slot]
      if not self._slots[link]:
        del self._slots[link]

  def clear(self) -> None:
    self._slots.clear()
    self._held.clear()

  def find(self, salt: tuple[int, ...], tokens: np.ndarray) -> list[tuple[int, int]]:
    """(slot, tokens in common) of slots that share the most whole blocks, longest first.

    Of many such slots the latest few: a system prompt may be in all of them, and what they have in
    common beyond it is less than a block.
    """
    best: dict[int, None] = {}
    for link in _chain(salt, tokens):
      if link not in self._slots:
        break
      best = self._slots[link]
    latest = itertools.islice(reversed(best), _MOST)
    found = [(slot, _common(self._held[slot][0], tokens)) for slot in latest]
    return sorted(found, key=lambda f: (-f[1], f[0]))


def _chain(salt: tuple[int, ...], tokens: np.ndarray) -> Iterator[bytes]:
  link = repr(salt).encode()
  data = np.ascontiguousarray(tokens, np.int32)
  for start in range(0, len(data) - BLOCK + 1, BLOCK):
    block = data[start : start + BLOCK].tobytes()
    link = hashlib.blake2b(link + block, digest_size=16).digest()
    yield link


def _common(a: np.ndarray, b: np.ndarray) -> int:
  n = min(len(a), len(b))
  differ = np.flatnonzero(a[:n] != b[:n])
  return int(differ[0]) if len(differ) else n
