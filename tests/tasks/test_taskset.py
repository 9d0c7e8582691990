"""Order, cursor and exact resume of tasksets."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_jax.config import TasksetConfig
from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.tasks import Taskset, load_taskset, selectors

sizes, seeds = st.integers(1, 30), st.integers(0, 2**31)
names = st.sampled_from(sorted(selectors.SELECTORS))


def tasks(size):
  return [Task(i, ({"role": "user", "content": str(i)},)) for i in range(size)]


def indices(batch):
  return [t.index for t in batch]


@given(names, seeds, sizes, st.integers(0, 5))
def test_an_epoch_is_a_permutation_and_a_pure_function(name, seed, size, epoch):
  selector = selectors.resolve(name)
  order = selector(seed, epoch, size)
  assert sorted(order) == list(range(size))
  np.testing.assert_array_equal(order, selector(seed, epoch, size))


def test_shuffle_is_numpys_and_differs_by_seed_and_epoch():
  np.testing.assert_array_equal(
    selectors.shuffle(3, 2, 100), np.random.default_rng([3, 2]).permutation(100)
  )
  orders = [tuple(selectors.shuffle(s, e, 100)) for s in range(3) for e in range(3)]
  assert len(set(orders)) == 9  # seed 1 epoch 0 is not seed 0 epoch 1


def test_sequential_is_row_order_every_epoch():
  assert indices(Taskset(tasks(3), selector="sequential").next_batch(7)) == [0, 1, 2, 0, 1, 2, 0]


@given(names, seeds, sizes, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_batches_are_one_stream_however_they_are_cut(name, seed, size, cuts):
  taskset = Taskset(tasks(size), selector=name, seed=seed)
  got = [i for n in cuts for i in indices(taskset.next_batch(n))]
  assert got == indices(Taskset(tasks(size), selector=name, seed=seed).next_batch(sum(cuts)))
  for epoch in range(len(got) // size):
    assert sorted(got[epoch * size : (epoch + 1) * size]) == list(range(size))
  assert taskset.position == sum(cuts) and taskset.epoch == sum(cuts) // size


@given(names, seeds, sizes, st.integers(0, 100), st.integers(1, 40))
def test_resume_is_exact(name, seed, size, done, more):
  first = Taskset(tasks(size), selector=name, seed=seed)
  if done:
    first.next_batch(done)
  state = json.loads(json.dumps(first.state()))
  resumed = Taskset(tasks(size), selector=name, seed=seed)
  resumed.restore(state)
  assert resumed.position == state["position"] == done
  assert indices(resumed.next_batch(more)) == indices(first.next_batch(more))


def test_a_cursor_alone_is_enough():
  taskset = Taskset(tasks(5))
  taskset.restore({"position": 12})
  assert taskset.epoch == 2 and taskset.position == 12


@pytest.mark.parametrize(
  "make, what",
  [
    (lambda: Taskset(tasks(6)), "size was 5 when it was saved and is 6 now"),
    (lambda: Taskset(tasks(5), seed=1), "seed was 0"),
    (lambda: Taskset(tasks(5), selector="sequential"), "selector was 'shuffle'"),
    (lambda: Taskset([*tasks(4), Task(4, ({"role": "user", "content": "new"},))]), "digest was"),
  ],
)
def test_a_cursor_of_something_else_is_refused(make, what):
  state = Taskset(tasks(5)).state()
  with pytest.raises(UserError, match=f"{what}.*resume with the same"):
    make().restore(state)


@pytest.mark.parametrize("position", [None, -1, 1.5, "3", True])
def test_a_damaged_cursor_is_refused(position):
  with pytest.raises(UserError, match="expected an int of at least 0"):
    Taskset(tasks(5)).restore({"position": position})


def test_wrong_uses():
  with pytest.raises(UserError, match="taskset is empty"):
    Taskset([])
  with pytest.raises(UserError, match="did you mean 'shuffle'"):
    Taskset(tasks(2), selector="shufle")
  with pytest.raises(UserError, match="batch of 0 tasks"):
    Taskset(tasks(2)).next_batch(0)
  with pytest.raises(ValueError, match="index is 1"):
    Taskset(tasks(2)[1:])


# --- from a config --------------------------------------------------------------------------------


def rows_without_seed(count):
  return [{"prompt": str(i)} for i in range(count)]


def rows_with_seed(count=2, *, seed):
  return [{"prompt": f"{seed}/{i}"} for i in range(count)]


def no_dicts():
  return ["a"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.setitem(sys.modules, "my_rows", sys.modules[__name__])


def prompts(config, **args):
  return [t.messages[0]["content"] for t in load_taskset(config, **args).tasks]


def test_from_a_file(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"prompt": str(i), "answer": i}) + "\n" for i in range(9)))
  taskset = load_taskset(TasksetConfig(path=str(path), limit=5), seed=4, require=("truth",))
  assert len(taskset) == 5
  assert indices(taskset.next_batch(5)) == selectors.shuffle(4, 0, 5).tolist()
  held_out = load_taskset(TasksetConfig(path=str(path)), is_eval=True)
  assert indices(held_out.next_batch(9)) == list(range(9))
  assert all(t.is_eval for t in held_out.tasks) and not any(t.is_eval for t in taskset.tasks)
  with pytest.raises(UserError, match=r"rows.jsonl:1: no response: field 'response' is missing"):
    load_taskset(TasksetConfig(path=str(path)), require=("truth", "response"))


def test_from_a_generator():
  args = {"generate": "my_rows:rows_without_seed", "generate_args": {"count": 3}}
  assert prompts(TasksetConfig(**args), seed=5) == ["0", "1", "2"]
  config = TasksetConfig(generate="my_rows:rows_with_seed")
  assert prompts(config, seed=5) == ["5/0", "5/1"]
  args = {"generate": "my_rows:rows_with_seed", "generate_args": {"seed": 8}}
  assert prompts(TasksetConfig(**args), seed=5) == ["8/0", "8/1"]


@pytest.mark.parametrize(
  "generate, args, message",
  [
    ("my_rows:nothing", {}, "no function 'nothing'"),
    ("nowhere.at_all:rows", {}, "no module 'nowhere.at_all'"),
    ("my_rows:rows_without_seed", {}, r"generate_args = {}.*missing a required argument: 'count'"),
    ("my_rows:rows_without_seed", {"cuont": 3}, r"takes \(count\)"),
    ("my_rows:rows_without_seed", {"count": 0}, "returned no rows"),
    ("my_rows:no_dicts", {}, r"my_rows:no_dicts\[0\]: expected a dict, got str"),
    ("trinity_jax.tasks.arithmetic:generate", {"split": "test"}, "split 'test': expected one of"),
  ],
)
def test_bad_generators_are_named(generate, args, message):
  with pytest.raises(UserError, match=message):
    load_taskset(TasksetConfig(generate=generate, generate_args=args))
