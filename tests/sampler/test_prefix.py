"""The index of cached prefixes against a search of everything."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.sampler.prefix import BLOCK, PrefixIndex

# Runs of equal tokens: common prefixes of every length, and beginnings that repeat themselves.
TOKENS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3 * BLOCK)), max_size=4).map(
  lambda runs: np.array([t for t, n in runs for _ in range(n)], np.int32)
)
SALTS = st.sampled_from([(0,), (1,), (0, 1), (-1,)])


def common(a, b) -> int:
  n = 0
  while n < min(len(a), len(b)) and a[n] == b[n]:
    n += 1
  return n


def searched(held, salt, tokens):
  """(slot, tokens in common) of those that share the most whole blocks."""
  found = [(s, common(t, tokens)) for s, (put, t) in held.items() if put == salt]
  most = max((n // BLOCK for _, n in found), default=0)
  best = [(s, n) for s, n in found if most and n // BLOCK == most]
  return sorted(best, key=lambda f: (-f[1], f[0]))


@given(
  st.lists(
    st.one_of(
      st.tuples(st.just("put"), st.integers(0, 5), SALTS, TOKENS),
      st.tuples(st.just("drop"), st.integers(0, 5)),
      st.just(("clear",)),
    ),
    max_size=20,
  ),
  st.lists(st.tuples(SALTS, TOKENS), max_size=5),
)
@settings(deadline=None, max_examples=150)
def test_finds_the_longest_common_prefix_and_forgets_what_it_must(events, questions):
  index, held = PrefixIndex(), {}
  for name, *rest in events:
    getattr(index, name)(*rest)
    if name == "put":
      held[rest[0]] = (rest[1], rest[2])
    elif name == "drop":
      held.pop(rest[0], None)
    else:
      held.clear()
  for salt, tokens in [*questions, *held.values()]:
    assert index.find(salt, tokens) == searched(held, salt, tokens)
  assert len(index) == sum(len(t) // BLOCK for _, t in held.values())
  assert len(index._slots) <= len(index), "links that lead nowhere"
  for slot in list(held):
    index.drop(slot)
  assert len(index) == 0 and not index._slots and not index._held


def test_a_prefix_is_found_under_its_own_salt_only():
  index, tokens = PrefixIndex(), np.arange(3 * BLOCK, dtype=np.int32)
  index.put(0, (7, 1), tokens)
  assert index.find((7, 1), tokens) == [(0, 3 * BLOCK)]
  assert index.find((7, 1), tokens[: BLOCK - 1]) == []  # less than a block
  assert index.find((7, 1), tokens[: 2 * BLOCK + 3]) == [(0, 2 * BLOCK + 3)]
  for other in ((8, 1), (7,), (7, 1, 0), (71,)):
    assert index.find(other, tokens) == []


def test_tokens_are_compared_not_only_hashed():
  """What lies beyond the last whole block counts as well."""
  index, tokens = PrefixIndex(), np.arange(BLOCK + 9, dtype=np.int32)
  index.put(3, (), tokens)
  index.put(1, (), np.append(tokens[: BLOCK + 4], 99))
  assert index.find((), tokens) == [(3, BLOCK + 9), (1, BLOCK + 4)]
