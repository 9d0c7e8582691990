"""A run's folder with rollouts that were made up, some of them hostile."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.models.tokenizer import write_byte_tokenizer
from trinity_jax.monitor.writers import JsonlWriter

HOSTILE = (
  "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
  "</td></tr></table><style>*{display:none}</style>\u202eevil\x00\x1b[31m&lt;b&gt;"
)


class MadeUpRun:
  """Writes a run as the parts do; `add` and `log` go on with it."""

  def __init__(self, folder: Path, keep: bool = True, url: str = "sqlite", namespace: str = ""):
    self.folder, self.stage = folder, folder / "grpo"
    (folder / "model").mkdir(parents=True)
    write_byte_tokenizer(folder / "model", vocab_size=320, max_length=4096)
    self.tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    self._metrics = JsonlWriter(self.stage / "metrics.jsonl")
    self._store = open_store(url, self.stage, namespace=namespace)
    self._buffer = ReplayBuffer(self._store, capacity=999, order="id", tasks_per_step=2, keep=keep)

  def experience(self, id: ExperienceId, turns: list[str], **more) -> Experience:
    """Of turns that user and policy write in turn."""
    tokens, action, messages = [], [], []
    for i, text in enumerate(turns):
      ids = self.tokenizer.encode(text).ids
      tokens += ids
      action += [i % 2 == 1] * len(ids)
      messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    mask = np.array(action)
    logprobs = np.where(mask, -np.arange(len(tokens)) / 10, 0)
    return Experience(
      tokens, mask, logprobs, np.where(mask, id.batch - 1, -1), id, messages=messages, **more
    )

  def add(self, batch: int, hostile: bool = False) -> None:
    """An explorer step of two tasks with three runs each."""

    async def put():
      for task in range(2):
        group = []
        for run in range(3):
          turns = [f"what is {batch}+{task}?", f"{batch + task} of run {run}"]
          if hostile and run == 0:
            turns = [HOSTILE, HOSTILE, HOSTILE, HOSTILE]
          stop = StopReason.LENGTH if run == 2 else StopReason.STOP
          group.append(
            self.experience(
              ExperienceId(batch, task, run, 0),
              turns,
              reward=float(run),
              stop_reason=stop,
              info={"note": HOSTILE} if hostile else {},
            )  # fmt: skip
          )
        await self._buffer.put(group)

    with ThreadPoolExecutor(1) as thread:  # a browser's driver has a loop in the test's own
      thread.submit(asyncio.run, put()).result()

  def train(self, step: int) -> None:
    self._buffer.sample(2, step, 10)
    self._buffer.commit(step)

  def log(self, step: int, **metrics: float) -> None:
    self._metrics.write(step, metrics)

  def close(self) -> None:
    self._metrics.close()
    self._buffer.close()
    self._store.close()
