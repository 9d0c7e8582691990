"""Where metrics go: metrics.jsonl always, TensorBoard, W&B and MLflow when the config says so.

A writer is anything with `write(step, metrics)` and `close()`. `step` is the run's own counter: it
goes on over stages and resumes, because `JsonlWriter.truncate_after` cuts by it. What cannot be
set up raises at construction; what fails later is counted and reported by `Writers` and does not
stop a run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trinity_jax.errors import UserError
from trinity_jax.monitor import files, redact

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
_RESERVED = ("step", "time", files.NONFINITE)


class Writer(Protocol):
  """Takes one row of metrics at a time; called from one thread at a time."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


def _check_names(metrics: Mapping[str, Any]) -> dict[str, int | float]:
  """Returns the row with Python numbers; raises ValueError for a reserved name."""
  for name in _RESERVED:
    if name in metrics:
      raise ValueError(f"metric name {name!r} is reserved")
  return {name: files.as_number(name, value) for name, value in metrics.items()}


class JsonlWriter:
  """One strict JSON object per row: `{"step": 3, "time": 1700000000.0, "loss": 0.5, ...}`.

  `time` is Unix seconds. Non-finite numbers are null, see `files`. A row is one unbuffered write,
  so it survives `kill -9`; with `fsync` it survives a power cut too. A torn last line, left by a
  crash in the middle of a write, is removed when the file is opened.

  Raises:
    UserError: the file cannot be written, or a line before the last one is not a row.
  """

  def __init__(self, path: str | Path, *, fsync: bool = False,
               clock: Callable[[], float] = time.time):
    self.path = Path(path)
    self._fsync, self._clock, self._lock = fsync, clock, threading.Lock()
    self._file = -1
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      if self.path.exists():
        self._rewrite(lambda row: True)
      self._open()
    except OSError as error:
      raise UserError(f"cannot write metrics to {self.path}: {error.strerror}; "
                      "choose a writable --workdir") from error

  def _open(self) -> None:
    self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    row = {"step": int(step), "time": round(self._clock(), 3), **_check_names(metrics)}
    data = (files.encode_row(row) + "\n").encode()
    with self._lock:
      if self._file < 0:
        raise ValueError(f"{self.path} is closed")
      size = os.fstat(self._file).st_size
      try:
        left = memoryview(data)
        while left:
          left = left[os.write(self._file, left):]
        if self._fsync:
          os.fsync(self._file)
      except OSError:
        os.ftruncate(self._file, size)  # disk full: no half row for the next one to run into
        raise

  def flush(self) -> None:
    """Returns when everything written is on the disk."""
    with self._lock:
      if self._file >= 0:
        os.fsync(self._file)

  def truncate_after(self, step: int) -> int:
    """Drops every row whose step is greater than `step`; returns how many.

    For an exact resume from the checkpoint of `step`: what was logged after it will be logged
    again. The file is replaced atomically.
    """
    with self._lock:
      dropped = self._rewrite(lambda row: row["step"] <= step)
      if self._file >= 0:  # the old descriptor points at the replaced file
        os.close(self._file)
        self._open()
      return dropped

  def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> int:
    lines, torn = _lines(self.path)
    kept = [line for line, row in lines if keep(row)]
    if torn or len(kept) < len(lines):
      files.write_atomic(self.path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)

  def close(self) -> None:
    with self._lock:
      if self._file >= 0:
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], bool]:
  """Returns (line, row) pairs, and whether the file must be repaired at its end."""
  raw = path.read_bytes()
  texts = raw.split(b"\n")
  out = []
  full = [i for i, line in enumerate(texts) if line.strip()]
  for i in full:
    try:
      row = files.decode_row(texts[i])
      if not isinstance(row.get("step"), int):
        raise ValueError("no integer 'step'")
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
      if i == full[-1]:
        return out, True
      raise UserError(f"{path}:{i + 1}: not a metrics row ({error}); repair or remove the file"
                      ) from error
    out.append((texts[i], row))
  return out, bool(raw) and not raw.endswith(b"\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
  """Returns the rows of a metrics.jsonl with NaN and infinities restored.

  A torn last line is left out: the run may be writing it now.

  Raises:
    UserError: no such file, or a line before the last one is not a row.
  """
  try:
    return [row for _, row in _lines(Path(path))[0]]
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_stage(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a stage's metrics.jsonl and those of its explorers' processes, by step.

  Raises:
    UserError: as `read_jsonl`.
  """
  rows = read_jsonl(path)
  for other in sorted(Path(path).parent.glob(f"explorers/*/{FILE}")):
    rows += read_jsonl(other)
  return sorted(rows, key=lambda row: row["step"])


class TensorBoardWriter:
  """Event files for TensorBoard, through tensorboardX.

  Args:
    logdir: folder of the event files.
    resume_step: hide what earlier event files say after this step (TensorBoard's purge_step).
  """

  def __init__(self, logdir: str | Path, *, resume_step: int | None = None):
    try:
      from tensorboardX import SummaryWriter
    except ImportError as error:
      raise UserError("monitor.tensorboard is True but tensorboardX is not installed; "
                      "pip install tensorboardX or set monitor.tensorboard=False") from error
    purge = None if resume_step is None else resume_step + 1
    self._writer = SummaryWriter(logdir=str(logdir), purge_step=purge, flush_secs=10)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in _check_names(metrics).items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """One W&B run; its id is kept in the work directory, so that a resumed run continues it.

  Only metrics and the redacted config are sent: no console output, code, git state or command line.
  """

  def __init__(self, project: str, config: Any, workdir: str | Path, *, name: str | None = None):
    try:
      import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise UserError(f"monitor.wandb is {project!r} but wandb is not installed; "
                      "pip install 'trinity_jax[wandb]' or set monitor.wandb=''") from error
    workdir = Path(workdir)
    id_file = workdir / "wandb_run_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else None
    # x_disable_meta: the metadata holds the command line, which may hold a secret override.
    settings = wandb.Settings(console="off", disable_code=True, disable_git=True, save_code=False,
                              x_disable_meta=True)
    self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=str(workdir),
                           config=redact.redact(config), settings=settings)
    files.write_atomic(id_file, f"{self._run.id}\n".encode())
    # Our own step axis: W&B's must never go back, and rows of a resumed run do.
    self._run.define_metric("trainer_step")
    self._run.define_metric("*", step_metric="trainer_step")

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log({**_check_names(metrics), "trainer_step": step})

  def close(self) -> None:
    self._run.finish()


class MlflowWriter:
  """One MLflow run; its id is kept in the work directory, so that a resumed run continues it."""

  _PARAM_LIMIT, _PARAM_BATCH, _METRIC_BATCH = 500, 100, 1000  # limits of MLflow's REST interface

  def __init__(self, uri: str, config: Any, workdir: str | Path, *, experiment: str = "trinity_jax",
               name: str | None = None):
    try:
      import mlflow  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise UserError(f"monitor.mlflow is {redact.redact_text(uri)!r} but mlflow is not installed; "
                      "pip install 'trinity_jax[mlflow]' or set monitor.mlflow=''") from error
    self._entities = mlflow.entities
    self._client = mlflow.MlflowClient(tracking_uri=uri)
    id_file = Path(workdir) / "mlflow_run_id.txt"
    if id_file.exists():
      self._run_id = id_file.read_text().strip()
      self._client.update_run(self._run_id, status="RUNNING")
      return
    found = self._client.get_experiment_by_name(experiment)
    where = found.experiment_id if found else self._client.create_experiment(experiment)
    self._run_id = self._client.create_run(where, run_name=name).info.run_id
    params = [mlflow.entities.Param(_mlflow_name(key), str(value)[:self._PARAM_LIMIT])
              for key, value in redact.flatten(redact.redact(config)).items()]
    for i in range(0, len(params), self._PARAM_BATCH):
      self._client.log_batch(self._run_id, params=params[i:i + self._PARAM_BATCH])
    files.write_atomic(id_file, f"{self._run_id}\n".encode())

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    rows = [self._entities.Metric(_mlflow_name(name), float(value), now, step)
            for name, value in _check_names(metrics).items()]
    for i in range(0, len(rows), self._METRIC_BATCH):
      self._client.log_batch(self._run_id, metrics=rows[i:i + self._METRIC_BATCH])

  def close(self) -> None:
    self._client.set_terminated(self._run_id)


def _mlflow_name(name: str) -> str:
  """MLflow allows letters, digits and _-. / and blanks: pass@4 becomes pass_at_4."""
  name = name.replace("@", "_at_")
  return "".join(c if c.isascii() and (c.isalnum() or c in "_-. /") else "_" for c in name)


class Writers:
  """Writes to several writers; a failing one is counted, reported and kept.

  Attributes:
    failures: writer's class name -> number of failed calls. Once one has failed, rows carry
      `monitor/write_failures`, the sum.
  """

  def __init__(self, writers: Sequence[Writer], *, report: Callable[[str], None] = log.warning):
    self._writers, self._report, self._lock = list(writers), report, threading.Lock()
    self.failures: dict[str, int] = {}

  def __getitem__(self, kind: type) -> Any:
    """Returns the writer of a class; KeyError when there is none."""
    for writer in self._writers:
      if isinstance(writer, kind):
        return writer
    raise KeyError(kind.__name__)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    with self._lock:
      if self.failures:
        metrics = {**metrics, "monitor/write_failures": sum(self.failures.values())}
      for writer in self._writers:
        self._guard(writer, lambda w=writer: w.write(step, metrics), f"row of step {step}")

  def close(self) -> None:
    with self._lock:
      for writer in self._writers:
        self._guard(writer, writer.close, "close")
      self._writers = []

  def _guard(self, writer: Writer, call: Callable[[], None], what: str) -> None:
    try:
      call()
    except Exception as error:  # a monitor must not end a run; it says so instead
      name = type(writer).__name__
      count = self.failures[name] = self.failures.get(name, 0) + 1
      if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: a dead server must not flood the log
        reason = redact.redact_text(f"{type(error).__name__}: {error}")
        self._report(f"{name} failed on {what}: {reason} (failures so far: {count})")


def make_writers(config: Any, workdir: str | Path, *, resume_step: int | None = None,
                 report: Callable[[str], None] = log.warning) -> Writers:
  """Returns the writers that `config.monitor` asks for; metrics.jsonl always.

  Args:
    config: the whole config; `config.monitor` has `tensorboard: bool`, `wandb: str` (project or
      ""), `mlflow: str` (tracking URI or ""); `config.name` names the runs there.
    workdir: the run's folder.
    resume_step: step of the checkpoint that the run continues from: rows after it are dropped. -1
      starts anew: all rows of an earlier attempt go. None keeps every row.
    report: where later failures are reported.

  Raises:
    UserError: a writer cannot be set up.
  """
  monitor, workdir, name = config.monitor, Path(workdir), getattr(config, "name", None)
  writers: list[Writer] = [JsonlWriter(workdir / FILE)]
  try:
    if resume_step is not None:
      writers[0].truncate_after(resume_step)  # type: ignore[attr-defined]
    if monitor.tensorboard:
      writers.append(TensorBoardWriter(workdir / "tensorboard", resume_step=resume_step))
    if monitor.wandb:
      writers.append(_set_up("monitor.wandb", monitor.wandb,
                             lambda: WandbWriter(monitor.wandb, config, workdir, name=name)))
    if monitor.mlflow:
      writers.append(_set_up("monitor.mlflow", monitor.mlflow,
                             lambda: MlflowWriter(monitor.mlflow, config, workdir, name=name)))
  except BaseException:  # closes what is open, then goes on up
    for writer in writers:
      writer.close()
    raise
  return Writers(writers, report=report)


def _set_up(key: str, value: str, make: Callable[[], Writer]) -> Writer:
  """Turns whatever a service's library raises into one line that names the config key."""
  try:
    return make()
  except UserError:
    raise
  except Exception as error:  # each service raises its own: named by our config key
    reason = redact.redact_text(f"{type(error).__name__}: {error}".splitlines()[0])
    raise UserError(f"{key} is {redact.redact_text(value)!r} but it cannot be set up: {reason}; "
                    f"fix it or set {key}=''") from error
