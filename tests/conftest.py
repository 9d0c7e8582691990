"""Every test sees 8 fake CPU devices; broadcasting by accident is an error."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files of many minutes: begun last, one of them would run on alone (make slow).
_FIRST = ("test_quickstart", "test_frozen_lake", "test_recipes", "test_faults")


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in _FIRST)
