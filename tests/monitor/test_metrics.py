"""The catalogue, and reductions by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_jax.monitor import metrics as m


def test_lookup_exact_family_and_pattern():
  assert m.lookup("entropy").unit == "nats/token"
  assert m.lookup("response_length/max").source == "explorer"
  assert m.lookup("rewards/math/mean").name == "rewards/{fn}/mean"
  assert m.lookup("reward/mean").name == "reward/mean"  # not reward/{env}
  assert m.lookup("reward/webshop").name == "reward/{env}"
  assert m.lookup("eval/gsm8k/pass@8").name == "eval/{taskset}/pass@{k}"
  for unknown in ("Entropy", "rewards/math/median", "reward/a/b", "rewards/{fn}/mean", "", "stop/"):
    assert m.lookup(unknown) is None


def test_undocumented():
  assert m.undocumented(["step", "time", "loss", "los", "kl", "zz/top"]) == ["los", "zz/top"]


@pytest.mark.parametrize("name", [  # the names that experts expect
  "frac_reward_zero_std", "entropy", "ppo_kl", "kl", "pg_clipfrac", "grad_norm", "lr",
  "loss/nan_count", "clip_ratio", "no_eos_ratio", "aborted_ratio", "num_turns/mean",
  "tool_call_counts/max", "rewards/format/std", "stale_dropped", "partial_ratio",
  "max_partial_span", "trainer/idle_ratio", "rollout/idle_ratio", "time/wait_for_batch",
  "time/wait_for_policy", "timing_per_token_ms/gen", "perf/mfu/actor", "perf/mfu/actor_infer",
  "global_seqlen/minmax_diff", "staleness/worst", "mismatch/ess", "error/TimeoutError/count",
  "stop/length", "event_loop_lag/p99", "compile/after_warmup", "logprob_diff/p999"])
def test_expected_names_are_there(name):
  assert m.lookup(name) is not None


def test_every_entry_is_complete_and_shown():
  table = m.render_table()
  for name, metric in m.CATALOGUE.items():
    assert metric.name == name and metric.unit and len(metric.meaning) > 3 and metric.source
    assert f"| `{name}` |" in table
  assert len(table.splitlines()) == len(m.CATALOGUE) + 2


def test_stats_by_hand():
  # mean 3; population variance ((2)^2 + 1 + 9) / 3 = 14/3
  out = m.stats([1, 2, 6], "x")
  assert out == {"x/mean": 3.0, "x/min": 1.0, "x/max": 6.0,
                 "x/std": pytest.approx(math.sqrt(14 / 3))}
  assert m.stats([], "x") == {}
  assert math.isnan(m.stats([1.0, np.nan], "x")["x/mean"])
  with pytest.raises(ValueError, match="unknown statistic 'median' for 'x'"):
    m.stats([1], "x", ("median",))


def test_reduce_metrics():
  rows = [{"a": 1.0, "n:sum": 2, "v:last": 5, "q:max": 3, "s:std": 1.0},
          {"a": np.float32(3.0), "n:sum": np.int64(4), "v:last": 6, "q:max": -1, "b": None,
           "s:std": 3.0}]
  assert m.reduce_metrics(rows, "rollout", ("mean", "max")) == {
    "rollout/a/mean": 2.0, "rollout/a/max": 3.0, "rollout/n": 6.0, "rollout/v": 6.0,
    "rollout/q": 3.0, "rollout/s": 1.0}
  assert m.reduce_metrics([{"x:mean": 2.0}], which=("mean",)) == {"x/mean": 2.0}
  assert m.reduce_metrics([]) == {}


@pytest.mark.parametrize("rows, error, text", [
  ([{"a:median": 1}], ValueError, "unknown suffix 'median'"),
  ([{"a": "x"}], TypeError, "metric 'a' is str"),
  ([{"a": [1, 2]}], TypeError, "metric 'a' is list"),
  ([{"a": 1, "a:mean": 2}], ValueError, "gives 'a/max', which another key gave already"),
])
def test_reduce_metrics_errors(rows, error, text):
  with pytest.raises(error, match=text):
    m.reduce_metrics(rows)


def test_percentile_by_hand():
  values = np.arange(1, 1001)[::-1]
  assert m.percentile(values, 99.9) == 999  # rank ceil(999.0): not 1000, whatever floats say
  assert m.percentile(np.arange(1, 1002), 99.9) == 1000  # rank ceil(999.999)
  assert m.percentile(values, 100) == 1000 and m.percentile(values, 0) == 1
  assert m.percentile([7.0], 99.9) == 7.0
  assert m.percentile([[3, 1], [2, 4]], "50") == 2
  assert math.isnan(m.percentile([1.0, np.nan, 2.0], 50))
  assert m.percentile([1.0, np.inf], 50) == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.sampled_from(
  [0, 0.1, 1, 25, 50, 90, 99, 99.9, 99.99, 100]))
def test_percentile_is_its_definition(values, percent):
  found = m.percentile(values, percent)
  thousandths = round(percent * 1000)
  at_or_below = [v for v in sorted(values)
                 if sum(w <= v for w in values) * 100_000 >= thousandths * len(values)]
  assert found == at_or_below[0]


@pytest.mark.parametrize("values, percent, text", [
  ([], 50, "of no values"), ([1], 101, "expected 0 to 100"), ([1], -1, "expected 0 to 100")])
def test_percentile_errors(values, percent, text):
  with pytest.raises(ValueError, match=text):
    m.percentile(values, percent)


def test_tail_names():
  assert m.tail([1.0, 2.0], "logprob_diff") == {"logprob_diff/p999": 2.0}
  assert m.tail([1.0, 2.0], "lag", (50, 99)) == {"lag/p50": 1.0, "lag/p99": 2.0}
  assert m.tail([], "lag") == {}
