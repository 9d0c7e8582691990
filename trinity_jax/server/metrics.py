"""Counters and gauges in Prometheus' text format (0.0.4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trinity_jax.explorer.answer import Answer
from trinity_jax.sampler.rollout_engine import RolloutEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)  # seconds


class Counters:
  """What a server counts; only its event loop writes.

  Args:
    paths: endpoints with counters of their own; all others count as "other".
  """

  def __init__(self, paths: tuple[str, ...]):
    self._paths = frozenset(paths)
    self._requests: Counter[tuple[str, int]] = Counter()
    self._seconds: dict[str, list[float]] = {}  # a count per bucket, then sum and count
    self.open = 0
    self.totals: Counter[str] = Counter()

  def count(self, path: str, status: int, seconds: float) -> None:
    """Counts a request; status 0: its client left before there was an answer."""
    path = path if path in self._paths else "other"
    self._requests[path, status or 499] += 1
    row = self._seconds.setdefault(path, [0.0] * (len(_BUCKETS) + 2))
    for i, bound in enumerate(_BUCKETS):
      row[i] += seconds <= bound
    row[-2] += seconds
    row[-1] += 1

  def answered(self, answers: list[Answer]) -> None:
    """Counts what was sampled."""
    self.totals["completions"] += len(answers)
    self.totals["prompt_tokens"] += sum(len(a.prompt) for a in answers)
    self.totals["completion_tokens"] += sum(len(a.completion.tokens) for a in answers)
    self.totals["tool_calls"] += sum(len(a.message.get("tool_calls", ())) for a in answers)
    self.totals["tool_call_errors"] += sum(bool(a.tool_error) for a in answers)

  def text(self, engine: RolloutEngine, sessions: int) -> str:
    """Everything, with the engine's own gauges and counters."""
    lines: list[str] = []

    def add(name: str, kind: str, values: Mapping[str, float]) -> None:
      lines.append(f"# TYPE {name} {kind}")
      lines.extend(f"{name}{labels} {value:.10g}" for labels, value in values.items())

    requests = {f'{{path="{p}",status="{s}"}}': n for (p, s), n in sorted(self._requests.items())}
    add("trinity_http_requests_total", "counter", requests)
    name = "trinity_http_request_seconds"
    lines.append(f"# TYPE {name} histogram")
    for path, row in sorted(self._seconds.items()):
      for bound, n in zip((*_BUCKETS, "+Inf"), (*row[:-2], row[-1])):
        lines.append(f'{name}_bucket{{path="{path}",le="{bound}"}} {n:.10g}')
      lines.append(f'{name}_sum{{path="{path}"}} {row[-2]:.10g}')
      lines.append(f'{name}_count{{path="{path}"}} {row[-1]:.10g}')
    add("trinity_http_open_requests", "gauge", {"": self.open})
    add("trinity_sessions", "gauge", {"": sessions})
    add("trinity_policy_version", "gauge", {"": engine.version})
    for key, total in sorted(self.totals.items()):
      add(f"trinity_{key}_total", "counter", {"": total})
    for key, value in sorted(engine.stats.items()):
      add(f"trinity_engine_{_plain(key)}_total", "counter", {"": value})
    for key, value in sorted(engine.metrics().items()):
      add(f"trinity_{_plain(key)}", "gauge", {"": value})
    return "\n".join(lines) + "\n"


def _plain(name: Any) -> str:
  return re.sub(r"[^a-zA-Z0-9_]", "_", str(name))
