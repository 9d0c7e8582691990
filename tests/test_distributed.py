"""Several processes train one model: as one process does, and they end together."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import key_value_store
import launching
import numpy as np
import pytest
from safetensors.numpy import load_file

from trinity_jax import distributed, following, placement, snapshots
from trinity_jax.distributed import Place, World, read_place
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.models import hf
from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).parents[1]
NAMES = distributed.VARIABLES


# --- where processes meet -------------------------------------------------------------------------


@pytest.mark.parametrize(
  "flag, environment, place",
  [
    ("", {}, None),
    ("off", dict(zip(NAMES, ("host:1", "2", "0"))), None),
    ("auto", {}, Place()),
    ("host:1234,4,3", {}, Place("host:1234", 4, 3)),
    ("[::1]:1234,1,0", {}, Place("[::1]:1234", 1, 0)),
    ("", dict(zip(NAMES, ("host:1234", "2", "1"))), Place("host:1234", 2, 1)),
  ],
)
def test_places(flag, environment, place):
  assert read_place(flag, environment) == place


@pytest.mark.parametrize(
  "flag, environment",
  [
    ("host,2,0", {}),
    ("host:1234,2", {}),
    ("host:1234,2,2", {}),
    ("host:1234,two,0", {}),
    ("yes", {}),
    ("", {NAMES[0]: "host:1234", NAMES[1]: "2"}),
  ],
)
def test_places_that_cannot_be(flag, environment):
  with pytest.raises(UserError, match="expected ADDRESS:PORT, a number of processes and an index"):
    read_place(flag, environment)


# --- what they tell each other --------------------------------------------------------------------


def test_the_leader_decides():
  store = key_value_store.Store()
  leader, other = World(0, 2, store), World(1, 2, store)
  for n in range(5):
    assert leader.agree({"n": n}) == {"n": n}  # nobody has heard it yet
  for n in range(5):
    assert other.agree("whatever", 5) == {"n": n}
  with pytest.raises(RunFailed, match="process 1 of 2: process 0 said nothing for 0 s"):
    other.hear(0.01)


def test_messages_are_forgotten_when_all_have_read_them():
  store = key_value_store.Store()
  leader, other = World(0, 2, store), World(1, 2, store)
  for step in range(50):
    following.tell(leader, [])  # of the step before, all have begun it
    if step:
      assert other.agree(None, 5) == step - 1  # decided after it began, and heard as late as can be
    assert following.hear(other, 5) == []
    leader.agree(step)
    assert len(store.values) <= 4


def test_alone_there_is_nobody_to_tell():
  assert distributed.ALONE.agree((1, 2)) == (1, 2)
  following.tell(distributed.ALONE, [])
  distributed.ALONE.meet("anything")
  distributed.ALONE.fail(ValueError("no"), 1)
  distributed.ALONE.close()


def test_experiences_are_told_whole():
  def experience(i, n):
    tokens = np.arange(n, dtype=np.int32)
    return Experience(
      tokens, tokens > 1, np.full(n, -0.5, np.float32), np.full(n, 3, np.int32),
      ExperienceId(1, i, 0, 0), reward=0.25, stop_reason=StopReason.STOP,
      messages=[{"role": "user", "content": "é"}], extras={"x": np.ones((2, n))},
    )  # fmt: skip

  store = key_value_store.Store()
  leader, other = World(0, 2, store), World(1, 2, store)
  sent = [experience(i, n) for i, n in enumerate((3, 0, 70))]
  for told in (sent, []):
    following.tell(leader, told)
    heard = following.hear(other, 5)
    assert len(heard) == len(told)
    for found, e in zip(heard, told):
      assert (found.id, found.reward, found.messages) == (e.id, e.reward, e.messages)
      for name in ("tokens", "action_mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(e, name))
      np.testing.assert_array_equal(found.extras["x"], e.extras["x"])
  following.tell_end(leader)
  assert following.hear(other, 5) is None
  leader.tell(b"what?")
  with pytest.raises(UserError, match="do all run the same code"):
    following.hear(other, 5)


def test_placement_in_one_process():
  mesh = jax.make_mesh((8,), ("data",))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  tree = {"a": np.arange(16.0, dtype=np.float32)}
  placed = placement.place(tree, {"a": rows})
  assert placed["a"].sharding == rows
  np.testing.assert_array_equal(placement.fetch(placed)["a"], tree["a"])


@pytest.mark.parametrize("most", [10**9, 3 * 16 * 4, 1])
def test_a_large_array_moves_some_layers_at_once(most):
  """Seven layers of 16 numbers: all at once, three (the last three overlap), one."""
  P, devices = jax.sharding.PartitionSpec, jax.devices()
  x = np.arange(7 * 16.0, dtype=np.float32).reshape(7, 4, 4)
  split = jax.make_mesh((4,), ("fsdp",), devices=devices[:4])
  own = jax.make_mesh((2, 2), ("data", "tensor"), devices=devices[4:])
  here = jax.sharding.NamedSharding(own, P(None, None, "tensor"))
  sizes, leaf = [], jax.device_put(x, jax.sharding.NamedSharding(split, P(None, "fsdp")))

  def launch(program, *args):
    out = program(*args)
    assert out.is_fully_replicated
    sizes.append(out.shape[0])
    return out

  moved = placement._to_local(leaf, here, launch, most)
  assert moved.sharding == here
  np.testing.assert_array_equal(moved, x)
  assert sizes == {10**9: [7], 3 * 16 * 4: [3] * 3, 1: [1] * 7}[most]
  assert placement._to_local(leaf, None, launch, most) is None


@pytest.mark.parametrize("most", [10**9, 3 * 16 * 4, 1])
def test_a_large_array_is_fetched_some_layers_at_once(most, monkeypatch, tmp_path):
  """To publish or save a model, every device held each whole stack of layers."""
  split = jax.sharding.NamedSharding(
    jax.make_mesh((8,), ("fsdp",)), jax.sharding.PartitionSpec(None, "fsdp")
  )
  x = {"w": np.arange(7 * 16.0, dtype=np.float32).reshape(7, 8, 2), "b": np.float32(3.0)}
  tree, sizes = {**x, "w": jax.device_put(x["w"], split)}, []
  monkeypatch.setattr(placement, "_is_here", lambda x: not isinstance(x, jax.Array))
  monkeypatch.setattr(
    placement, "_gathered", functools.partial(placement._gathered, most=most)
  )

  def launch(program, *args):
    sizes.append(len(out := program(*args)))
    return out

  parts = list(placement.host_parts(tree["w"], launch))
  np.testing.assert_array_equal(np.concatenate(parts), x["w"])
  expected = {10**9: [7], 3 * 16 * 4: [3] * 3, 1: [1] * 7}[most]
  assert sizes == expected
  placement.take_part(tree, launch)
  assert sizes == 2 * expected
  np.testing.assert_array_equal(placement.fetch(tree, launch)["w"], x["w"])
  snapshots._write_tensors(tmp_path / "file", tree, launch)
  np.testing.assert_array_equal(load_file(tmp_path / "file")["w"], x["w"])
  assert sizes == 4 * expected


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
  folder = tmp_path_factory.mktemp("recipe")
  model = hf.write_tiny_checkpoint(
    folder / "model", hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32
  )
  return launching.write_recipe(folder / "recipe.py", model)


GRADED = "--config.taskset.reward=graded:by_length"


def start(
  recipe, workdir, count, *flags, host="127.0.0.1", within=lambda index: (), reward=(GRADED,)
):
  """Starts the processes of a run on four devices; their output goes to WORKDIR.INDEX.log.

  within(index): the command that a process is started by, where it lives elsewhere.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"{host}:{free.getsockname()[1]}"
  out = []
  for i in range(count):
    place = f"{address},{count},{i}" if count > 1 else "off"
    command = [
      *within(i), sys.executable, "launch/main.py", f"--config={recipe}", f"--workdir={workdir}",
      f"--distributed={place}", f"--config.mesh.cpu_devices={4 // count}",
      *reward, *flags,
    ]  # fmt: skip
    env = launching.environment(PYTHONPATH=str(ROOT / "tests/support"))
    with log(workdir, i).open("ab") as file:
      out.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
  return out


def log(workdir, index):
  return workdir.with_name(f"{workdir.name}.{index}.log")


def ends(processes, workdir, seconds=240):
  """Exit codes; fails with the logs when a process does not end."""
  end = time.monotonic() + seconds
  try:
    return [p.wait(max(0.1, end - time.monotonic())) for p in processes]
  except subprocess.TimeoutExpired:
    logs = [log(workdir, i).read_text()[-2000:] for i in range(len(processes))]
    raise AssertionError(f"not over after {seconds} s:\n" + "\n---\n".join(logs)) from None
  finally:
    for p in processes:
      p.kill()


def whole(recipe, workdir, count, *flags):
  codes = ends(start(recipe, workdir, count, *flags), workdir)
  assert codes == [0] * count, log(workdir, codes.index(next(filter(None, codes)))).read_text()
  rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  return rows, load_file(workdir / "hf/model.safetensors")


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
  return whole(recipe, tmp_path_factory.mktemp("one") / "run", 1, "--config.trainer.total_steps=4")


def same(a, b):
  """Equal rewards, hence tokens; numbers of training up to the order of sums over processes."""
  (rows, weights), (its_rows, its) = a, b
  assert [r["step"] for r in rows] == [r["step"] for r in its_rows]
  for row, other in zip(rows, its_rows):
    assert row["reward/mean"] == other["reward/mean"]
    for name in ("loss", "grad_norm", "entropy"):
      assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name
  assert any(abs(r["grad_norm"]) > 1e-3 for r in rows), "nothing was learned from"
  for name, value in weights.items():
    np.testing.assert_allclose(its[name], value, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "count, flags",
  [
    pytest.param(2, (), marks=pytest.mark.nightly),
    (2, ("--config.mesh.data=1", "--config.mesh.fsdp=4")),
    pytest.param(4, ("--config.mesh.data=2", "--config.mesh.fsdp=2"), marks=pytest.mark.nightly),
    pytest.param(
      2,
      ("--config.mesh.data=2", "--config.mesh.context=2", "--config.trainer.row_lengths=(14,)"),
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      2, ("--config.mesh.fsdp=2", "--config.trainer.offload=optimizer"), marks=pytest.mark.nightly
    ),
  ],
)
def test_several_processes_train_as_one_does(recipe, one, tmp_path, count, flags):
  flags = ("--config.trainer.total_steps=4", "--config.taskset.workflow=graded:told", *flags)
  same(one, whole(recipe, tmp_path / "run", count, *flags))
  said = log(tmp_path / "run", 0).read_text()
  asked = [said.count(f"asked a {name}\n") for name in ("Sampler", "RemoteSampler")]
  assert asked == [32 // count, 32 - 32 // count]  # 4 steps of 8 runs


@pytest.mark.nightly
def test_an_explorer_outside(recipe, one, tmp_path):
  """Two processes train, a third samples for them through the buffer and snapshots."""
  workdir, flags = tmp_path / "run", ("--config.trainer.total_steps=4",)
  trainers = start(recipe, workdir, 2, "--mode=train", "--config.mesh.fsdp=4", *flags)
  command = [
    sys.executable, "launch/main.py", f"--config={recipe}", f"--workdir={workdir}",
    "--mode=explore", "--config.mesh.cpu_devices=4", GRADED, *flags,
  ]  # fmt: skip
  env = launching.environment(PYTHONPATH=str(ROOT / "tests/support"))
  with log(workdir, "explorer").open("ab") as file:
    explorer = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
  assert ends([*trainers, explorer], workdir) == [0, 0, 0]
  rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  same(one, (rows, load_file(workdir / "hf/model.safetensors")))


LONG = ("--config.trainer.total_steps=30", "--config.trainer.save_interval=5")


def steps(workdir):
  file = workdir / "metrics.jsonl"
  return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_steps(processes, workdir, count):
  end = time.monotonic() + 200
  while steps(workdir) < count:
    assert all(p.poll() is None for p in processes), log(workdir, 0).read_text()[-2000:]
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_one_is_killed_all_end_and_a_restart_ends_with_the_same_bits(recipe, tmp_path, victim):
  _, expected = whole(recipe, tmp_path / "calm", 2, *LONG)
  workdir = tmp_path / "killed"
  processes = start(recipe, workdir, 2, *LONG)
  wait_for_steps(processes, workdir, 12)
  processes[victim].kill()
  killed = time.monotonic()
  codes = ends(processes, workdir, 100)
  assert time.monotonic() - killed < 60 and codes[victim] == -signal.SIGKILL
  assert codes[1 - victim] != 0
  said = log(workdir, 1 - victim).read_text()
  assert "died" in said or "crashed" in said, said[-2000:]
  if victim:
    assert "unhealthy (stopped sending heartbeats):\n1\n" in said
  _, found = whole(recipe, workdir, 2, *LONG)
  for name, value in expected.items():
    assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.nightly
def test_one_is_asked_to_end_and_all_save(recipe, tmp_path):
  workdir = tmp_path / "run"
  processes = start(recipe, workdir, 2, *LONG)
  wait_for_steps(processes, workdir, 3)
  processes[1].send_signal(signal.SIGTERM)
  assert ends(processes, workdir) == [75, 75]
  saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
  assert saved == steps(workdir) < 30
  rows, _ = whole(recipe, workdir, 2, *LONG)
  assert [r["step"] for r in rows] == list(range(1, 31))


@pytest.mark.slow
def test_the_one_that_fails_says_so_to_the_other(recipe, tmp_path):
  workdir = tmp_path / "run"
  processes = start(recipe, workdir, 2, "--config.taskset.reward=graded:no_such_function")
  assert ends(processes, workdir, 100) == [1, 1]
  assert "no_such_function" in log(workdir, 0).read_text()
  assert "process 1 of 2 ends, because of process 0 of 2: UserError" in log(workdir, 1).read_text()


# --- two hosts ------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
  """Two network namespaces with a cable between them: [name, name]; addresses 10.77.0.1 and .2."""
  if os.geteuid() or shutil.which("ip") is None:
    pytest.skip("network namespaces need root and ip")
  ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
  names = [f"tj{os.getpid()}{side}" for side in "ab"]
  etc = [Path("/etc/netns") / name for name in names]
  try:
    for name in names:
      ip("netns", "add", name)
    ends_ = ("netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    ip("link", "add", "cable", *ends_)
    for i, (name, folder) in enumerate(zip(names, etc), 1):
      ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable")
      for device in ("lo", "cable"):
        ip("-n", name, "link", "set", device, "up")
      folder.mkdir(parents=True)  # of `ip netns exec`: gloo asks who this host is
      (folder / "hosts").write_text(f"10.77.0.{i} {socket.gethostname()} localhost\n")
    yield names
  finally:
    for name, folder in zip(names, etc):
      shutil.rmtree(folder, ignore_errors=True)
      subprocess.run(["ip", "netns", "del", name], capture_output=True)


def between(recipe, workdir, hosts, *flags, **given):
  within = lambda index: ("ip", "netns", "exec", hosts[index])
  return start(recipe, workdir, 2, *flags, host="10.77.0.1", within=within, **given)


@pytest.mark.nightly
def test_two_hosts_train_as_one_does(recipe, one, tmp_path, hosts):
  workdir = tmp_path / "run"
  flags = ("--config.trainer.total_steps=4", "--config.mesh.fsdp=4", "--config.mesh.data=1")
  assert ends(between(recipe, workdir, hosts, *flags), workdir) == [0, 0]
  rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  same(one, (rows, load_file(workdir / "hf/model.safetensors")))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("quickstart") / "one"
  return learned(start("configs/quickstart.py", workdir, 1, reward=()), workdir)


def learned(processes, workdir):
  """The first steps' losses and the last accuracy of each stage."""
  assert ends(processes, workdir, 3000) == [0] * len(processes), log(workdir, 0).read_text()[-2000:]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["compiles_after_warmup"] == 0
  losses = [r["loss"] for r in read_jsonl(workdir / "sft/metrics.jsonl") if "loss" in r]
  return losses[:20], summary["accuracy_after_sft"], summary["accuracy_final"]


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("where", ["two processes", "four processes", "two hosts"])
def test_the_quickstart_learns_the_same(quickstart, tmp_path, where, request):
  """800 and 25 steps amplify the last bits, by which sums over processes differ, into other
  weights; what is learned is the same."""
  if where == "two hosts":
    hosts = request.getfixturevalue("hosts")
    processes = between("configs/quickstart.py", tmp_path / "run", hosts, reward=())
  else:
    count = 2 if where == "two processes" else 4
    processes = start("configs/quickstart.py", tmp_path / "run", count, reward=())
  losses, after_sft, final = learned(processes, tmp_path / "run")
  print(where, after_sft, final, "one process:", *quickstart[1:])
  np.testing.assert_allclose(losses, quickstart[0], rtol=1e-4)
  assert after_sft == pytest.approx(quickstart[1], abs=0.05)
  assert final == pytest.approx(quickstart[2], abs=0.03) and final >= 0.95


@pytest.mark.nightly
def test_a_cut_cable_ends_both(recipe, tmp_path, hosts):
  workdir = tmp_path / "run"
  processes = between(recipe, workdir, hosts, "--config.trainer.total_steps=100000")
  wait_for_steps(processes, workdir, 5)
  subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "down"], check=True)
  cut = time.monotonic()
  assert all(code != 0 for code in ends(processes, workdir, 150))
  assert time.monotonic() - cut < 60
