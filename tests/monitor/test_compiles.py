"""Compilations are counted once, named, and told apart before and after the warm-up."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.monitor.compiles import CompileCounter


@pytest.fixture
def counter():
  with CompileCounter() as c:
    yield c


def late_program(scale):
  @jax.jit
  def late_function(x):
    return jnp.tanh(x * scale)
  return late_function


def test_counts_a_real_jit(counter):
  x = np.ones(5, np.float32)
  before = counter.count
  f = late_program(2.0)
  f(x)
  one = counter.count - before
  assert one == 1 and counter.seconds > 0
  f(x)  # cached
  assert counter.count - before == 1
  f(np.ones(6, np.float32))  # another shape
  assert counter.count - before == 2


def test_starting_twice_counts_once():
  one = CompileCounter()
  one.start()
  one.start()
  other = CompileCounter().start()
  try:
    late_program(3.0)(np.ones(3, np.float32))
    assert one.count == other.count == 1
  finally:
    one.close()
    one.close()
    other.close()
  late_program(4.0)(np.ones(3, np.float32))
  assert one.count == other.count == 1  # closed counters hear nothing


def test_warmup(counter):
  f = late_program(5.0)
  f(np.ones(2, np.float32))
  assert counter.since_warmup == 0 and not counter.ever_warm
  counter.mark_warm()
  f(np.ones(2, np.float32))
  assert counter.since_warmup == 0 and counter.late == []
  f(np.ones(3, np.float32))
  assert counter.since_warmup == 1 and "late_function" in counter.late[0]
  counter.mark_cold()  # a new stage compiles its own programs
  f(np.ones(4, np.float32))
  assert counter.since_warmup == 1 and not counter.warm and counter.ever_warm
  counter.mark_warm()
  f(np.ones(5, np.float32))
  assert counter.since_warmup == 2
  assert counter.metrics() == {"compile/count": 4, "compile/seconds": counter.seconds,
                               "compile/after_warmup": 2}


def test_other_events_do_not_count(counter):
  jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 1.0)
  jax.monitoring.record_event_duration_secs("/some/backend_compile/thing", 2.0)
  assert counter.count == 1 and counter.seconds == 2.0


def test_late_names_are_bounded():
  with CompileCounter(keep=3) as c:
    c.mark_warm()
    for i in range(5):
      jax.monitoring.record_event_duration_secs("backend_compile", 0.0, fun_name=f"f{i}")
    assert c.late == ["f2", "f3", "f4"] and c.since_warmup == 5
