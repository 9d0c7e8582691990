"""metrics.jsonl through crashes and resumes, the other writers, redaction."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from trinity_jax.errors import UserError
from trinity_jax.monitor import files, redact, writers
from trinity_jax.monitor.writers import JsonlWriter, Writers, make_writers, read_jsonl


@dataclasses.dataclass
class Monitor:
  tensorboard: bool = False
  wandb: str = ""
  mlflow: str = ""


@dataclasses.dataclass
class Config:
  monitor: Monitor = dataclasses.field(default_factory=Monitor)
  name: str = "test"
  hub_token: str = "hf_abcdefghijklmnop"
  max_tokens: int = 64


def filled(path, steps=(1, 2, 3)):
  writer = JsonlWriter(path, clock=lambda: 5.0)
  for step in steps:
    writer.write(step, {"loss": step / 10})
  return writer


# --- metrics.jsonl -------------------------------------------------------------------------------


def test_rows_by_hand(tmp_path):
  path = tmp_path / "sub" / "metrics.jsonl"
  writer = JsonlWriter(path, clock=lambda: 1700000000.1234)
  writer.write(3, {"loss": np.float32(0.5), "n": np.int64(2), "ok": True})
  writer.write(np.int64(4), {"loss": float("nan"), "hi": float("inf"), "lo": -np.inf})
  first, second = path.read_text().splitlines()  # before close: a row is there at once
  assert first == '{"step": 3, "time": 1700000000.123, "loss": 0.5, "n": 2, "ok": 1}'
  assert json.loads(second, parse_constant=lambda c: pytest.fail(f"not strict JSON: {c}")) == {
    "step": 4, "time": 1700000000.123, "loss": None, "hi": None, "lo": None,
    "nonfinite": {"loss": "nan", "hi": "inf", "lo": "-inf"}}
  row = read_jsonl(path)[1]
  assert math.isnan(row["loss"]) and row["hi"] == math.inf and row["lo"] == -math.inf
  assert "nonfinite" not in row
  writer.close()


def test_jax_scalar(tmp_path):
  import jax.numpy as jnp

  JsonlWriter(tmp_path / "m").write(1, {"loss": jnp.float32(0.25)})
  assert read_jsonl(tmp_path / "m")[0]["loss"] == 0.25


@pytest.mark.parametrize("metrics, error, text", [
  ({"step": 1}, ValueError, "'step' is reserved"),
  ({"time": 1}, ValueError, "'time' is reserved"),
  ({"nonfinite": 1}, ValueError, "'nonfinite' is reserved"),
  ({"loss": "low"}, TypeError, "metric 'loss' is str, expected one real number"),
  ({"loss": None}, TypeError, "metric 'loss' is NoneType"),
  ({"loss": np.zeros(3)}, TypeError, "metric 'loss' is ndarray"),
  ({"loss": 1j}, TypeError, "metric 'loss' is complex"),
])
def test_bad_rows_are_refused_whole(tmp_path, metrics, error, text):
  writer = filled(tmp_path / "m", (1,))
  with pytest.raises(error, match=text):
    writer.write(2, metrics)
  assert [r["step"] for r in read_jsonl(tmp_path / "m")] == [1]


def test_truncate_after(tmp_path):
  path = tmp_path / "m"
  writer = filled(path, (1, 2, 2, 5, 3))  # out of order: an asynchronous explorer
  os.chmod(path, 0o640)
  assert writer.truncate_after(2) == 2
  assert [r["step"] for r in read_jsonl(path)] == [1, 2, 2]
  writer.write(3, {"loss": 9.0})  # goes to the new file, not the replaced one
  writer.close()
  assert [r["step"] for r in read_jsonl(path)] == [1, 2, 2, 3]
  assert os.stat(path).st_mode & 0o777 == 0o640
  assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
  assert JsonlWriter(path).truncate_after(-1) == 4 and path.read_bytes() == b""


def test_truncate_keeps_bytes(tmp_path):
  path = tmp_path / "m"
  path.write_bytes(b'{"step":1,"x":1.0000000000000000001}\n\n{"step": 2}\n')
  JsonlWriter(path).truncate_after(1)
  assert path.read_bytes() == b'{"step":1,"x":1.0000000000000000001}\n'


@pytest.mark.parametrize("cut", range(1, 30))
def test_torn_last_line(tmp_path, cut):
  path = tmp_path / "m"
  filled(path, (1, 2)).close()
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  kept = [1, 2] if cut == 1 else [1]  # only the line break is missing: the row is whole
  assert [r["step"] for r in read_jsonl(path)] == kept
  filled(path, (7,)).close()
  assert [r["step"] for r in read_jsonl(path)] == [*kept, 7]
  assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\0\0\n", b'{"a": 1}\n', b"[1]\n", b"\xff\xfe\n",
                                  b'{"step": "1"}\n', b"null"])
def test_damaged_last_line(tmp_path, tail):
  path = tmp_path / "m"
  filled(path, (1,)).close()
  path.write_bytes(path.read_bytes() + tail)
  JsonlWriter(path).close()
  assert [r["step"] for r in read_jsonl(path)] == [1]


def test_damaged_middle_is_an_error(tmp_path):
  path = tmp_path / "m"
  path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
  with pytest.raises(UserError, match=r"m:2: not a metrics row .*repair or remove"):
    JsonlWriter(path)
  with pytest.raises(UserError, match=r"m:2: not a metrics row"):
    read_jsonl(path)


def test_killed_process_loses_no_row(tmp_path):
  code = ("import os, sys, signal\n"
          "from trinity_jax.monitor.writers import JsonlWriter\n"
          "w = JsonlWriter(sys.argv[1])\n"
          "for i in range(50): w.write(i, {'loss': i})\n"
          "os.kill(os.getpid(), signal.SIGKILL)\n")
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], cwd=os.getcwd(),
                        env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
  assert done.returncode == -9
  assert [r["step"] for r in read_jsonl(tmp_path / "m")] == list(range(50))


def test_threads_do_not_tear_rows(tmp_path):
  writer = JsonlWriter(tmp_path / "m")
  threads = [threading.Thread(target=lambda: [writer.write(s, {"x": 1.5}) for s in range(100)])
             for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(r["step"] for r in read_jsonl(tmp_path / "m")) == sorted(list(range(100)) * 4)


def test_disk_full_leaves_no_half_row(tmp_path, monkeypatch):
  path = tmp_path / "m"
  writer = filled(path, (1,))
  real, calls = os.write, []

  def full(handle, data):
    calls.append(len(data))
    if len(calls) == 1:
      return real(handle, data[:4])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "write", full)
  with pytest.raises(OSError, match="No space left"):
    writer.write(2, {"loss": 1.0})
  monkeypatch.undo()
  writer.write(3, {"loss": 1.0})
  assert [r["step"] for r in read_jsonl(path)] == [1, 3]


def test_flush_and_close(tmp_path):
  writer = JsonlWriter(tmp_path / "m", fsync=True)
  writer.write(1, {})
  writer.flush()
  writer.close()
  writer.close()
  writer.flush()
  with pytest.raises(ValueError, match="is closed"):
    writer.write(2, {})


def test_unwritable(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write metrics to .*choose a writable --workdir"):
    JsonlWriter(tmp_path / "file" / "metrics.jsonl")
  with pytest.raises(UserError, match="cannot read"):
    read_jsonl(tmp_path / "absent")


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "x"
  path.write_text("old")
  monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("boom")))
  with pytest.raises(OSError, match="boom"):
    files.write_atomic(path, b"new")
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- several writers -----------------------------------------------------------------------------


class Flaky:
  def __init__(self, bad=()):
    self.rows, self.bad, self.closed = [], set(bad), 0

  def write(self, step, metrics):
    if step in self.bad:
      raise ConnectionError("https://me:hunter2@host/api refused")
    self.rows.append((step, dict(metrics)))

  def close(self):
    self.closed += 1


class Steady(Flaky):
  pass


def test_a_failing_writer_is_counted_and_reported():
  said: list[str] = []
  flaky, steady = Flaky(range(2, 8)), Steady()
  both = Writers([flaky, steady], report=said.append)
  for step in range(1, 10):
    both.write(step, {"loss": 1.0})
  assert [s for s, _ in flaky.rows] == [1, 8, 9]
  assert [s for s, _ in steady.rows] == list(range(1, 10))
  assert both.failures == {"Flaky": 6}
  assert steady.rows[1][1] == {"loss": 1.0}
  assert steady.rows[2][1] == {"loss": 1.0, "monitor/write_failures": 1}
  assert steady.rows[-1][1]["monitor/write_failures"] == 6
  assert len(said) == 3 and "failures so far: 4" in said[-1]  # at 1, 2, 4
  assert said[0].startswith("Flaky failed on row of step 2: ConnectionError")
  assert "hunter2" not in "".join(said)
  both.close()
  both.close()
  assert flaky.closed == steady.closed == 1


def test_make_writers_jsonl_only(tmp_path):
  made = make_writers(Config(), tmp_path)
  made.write(1, {"loss": 1.0})
  made.write(2, {"loss": 1.0})
  made.close()
  made = make_writers(Config(), tmp_path, resume_step=1)
  made[JsonlWriter].write(2, {"loss": 2.0})
  made.close()
  assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [(1, 1.0),
                                                                                     (2, 2.0)]
  with pytest.raises(KeyError, match="WandbWriter"):
    made[writers.WandbWriter]


def test_make_writers_takes_the_real_config(tmp_path):
  from trinity_jax.config import Config as RealConfig

  made = make_writers(RealConfig(), tmp_path)
  made.write(1, {"loss": 0.5})
  made.close()
  assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "tensorboard").is_dir()


def test_tensorboard_events(tmp_path):
  made = make_writers(Config(Monitor(tensorboard=True)), tmp_path)
  made.write(7, {"loss": 0.5, "reward/mean": float("nan")})
  made.close()
  from tensorboardX.proto import event_pb2

  (events,) = (tmp_path / "tensorboard").iterdir()
  raw, found, at = events.read_bytes(), {}, 0
  while at < len(raw):  # TFRecord: length u64, crc u32, data, crc u32
    size = int.from_bytes(raw[at:at + 8], "little")
    event = event_pb2.Event.FromString(raw[at + 12:at + 12 + size])
    found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
    at += 12 + size + 4
  assert found["loss", 7] == 0.5 and math.isnan(found["reward/mean", 7])


@pytest.mark.parametrize("package, monitor, text", [
  ("wandb", Monitor(wandb="p"), r"monitor.wandb is 'p' .*pip install 'trinity_jax\[wandb\]'"),
  ("mlflow", Monitor(mlflow="http://me:hunter2@h"),
   r"monitor.mlflow is 'http://<redacted>@h' .*pip install 'trinity_jax\[mlflow\]'"),
  ("tensorboardX", Monitor(tensorboard=True), "pip install tensorboardX"),
])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package, monitor, text):
  monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
  with pytest.raises(UserError, match=text):
    make_writers(Config(monitor), tmp_path)


def fake_wandb(seen, error=None):
  class Run:
    id = "run7"

    def define_metric(self, name, step_metric=None):
      seen.append(("define", name, step_metric))

    def log(self, row):
      seen.append(("log", row))

    def finish(self):
      seen.append(("finish",))

  def init(**kwargs):
    seen.append(("init", kwargs))
    if error:
      raise error
    return Run()

  return types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs)


def test_wandb(tmp_path, monkeypatch):
  seen: list = []
  monkeypatch.setitem(sys.modules, "wandb", fake_wandb(seen))
  for start in (1, 2):
    made = make_writers(Config(Monitor(wandb="proj")), tmp_path)
    made.write(start, {"loss": 0.5})
    made.close()
  first, second = (e[1] for e in seen if e[0] == "init")
  assert first["project"] == "proj" and first["name"] == "test" and first["id"] is None
  assert second["id"] == "run7" and second["resume"] == "allow"  # the same run goes on
  assert first["config"]["hub_token"] == "<redacted>" and first["config"]["max_tokens"] == 64
  assert first["settings"]["console"] == "off" and first["settings"]["x_disable_meta"] is True
  assert ("define", "*", "trainer_step") in seen
  assert ("log", {"loss": 0.5, "trainer_step": 2}) in seen and seen[-1] == ("finish",)


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch):
  error = RuntimeError("no network for hf_abcdefghijklmnop\nsecond line")
  monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], error))
  with pytest.raises(UserError, match="monitor.wandb is 'proj' but it cannot be set up: "
                                      "RuntimeError: no network for <redacted>; fix it") as caught:
    make_writers(Config(Monitor(wandb="proj")), tmp_path)
  assert "\n" not in str(caught.value)


class FakeMlflow:
  """The few calls of MlflowClient that we use."""

  def __init__(self, seen):
    self.seen = seen
    self.entities = types.SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)

  def MlflowClient(self, tracking_uri):
    self.seen.append(("uri", tracking_uri))
    return self

  def get_experiment_by_name(self, name):
    return None

  def create_experiment(self, name):
    return "e1"

  def create_run(self, experiment, run_name):
    self.seen.append(("run", experiment, run_name))
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

  def update_run(self, run_id, status):
    self.seen.append(("again", run_id, status))

  def log_batch(self, run_id, metrics=(), params=()):
    self.seen.append(("batch", run_id, list(metrics), list(params)))

  def set_terminated(self, run_id):
    self.seen.append(("end", run_id))


def test_mlflow(tmp_path, monkeypatch):
  seen: list = []
  monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow(seen))
  for start in (1, 2):
    made = make_writers(Config(Monitor(mlflow="file:x")), tmp_path)
    made.write(start, {f"eval/t/pass@{k}": 0.5 for k in range(1500)})
    made.close()
  kinds = [e[0] for e in seen]
  assert kinds == ["uri", "run", "batch", "batch", "batch", "end",
                   "uri", "again", "batch", "batch", "end"]
  params = dict(seen[2][3])
  assert params["hub_token"] == "<redacted>" and params["monitor.mlflow"] == "file:x"
  assert [len(e[2]) for e in seen if e[0] == "batch"] == [0, 1000, 500, 1000, 500]
  name, value, _, step = seen[3][2][0]
  assert (name, value, step) == ("eval/t/pass_at_0", 0.5, 1)


# --- redaction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [
  "token", "hf_token", "HF_TOKEN", "apiToken", "api_key", "apiKey", "API-KEY", "openai.api_key",
  "password", "db_passwd", "clientSecret", "AWS_SECRET_ACCESS_KEY", "private_key", "credentials",
  "Authorization", "auth_tokens", "access_token_2", "cookie", "ssh_key"])
def test_secret_keys(key):
  assert redact.is_secret_key(key)


@pytest.mark.parametrize("key", [
  "max_tokens", "tokenizer", "tokenizer_path", "num_tokens", "tokens_per_step", "stop_token_ids2x",
  "key", "reward_key", "keyboard", "author", "authors", "train_tokens", "metric_key"])
def test_harmless_keys(key):
  if key == "stop_token_ids2x":  # "token" as a word of its own: hidden, on the safe side
    assert redact.is_secret_key(key)
  else:
    assert not redact.is_secret_key(key)


def test_redact_nested():
  from ml_collections import ConfigDict

  config = ConfigDict({
    "a": {"password": "p", "list": [{"api_key": 12345}, "plain"], "token": "", "flag_token": False},
    "url": "postgresql://me:hunter2@db/x?sslmode=on&api_token=abc#f",
    "text": "use sk-abcdefghijkl0123 and AKIAABCDEFGHIJKLMNOP",
    "n": 3, "x": None, "t": (1, 2)})
  assert redact.redact(config) == {
    "a": {"password": "<redacted>", "list": [{"api_key": "<redacted>"}, "plain"], "token": "",
          "flag_token": False},
    "url": "postgresql://<redacted>@db/x?sslmode=on&api_token=<redacted>#f",
    "text": "use <redacted> and <redacted>", "n": 3, "x": None, "t": [1, 2]}


def test_redact_keeps_harmless_text():
  for text in ("Qwen/Qwen2.5-0.5B", "runs/a@b", "lr 1e-6", "mail me@host", "disk-usage"):
    assert redact.redact_text(text) == text


def test_flatten():
  assert redact.flatten({"a": {"b": 1, "c": [2]}, "d": {}}) == {"a.b": 1, "a.c": [2]}
