"""Several processes that train one model: who leads, how they agree, and how they end together.

Every process runs the same command. JAX's runtime joins them, and each launches the same device
programs in the same order. Process 0 leads: it alone explores, owns the buffer and writes files;
what it has read or decided it tells the others through the runtime's key-value store, before each
step, and what it has to sample it asks of all (sampler/remote.py). A process that fails says so
there, and all others end with its words; one that dies without a word is missed by the runtime,
which ends the others within HEARTBEAT seconds and names it.

    world = distributed.join("auto")     # before JAX is used
    experiences = world.agree(read())    # the leader's value, on every process
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from trinity_jax.errors import RunFailed, UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
VARIABLES = ("TRINITY_JAX_COORDINATOR", "TRINITY_JAX_PROCESSES", "TRINITY_JAX_PROCESS_ID")
_JOIN = 300  # seconds until all have come
_FOREVER = 10**9  # milliseconds; a thread of its own waits
_FAILED, _ASKED, _OVER = "failed", "asked_to_end", "over"
_LAST_WORDS = 5  # seconds for the others to hear of a failure


class World:
  """The processes of a run.

  Attributes:
    index: of this process. count: of all.
  """

  def __init__(self, index: int = 0, count: int = 1, client: Any = None):
    self.index, self.count, self._client = index, count, client
    self._told = 0
    self._stored: list[int] = []  # messages that are still in the store
    self._step = -1  # the message that began the last step
    self._listeners: list[threading.Thread] = []
    self._channels: dict[int, Channel] = {}

  @property
  def leader(self) -> bool:
    return self.index == 0

  def tell(self, message: bytes, *, step: bool = False) -> None:
    """The leader's next message, for every other process to `hear`.

    Args:
      step: it begins a step of all processes, and the one before it has ended here: what was told
        until that one began has been read by all, and is forgotten.
    """
    if self.count == 1:
      return
    number, self._told = self._told, self._told + 1
    self._client.key_value_set_bytes(_key(number), message)
    self._stored.append(number)
    if step:
      for old in [n for n in self._stored if n <= self._step]:
        self._client.key_value_delete(_key(old))
        self._stored.remove(old)
      self._step = number

  def hear(self, seconds: float) -> bytes:
    """The leader's next message.

    Raises:
      RunFailed: none came in time.
    """
    key = _key(self._told)
    try:
      message = self._client.blocking_key_value_get_bytes(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as e:
      raise RunFailed(
        f"process {self.index} of {self.count}: process 0 said nothing for {seconds:.0f} s; see "
        f"its log ({str(e).splitlines()[0]})"
      ) from e
    self._told += 1
    return message

  def agree(self, value: Any, seconds: float = _JOIN) -> Any:
    """The leader's value, which JSON can hold, on every process; the others' is not looked at."""
    if self.count == 1:
      return value
    if self.leader:
      self.tell(json.dumps(value).encode())
      return json.loads(json.dumps(value))
    return json.loads(self.hear(seconds))

  def channel(self, other: int) -> Channel:
    """Between this process and another, always the same one."""
    if other not in self._channels:
      self._channels[other] = Channel(self._client, self.index, other)
    return self._channels[other]

  def meet(self, name: str, seconds: float = _JOIN) -> None:
    """Waits until every process is here.

    Raises:
      RunFailed: one did not come in time; the runtime says which.
    """
    if self.count > 1:
      try:
        self._client.wait_at_barrier(f"{name}-{self._told}", int(seconds * 1000))
      except jax.errors.JaxRuntimeError as e:
        raise RunFailed(f"not every process came to {name!r} within {seconds:.0f} s: {e}") from e

  # --- the end -----------------------------------------------------------------------------------

  def watch(self) -> None:
    """Ends this process as soon as another has failed."""
    self._listen(_FAILED, self._end)

  def on_end(self, ask_to_end: Callable[[], None]) -> None:
    """Calls back, from another thread, when a process was asked to end."""
    self._listen(_ASKED, lambda _: ask_to_end())

  def _listen(self, key: str, heard: Callable[[str], None]) -> None:
    if self.count > 1:
      args = (self._client, key, heard)
      self._listeners.append(threading.Thread(target=_listen, args=args, name=key, daemon=True))
      self._listeners[-1].start()

  def ask_all_to_end(self) -> None:
    """This process was asked to end: so are all."""
    if self.count > 1:
      self._client.key_value_set(_ASKED, "yes", allow_overwrite=True)

  def close(self) -> None:
    """The run is over for all of them; ends what `watch` and `on_end` began."""
    self.meet("the end")
    if self.leader and self._listeners:
      for key in (_FAILED, _ASKED):
        self._client.key_value_set(key, _OVER, allow_overwrite=True)
    for thread in self._listeners:
      thread.join(_LAST_WORDS)

  def fail(self, error: BaseException, code: int) -> None:
    """Tells the others why this process ends, and ends it; returns where it is alone."""
    if self.count == 1:
      return
    words = f"{code} process {self.index} of {self.count}: {type(error).__name__}: {error}"
    try:
      self._client.key_value_set(_FAILED, words)
      self._client.wait_at_barrier(_FAILED, _LAST_WORDS * 1000)
    except jax.errors.JaxRuntimeError as e:  # another was first, or some are dead already
      print(f"the others may not have heard of it: {str(e).splitlines()[0]}", file=sys.stderr)
    _leave(code)

  def _end(self, words: str) -> None:
    code, _, what = words.partition(" ")
    if what.startswith(f"process {self.index} of "):
      return
    print(f"process {self.index} of {self.count} ends, because of {what}", file=sys.stderr)
    try:
      self._client.wait_at_barrier(_FAILED, _LAST_WORDS * 1000)
    except jax.errors.JaxRuntimeError:
      pass  # the others will end without
    _leave(int(code))


class Channel:
  """Messages to and from one other process, in order. One thread may send and one receive.

  Attributes:
    other: the process's index.
  """

  def __init__(self, client: Any, here: int, other: int):
    self._client, self.other = client, other
    self._out = (f"channel/{here}/{other}/{n}" for n in itertools.count())
    self._in = (f"channel/{other}/{here}/{n}" for n in itertools.count())

  def send(self, message: bytes) -> None:
    self._client.key_value_set_bytes(next(self._out), message)

  def receive(self) -> bytes:
    """Waits for the next message as long as the run lasts."""
    key = next(self._in)
    message = self._client.blocking_key_value_get_bytes(key, _FOREVER)
    self._client.key_value_delete(key)
    return message


ALONE = World()


def _key(number: int) -> str:
  return f"told/{number}"


def _listen(client: Any, key: str, heard: Callable[[str], None]) -> None:
  try:
    words = client.blocking_key_value_get(key, _FOREVER)
  except jax.errors.JaxRuntimeError:
    return  # the runtime has ended, and this process with it
  if words != _OVER:
    heard(words)


def _leave(code: int) -> None:
  """Ends at once: at a normal exit JAX waits for processes that may hang in a device program."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


# --- joining -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the processes meet; None: the cluster says (TPU pods, GKE, Slurm, Open MPI)."""

  coordinator: str | None = None
  processes: int | None = None
  index: int | None = None


def read_place(flag: str, environment: Mapping[str, str]) -> Place | None:
  """What --distributed asks for; None: this process is alone.

  Args:
    flag: "" (the variables TRINITY_JAX_COORDINATOR, ..._PROCESSES and ..._PROCESS_ID decide),
      "off", "auto" or "ADDRESS:PORT,PROCESSES,INDEX".

  Raises:
    UserError: anything else, or only some of the variables.
  """
  if flag == "off":
    return None
  if flag == "auto":
    return Place()
  given, text = [environment.get(name, "") for name in VARIABLES], "--distributed=" + flag
  if flag:
    given = flag.split(",")
  elif not any(given):
    return None
  else:
    text = ", ".join(f"{name}={value!r}" for name, value in zip(VARIABLES, given))
  expected = "expected ADDRESS:PORT, a number of processes and an index below it"
  if len(given) != 3 or not given[0].rpartition(":")[2].isdigit() or ":" not in given[0]:
    raise UserError(f"{text}: {expected} (or auto, or off)")
  if not (given[1].isdigit() and given[2].isdigit() and int(given[2]) < int(given[1])):
    raise UserError(f"{text}: {expected}")
  return Place(given[0], int(given[1]), int(given[2]))


def join(flag: str = "") -> World:
  """Joins the processes of the run; before anything else uses JAX. See `read_place`.

  Raises:
    UserError: a place that cannot be read.
    RunFailed: the others did not come.
  """
  place = read_place(flag, os.environ)
  if place is None:
    return ALONE
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.index,
      initialization_timeout=_JOIN,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  except (RuntimeError, ValueError) as e:
    raise RunFailed(f"the processes of this run did not come together: {e}") from e
  from jax._src import distributed  # the key-value store has no public name

  state = distributed.global_state
  world = World(state.process_id, state.num_processes, state.client)
  world.watch()
  return world
