"""The delay of an event loop: small when it is free, as long as what blocks it otherwise."""

from __future__ import annotations

import asyncio
import time

from trinity_jax.monitor.loop_lag import LoopLag


def test_a_blocked_loop_shows():
  lag = LoopLag()

  async def main():
    with lag.running():
      await asyncio.sleep(0.1)
      lag.take()
      time.sleep(0.3)  # what an agent must not do
      await asyncio.sleep(0.05)
    timer = lag._timer
    return timer is not None and timer.cancelled()

  assert asyncio.run(main())
  worst = lag.take()
  assert worst is not None and 0.2 < worst < 5
  assert lag.take() is None
