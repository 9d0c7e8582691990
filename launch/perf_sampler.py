"""The sampler alone: equal and long-tailed lengths, group prefill, multi-turn."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from benchmark import (
  PEERS,
  REPEATS,
  SIZES_FLAG,
  Row,
  matmul_rate,
  model_folders,
  peers,
  run_peer,
  timed,
)

PARTS = flags.DEFINE_list("parts", [], "Parts of `sampler`: equal, tail, group, turns; empty: all.")
DECODE_PEERS = {"hf": "trl", "tunix": "tunix"}  # name -> environment

MAX_PROMPT = 32
EQUAL, EQUAL_NEW = 128, 64  # requests, tokens of each
TAIL, TAIL_SLOTS, TAIL_CAP = 1024, 64, 256
# What peers serve of the long tail, and in which batches: their rate does not depend on the number,
# and Tunix's hardly on the batch.
TAIL_PEERS = {
  "s": (512, {"hf": (64, 128, 256), "tunix": (128,)}),
  "m": (256, {"hf": (128,), "tunix": (128,)}),
}
LONG_PROMPT, GROUP = 1024, 16
TURNS, TURN_NEW, OBSERVATION, DIALOGUES = 8, 64, 32, 16


class Bench:
  """A sampler of one model with a config's sampler keys."""

  def __init__(self, folder: Path, **keys: Any):
    import jax.numpy as jnp

    from trinity_jax import build
    from trinity_jax.config import base_config, resolve
    from trinity_jax.launch_order import LaunchOrder
    from trinity_jax.models import hf, sharding
    from trinity_jax.models.tokenizer import Tokenizer

    start = time.perf_counter()
    c = base_config()
    c.model.path, c.taskset.path = str(folder), "none"
    for key, value in keys.items():
      c.sampler[key] = value
    c.explorer.deterministic = False
    c = resolve(c)
    self.tokenizer, self.model = Tokenizer.load(folder), hf.load_config(folder)
    meshes = build.make_meshes(c)
    layout = sharding.param_shardings(self.model, meshes.train)
    params, _ = hf.load(folder, dtype=jnp.float32, shardings=layout)
    self.sampler: Any = build.make_engine(c, self.model, meshes, LaunchOrder(meshes.train))
    self.sampler.start()
    self.sampler.set_params(0, params)
    self.compile_seconds = time.perf_counter() - start
    self._serial = 0

  def request(self, tokens: Sequence[int], limit: int, group: int = 0) -> Any:
    """No stop tokens: it ends at its limit."""
    import numpy as np

    from trinity_jax.sampler.request import Request
    from trinity_jax.sampler.sampling import request_key

    self._serial += 1
    order = (0, group, self._serial)
    # The salt keeps repeats apart: what one has left in the cache must not help the next.
    salt = (group,)
    return Request(np.array(tokens, np.int32), request_key(*order), order, limit, (), salt=salt)

  def serve(self, requests: Sequence[Any]) -> dict[str, float]:
    """Serves all of them; the differences of the counters, and `wall` seconds.

    They are queued while the sampler is paused: the queue is full from the start, as a peer's is.
    """
    self.sampler.pause()
    before = self.sampler.stats
    futures = [self.sampler.submit(r) for r in requests]
    start = time.perf_counter()
    self.sampler.resume()
    done = [f.result() for f in futures]
    wall = time.perf_counter() - start
    assert [len(d.tokens) for d in done] == [r.limit for r in requests]
    return {**{k: v - before[k] for k, v in self.sampler.stats.items()}, "wall": wall}

  def prompts(self, n: int) -> list[list[int]]:
    """As the peers' scripts draw them: 27 to 31 bytes."""
    import numpy as np

    pairs = np.random.default_rng(0).integers(1, 1000, (n, 2))
    return [self.tokenizer.encode(f"Q: compute the sum {a}+{b}=? A:") for a, b in pairs]


def bench_sampler() -> list[Row]:
  unknown = [part for part in PARTS.value if part not in COMMANDS]
  if unknown:
    sys.exit(f"error: --parts {', '.join(unknown)}: no such part; known: {', '.join(COMMANDS)}")
  rows: list[Row] = [Row("matmul", matmul_rate(REPEATS.value), "GFLOP/s"), copy_rate()]
  with model_folders() as folder:
    for size in SIZES_FLAG.value:
      for part in PARTS.value or COMMANDS:
        rows += COMMANDS[part](size, folder(size))
  return rows


def copy_rate() -> Row:
  import numpy as np

  x = np.ones(2**25, np.float32)
  y = np.empty_like(x)
  _, best = timed(lambda: np.copyto(y, x), 5)
  return Row("copy", x.nbytes / best / 1e9, "GB/s")


def throughput(name: str, runs: Sequence[dict[str, float]], bench: Bench) -> list[Row]:
  """Rate, shares and compile time of repeated `serve`s."""
  rate = lambda r: r["sampled_tokens"] / r["wall"]
  median = lambda f: statistics.median(map(f, runs))
  share = lambda a, b: median(lambda r: r[a] / r[b])
  steps = median(lambda r: 1e3 * r["decode_seconds"] / r["decode_steps"])
  return [
    Row(f"{name}/compile", bench.compile_seconds, "s"),
    Row(f"{name}/tokens", median(rate), "tokens/s", minimum=min(map(rate, runs))),
    Row(f"{name}/step", steps, "ms"),
    Row(f"{name}/occupancy", share("busy_slot_steps", "slot_steps"), "fraction"),
    Row(f"{name}/roofline", share("roofline_seconds", "decode_seconds"), "fraction"),
    Row(f"{name}/prefill", share("prefill_seconds", "wall"), "fraction"),
    Row(f"{name}/host", median(lambda r: 1 - (r["prefill_seconds"] + r["decode_seconds"])
                               / r["wall"]), "fraction"),
  ]  # fmt: skip


def against(ours: Row, name: str, report: dict[str, Any] | None) -> list[Row]:
  if report is None:
    return []
  rate = report["useful_tok_s"]
  best = Row(name, rate, "tokens/s", ours.name, ours.value / rate, report["useful_tok_s_best"])
  return [best]


def equal_lengths(size: str, folder: Path) -> list[Row]:
  bench = Bench(
    folder, slots=EQUAL, max_prompt_length=MAX_PROMPT, max_response_length=EQUAL_NEW,
    prompt_buckets=(MAX_PROMPT,), prefill_batches=(EQUAL,), steps_per_dispatch=EQUAL_NEW,
    cache_buckets=(64, MAX_PROMPT + EQUAL_NEW),
  )  # fmt: skip
  tokens = bench.prompts(EQUAL)
  serve = lambda i: bench.serve([bench.request(t, EQUAL_NEW, group=i) for t in tokens])
  serve(-1)  # still pages memory in
  rows = throughput(f"{size}/equal/ours", [serve(i) for i in range(REPEATS.value)], bench)
  bench.sampler.close()
  if PEERS.value:
    call = ["--size", size, "--n", EQUAL, "--batch", EQUAL, "--uniform", EQUAL_NEW]
    for name, env in peers(DECODE_PEERS):
      report = run_peer(env, [f"{name}_decode.py", *map(str, call), "--reps", str(REPEATS.value)])
      rows += against(rows[1], f"{size}/equal/{name}", report)
  return rows


def tail_lengths(n: int) -> Any:
  """Log-normal, median 48, at most 256: the peers' scripts draw the same."""
  import numpy as np

  draw = np.random.default_rng(0).standard_normal(n)
  return np.clip(np.round(np.exp(np.log(48) + 0.9 * draw)), 4, TAIL_CAP).astype(int)


def long_tail(size: str, folder: Path) -> list[Row]:
  bench = Bench(
    folder, slots=TAIL_SLOTS, max_prompt_length=MAX_PROMPT, max_response_length=TAIL_CAP,
    prompt_buckets=(MAX_PROMPT,), prefill_batches=(5, 6, 8, TAIL_SLOTS), steps_per_dispatch=32,
    refill_fraction=0.125, cache_buckets=(96, 160, 224, MAX_PROMPT + TAIL_CAP),
  )  # fmt: skip
  tokens, lengths = bench.prompts(TAIL), tail_lengths(TAIL)
  ask = lambda i, n: [
    bench.request(t, int(limit), group=i) for t, limit in zip(tokens[:n], lengths[:n])
  ]
  bench.serve(ask(-1, TAIL_SLOTS))
  runs = [bench.serve(ask(i, TAIL)) for i in range(max(1, REPEATS.value // 2))]
  bench.sampler.close()
  rows = throughput(f"{size}/tail/ours", runs, bench)
  full = statistics.median(r["queued_busy_slot_steps"] / r["queued_slot_steps"] for r in runs)
  rows.append(Row(f"{size}/tail/ours/occupancy_while_queued", full, "fraction"))
  if PEERS.value:
    n, batches = TAIL_PEERS[size]
    for name, env in peers(DECODE_PEERS):
      for batch in batches[name]:
        call = ["--size", size, "--n", n, "--batch", batch, "--reps", 1]
        report = run_peer(env, [f"{name}_decode.py", *map(str, call)])
        rows += against(rows[1], f"{size}/tail/{name}/batch_{batch}", report)
  return rows


def group_prefill(size: str, folder: Path) -> list[Row]:
  """A group of 16 against one run, prompt of 1,024 tokens, one token each: all of it is prefill."""
  bench = Bench(
    folder, slots=GROUP, max_prompt_length=LONG_PROMPT, max_response_length=8,
    prompt_buckets=(LONG_PROMPT,), prefill_batches=(1,), cache_buckets=(LONG_PROMPT + 8,),
  )  # fmt: skip
  seconds: dict[int, list[float]] = {1: [], GROUP: []}
  for i in range(REPEATS.value + 1):
    for n in seconds:
      prompt = [3 + (7 * j + 13 * i + n) % 256 for j in range(LONG_PROMPT)]
      seconds[n].append(bench.serve([bench.request(prompt, 1, group=i)] * n)["wall"])
  bench.sampler.close()
  one, group = (statistics.median(s[1:]) for s in seconds.values())
  name = f"{size}/group_prefill"
  return [
    Row(f"{name}/one", one, "s", minimum=min(seconds[1][1:])),
    Row(f"{name}/group", group, "s", f"{name}/one", group / one, min(seconds[GROUP][1:])),
  ]


def multi_turn(size: str, folder: Path) -> list[Row]:
  """Dialogues against one long response of as many tokens, and a prefill of what was new."""
  new, longest = TURN_NEW * TURNS, MAX_PROMPT + (TURN_NEW + OBSERVATION) * TURNS
  bench = Bench(
    folder, slots=DIALOGUES, max_prompt_length=longest - TURN_NEW, max_response_length=new,
    prompt_buckets=(MAX_PROMPT + 1,), prefill_chunk=MAX_PROMPT + 1,
    prefill_batches=(1, 4, DIALOGUES),
    cache_buckets=(longest // 2, longest - TURN_NEW + new), steps_per_dispatch=TURN_NEW,
  )  # fmt: skip
  tokens = bench.prompts(DIALOGUES)
  seconds: dict[str, list[float]] = {"dialogue": [], "decode": [], "prefill": []}
  for i in range(REPEATS.value + 1):
    seconds["dialogue"].append(dialogues(bench, tokens, i))
    seconds["decode"].append(
      bench.serve([bench.request(t, new, group=1000 + i) for t in tokens])["wall"]
    )
    spent = 0.0
    for turn in range(TURNS - 1):
      fresh = [
        [3 + (j * 7 + turn + k + i) % 256 for j in range(OBSERVATION)] for k in range(DIALOGUES)
      ]
      requests = [bench.request(t, 1, group=2000 + i) for t in fresh]
      spent += bench.serve(requests)["prefill_seconds"]
    seconds["prefill"].append(spent)
  bench.sampler.close()
  ours, decode, prefill = (statistics.median(s[1:]) for s in seconds.values())
  name = f"{size}/multi_turn"
  return [
    Row(f"{name}/decode", decode, "s"),
    Row(f"{name}/prefill_of_new", prefill, "s"),
    Row(f"{name}/dialogues", ours, "s", "decode + prefill_of_new", ours / (decode + prefill)),
  ]


def dialogues(bench: Bench, prompts: Sequence[Sequence[int]], number: int) -> float:
  """Wall seconds of 16 dialogues of 8 turns at once; asserts that no history is prefilled twice."""

  async def one(log: list[int], k: int) -> None:
    with bench.sampler.participant():
      for turn in range(TURNS):
        request = bench.request(log, TURN_NEW, group=number)
        out = await bench.sampler.generate(request)
        log += [*out.tokens.tolist(), *(3 + (j + turn + k) % 256 for j in range(OBSERVATION))]

  async def all_of_them() -> None:
    await asyncio.gather(*(one(list(p), k) for k, p in enumerate(prompts)))

  before = bench.sampler.stats
  start = time.perf_counter()
  asyncio.run(all_of_them())
  wall = time.perf_counter() - start
  computed = bench.sampler.stats["prompt_tokens"] - before["prompt_tokens"]
  # Besides what is new, the last token of each turn: it was sampled, but never run.
  most = sum(map(len, prompts)) + (TURNS - 1) * len(prompts) * (OBSERVATION + 1)
  assert computed <= most, (computed, most)
  return wall


COMMANDS = {
  "equal": equal_lengths,
  "tail": long_tail,
  "group": group_prefill,
  "turns": multi_turn,
}
