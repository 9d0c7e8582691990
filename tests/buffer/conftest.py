"""Stores of each kind; a PostgreSQL server for those that need one."""

from __future__ import annotations

import itertools

import postgres
import pytest

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store

_count = itertools.count()


@pytest.fixture(scope="session")
def server():
  if reason := postgres.missing():
    pytest.skip(reason)
  with postgres.server() as running:
    yield running


class Place:
  """Where a store is, so that it can be opened again (as another process would)."""

  def __init__(self, kind, directory, request):
    self.kind, self.directory = kind, directory
    self.url, self.namespace = kind, f"test{next(_count)}"
    if kind == "postgresql":
      self.url = request.getfixturevalue("server").url
    self._opened = []

  def open(self, **kwargs):
    if self.kind == "memory" and self._opened:
      return self._opened[0]
    store = open_store(self.url, self.directory, namespace=self.namespace, **kwargs)
    self._opened.append(store)
    return store

  def buffer(self, **kwargs):
    kwargs = {"capacity": 1000, "order": "id", "tasks_per_step": 2} | kwargs
    return ReplayBuffer(self.open(), **kwargs)

  def close(self):
    for store in self._opened:
      store.close()


def _place(request, tmp_path):
  place = Place(request.param, tmp_path, request)
  yield place
  place.close()


# The same tests over every store, and over those that processes can share.
place = pytest.fixture(params=["memory", "sqlite", "postgresql"])(_place)
shared = pytest.fixture(params=["sqlite", "postgresql"])(_place)
sqlite = pytest.fixture(params=["sqlite"])(_place)
