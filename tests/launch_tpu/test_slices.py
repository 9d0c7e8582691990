"""TPU slices: what their names stand for, as published."""

from __future__ import annotations

import pytest
import slices

from trinity_jax.errors import UserError


@pytest.mark.parametrize(
  ("topology", "accelerator", "chips", "hosts"),
  [
    ("v5e:1x1", "v5litepod-1", 1, 1),
    ("v5e:2x4", "v5litepod-8", 8, 1),
    ("v5e:4x4", "v5litepod-16", 16, 4),
    ("v5e:16x16", "v5litepod-256", 256, 64),
    ("v6e:2x2", "v6e-4", 4, 1),
    ("v6e:4x8", "v6e-32", 32, 8),
    ("v5p:2x2x1", "v5p-8", 4, 1),  # two TensorCores a chip
    ("v5p:2x2x2", "v5p-16", 8, 2),
    ("v5p:4x8x8", "v5p-512", 256, 64),
  ],
)
def test_published_slices(topology, accelerator, chips, hosts):
  found = slices.parse(topology)
  assert (found.accelerator_type, found.chips, found.hosts) == (accelerator, chips, hosts)
  assert found.hosts * found.chips_per_host == chips


@pytest.mark.parametrize(
  ("topology", "expected"),
  [
    ("v4:2x2x1", "--topology=v4:2x2x1: expected GENERATION:SHAPE such as v5e:4x4"),
    ("v5e", "--topology=v5e: v5e slices are 1x1, 2x2"),
    ("v5e:4x4x4", "choose one"),
    ("h100x8", "expected GENERATION:SHAPE"),
  ],
)
def test_slices_that_are_not_offered(topology, expected):
  with pytest.raises(UserError, match=expected):
    slices.parse(topology)
