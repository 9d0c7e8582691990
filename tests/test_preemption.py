"""SIGTERM asks; a second one ends."""

from __future__ import annotations

import os
import signal
import threading

from trinity_jax.preemption import Preemption


def test_a_signal_tells_everyone_and_is_handled_once():
  told = threading.Event()
  before = signal.getsignal(signal.SIGTERM)
  preemption = Preemption()
  with preemption.on_signals(), preemption.telling(told.set):
    assert not preemption.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert told.wait(30) and preemption.requested
    assert signal.getsignal(signal.SIGTERM) == before  # the next one is not ours
  assert signal.getsignal(signal.SIGTERM) == before


def test_who_no_longer_listens_is_not_told():
  told, other = threading.Event(), threading.Event()
  preemption = Preemption()
  with preemption.telling(told.set):
    pass
  with preemption.telling(other.set):
    preemption.request()
    assert other.wait(30)
  assert not told.is_set()


def test_other_threads_leave_signals_alone():
  before, seen = signal.getsignal(signal.SIGTERM), []

  def elsewhere():
    with Preemption().on_signals():
      seen.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=elsewhere)
  thread.start()
  thread.join()
  assert seen == [before]
