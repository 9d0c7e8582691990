"""Lengths that programs are compiled for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_jax.errors import UserError
from trinity_jax.sampler.cache import bucket_for, buckets


@given(st.integers(1, 5000), st.integers(1, 300))
def test_default_buckets_double_up_to_the_longest(longest, smallest):
  got = buckets(longest, smallest=smallest)
  assert got[-1] == longest and list(got) == sorted(set(got))
  assert all(b == 2 * a for a, b in zip(got, got[1:-1]))
  for n in (1, longest // 2 + 1, longest):
    chosen = bucket_for(n, got)
    assert chosen >= n and all(b < n for b in got if b < chosen)


def test_declared_buckets_are_sorted_and_cut_at_the_longest():
  assert buckets(100, (256, 32, 100)) == (32, 100)
  assert buckets(9, (9,)) == (9,)
  for declared in ((32, 64), (0, 200), (-1, 100)):
    with pytest.raises(UserError, match="must be positive and reach 100; add 100"):
      buckets(100, declared)


def test_a_length_beyond_the_largest_is_an_error():
  with pytest.raises(UserError, match="length 101 exceeds the largest compiled length 100"):
    bucket_for(101, (50, 100))
