"""The wall-time split: hand-made timelines, any set of spans, threads, asyncio, cost, trace."""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
import threading
from fractions import Fraction

import pytest
from growth import assert_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.monitor import timeline as tl
from trinity_jax.monitor.metrics import undocumented


class Clock:
  """A clock that only moves when told."""

  def __init__(self):
    self.now = 1_000

  def __call__(self) -> int:
    return self.now


def make(**kwargs):
  clock = Clock()
  return clock, tl.Timeline(clock=clock, **kwargs)


def shares(report) -> dict[str, float]:
  return {k.split("/")[1]: v for k, v in report.items() if k.startswith("time_split/") and v}




def test_one_thread_by_hand():
  clock, line = make()
  with line.span("decode"):
    clock.now += 60
  with line.span("train"):
    clock.now += 20
    with line.span("publish"):  # suspends train
      clock.now += 10
  clock.now += 10
  out = line.step()
  assert shares(out) == {"decode": 60.0, "train": 20.0, "publish": 10.0, "other": 10.0}
  assert out["time/step"] == 100e-9 and out["time/train"] == 20e-9 and out["time/other"] == 10e-9
  assert out["trainer/idle_ratio"] == pytest.approx(0.7)
  assert out["rollout/idle_ratio"] == pytest.approx(0.4)
  assert undocumented(out) == []


def test_same_category_twice_is_once():
  clock, line = make()
  other = contextvars.Context()
  a, b = line.span("decode"), line.span("decode")
  a.__enter__()
  other.run(b.__enter__)
  clock.now += 30
  a.__exit__(None, None, None)
  clock.now += 10
  other.run(b.__exit__, None, None, None)
  out = line.step()
  assert shares(out) == {"decode": 100.0} and out["time/decode"] == 40e-9


@pytest.mark.parametrize("active, expected", [
  (("decode", "train"), {"decode": 50.0, "train": 50.0}),
  (("decode", "prefill", "train", "checkpoint"),
   {"decode": 25.0, "prefill": 25.0, "train": 25.0, "checkpoint": 25.0}),
  (("decode", "reward", "wait_for_batch"), {"decode": 100.0}),
  (("reward", "environment", "wait_for_batch"), {"reward": 50.0, "environment": 50.0}),
  (("wait_for_batch", "wait_for_policy"), {"wait_for_batch": 50.0, "wait_for_policy": 50.0}),
  (("wait_for_batch", "other"), {"wait_for_batch": 100.0}),
  (("other",), {"other": 100.0}),
  (("eval", "decode", "prefill"), {"eval": 100.0}),
  (("eval", "decode", "train"), {"eval": 50.0, "train": 50.0}),
  ((), {"other": 100.0}),
])
def test_precedence(active, expected):
  clock, line = make()
  for name in active:
    contextvars.Context().run(line.span(name).__enter__)
  clock.now += 8
  assert shares(line.step()) == expected


def test_thirds_sum_to_100():
  clock, line = make()
  for name in ("decode", "train", "publish"):
    contextvars.Context().run(line.span(name).__enter__)
  clock.now += 1
  found = shares(line.step())
  assert sum(found.values()) == 100.0
  assert all(v == pytest.approx(100 / 3, abs=1e-6) for v in found.values())


def test_empty_window():
  _, line = make()
  out = line.step()
  assert shares(out) == {"other": 100.0}
  assert out["trainer/idle_ratio"] == out["rollout/idle_ratio"] == 1.0


def test_open_span_is_cut_at_the_window():
  clock, line = make()
  with line.span("train"):
    clock.now += 5
    first = line.step()
    clock.now += 7
  clock.now += 7
  second = line.step()
  assert shares(first) == {"train": 100.0}
  assert shares(second) == {"train": 50.0, "other": 50.0}
  assert line.total()["time/train"] == 12e-9 and line.total()["time/step"] == 19e-9


def test_total_includes_the_running_window():
  clock, line = make()
  clock.now += 10
  line.step()
  with line.span("eval"):
    clock.now += 30
    assert shares(line.total()) == {"eval": 75.0, "other": 25.0}
  assert line.step()["time/step"] == 30e-9  # total() ended no window


def test_unknown_category():
  with pytest.raises(ValueError, match="unknown timeline category 'decod'; did you mean 'decode'"):
    make()[1].span("decod")


def test_exception_closes_the_span():
  clock, line = make()
  with pytest.raises(RuntimeError, match="boom"), line.span("reward"):
    clock.now += 1
    raise RuntimeError("boom")
  clock.now += 3
  assert shares(line.step()) == {"reward": 25.0, "other": 75.0}


# A program: contexts do things in turn. "push" opens a span in a context, "pop" closes its newest,
# "tick" lets time pass, "step" ends a window.
_OPS = st.lists(st.one_of(
  st.tuples(st.just("push"), st.integers(0, 3), st.sampled_from(tl.CATEGORIES)),
  st.tuples(st.just("pop"), st.integers(0, 3), st.none()),
  st.tuples(st.just("tick"), st.integers(0, 10**12), st.none()),
  st.tuples(st.just("step"), st.none(), st.none()),
), max_size=60)


def _expected(stacks, acc, dt):
  """Reference: who owns dt, in rationals, straight from the documented rules."""
  active = {stack[-1].name for stack in stacks if stack}
  if "eval" in active:
    active -= {"prefill", "decode"}
  for tier in (tl.DEVICE, tl.HOST, tl.WAIT, ("other",)):
    own = [name for name in tier if name in active]
    if own:
      break
  else:
    own = ["other"]
  for name in own:
    acc[name] = acc.get(name, 0) + Fraction(dt, len(own))


class _Open:
  def __init__(self, name, span):
    self.name, self.span = name, span


@settings(max_examples=300, deadline=None)
@given(_OPS)
def test_any_spans_sum_to_100(ops):
  clock, line = make()
  contexts = [contextvars.Context() for _ in range(4)]
  stacks: list[list[_Open]] = [[] for _ in contexts]
  acc: dict[str, Fraction] = {}
  windows = []
  for op, arg, category in [*ops, ("step", None, None)]:
    if op == "push":
      span = line.span(category)
      contexts[arg].run(span.__enter__)
      stacks[arg].append(_Open(category, span))
    elif op == "pop" and stacks[arg]:
      contexts[arg].run(stacks[arg].pop().span.__exit__, None, None, None)
    elif op == "tick":
      clock.now += arg
      _expected(stacks, acc, arg)
    elif op == "step":
      windows.append((line.step(), acc))
      acc = {}
  for out, wanted in windows:
    found = {name: out[f"time_split/{name}"] for name in tl.CATEGORIES}
    names = list(found)
    random.Random(0).shuffle(names)
    assert sum(found[n] for n in names) == 100.0  # exactly, in any order
    assert min(found.values()) >= 0
    total = sum(wanted.values())
    if total:
      for name in tl.CATEGORIES:
        assert abs(Fraction(found[name]) - 100 * Fraction(wanted.get(name, 0)) / total) < 2**-20
    assert 0 <= out["trainer/idle_ratio"] <= 1 and 0 <= out["rollout/idle_ratio"] <= 1
    assert sum(json.loads(json.dumps(found)).values()) == 100.0  # survives metrics.jsonl


def test_real_threads():
  line = tl.Timeline()
  barrier = threading.Barrier(5)

  def work(seed):
    rng = random.Random(seed)
    barrier.wait()
    for _ in range(300):
      with line.span(rng.choice(tl.CATEGORIES)), line.span(rng.choice(tl.CATEGORIES)):
        pass

  threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
  for t in threads:
    t.start()
  barrier.wait()
  reports = []
  while any(t.is_alive() for t in threads):
    reports.append(line.step())
    threads[0].join(0.002)
  reports.append(line.step())
  for out in reports:
    assert sum(v for k, v in out.items() if k.startswith("time_split/")) == 100.0
  assert line._active == 0 and line._counts == [0] * len(tl.CATEGORIES)
  assert sum(r["time/step"] for r in reports) <= line.total()["time/step"] + 1e-9


def test_asyncio_tasks_interleave_and_suspend_their_parent():
  clock, line = make()

  async def environment(enter, leave):
    await enter.wait()
    with line.span("environment"):
      await leave.wait()

  async def main():
    events = [asyncio.Event() for _ in range(4)]

    async def settle(event, ns):
      event.set()
      for _ in range(3):
        await asyncio.sleep(0)
      clock.now += ns

    with line.span("eval"):
      tasks = [asyncio.create_task(environment(events[0], events[2])),
               asyncio.create_task(environment(events[1], events[3]))]
      clock.now += 10  # eval
      await settle(events[0], 20)  # one child
      await settle(events[1], 20)  # two, entered in the order a b ...
      await settle(events[2], 20)  # ... left in the order a b: not nested
      await settle(events[3], 30)  # eval again
      await asyncio.gather(*tasks)

  asyncio.run(main())
  assert shares(line.step()) == {"eval": 40.0, "environment": 60.0}
  assert line._active == 0


def test_task_that_outlives_its_parent():
  clock, line = make()

  async def main():
    stop = asyncio.Event()

    async def child():
      with line.span("reward"):
        await stop.wait()

    with line.span("train"):
      task = asyncio.create_task(child())
      await asyncio.sleep(0)
      clock.now += 10
    clock.now += 30
    stop.set()
    await task

  asyncio.run(main())
  assert shares(line.step()) == {"reward": 100.0}
  assert line._active == 0


@pytest.mark.parametrize("keep", [0, 100, 1_000_000])
def test_a_span_costs_the_same_however_many_there_were(keep):
  def spans(n):
    line = tl.Timeline(keep=keep)
    for _ in range(n):
      with line.span("decode"):
        pass

  assert_linear(spans, 1000)


def test_trace(tmp_path):
  clock, line = make(keep=3)
  with line.span("train", "step 1"):
    clock.now += 2_000
    with line.span("publish"):
      clock.now += 1_000
  first, second = line.span("environment"), line.span("reward")
  a, b = contextvars.Context(), contextvars.Context()
  a.run(first.__enter__)
  clock.now += 1_000
  b.run(second.__enter__)
  clock.now += 1_000
  a.run(first.__exit__, None, None, None)
  clock.now += 1_000
  b.run(second.__exit__, None, None, None)
  trace = json.loads(line.write_trace(tmp_path / "trace.json").read_text())
  assert trace["otherData"] == {"spans_finished": 4, "spans_dropped": 1}  # publish ended first
  spans = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
  assert spans == [("step 1", "train", 0.0, 3.0), ("environment", "environment", 3.0, 2.0),
                   ("reward", "reward", 4.0, 2.0)]
  lanes = {e["name"]: e["tid"] for e in trace["traceEvents"] if e["ph"] == "X"}
  assert lanes["environment"] == lanes["step 1"] != lanes["reward"]
  names = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"]
  assert names == ["MainThread", "MainThread (2)"]


def test_trace_without_spans():
  _, line = make(keep=0)
  with line.span("train"):
    pass
  assert line.trace()["traceEvents"] == []
