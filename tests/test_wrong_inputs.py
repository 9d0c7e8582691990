"""Every wrong input is one line that names the thing, the value and the fix; exit code not 0."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import launching
import pytest

from trinity_jax.buffer.record import Rules, describe_group
from trinity_jax.buffer.store import open_store
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.models.hf import write_tiny_checkpoint


@pytest.fixture(scope="module")
def main():
  return launching.launcher().main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("model") / "tiny"
  return write_tiny_checkpoint(path, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16,
                               intermediate=32)  # fmt: skip


@pytest.fixture
def run(main, model, tmp_path, capsys):
  """Runs the launcher in this process; returns its one line of error."""
  recipe = launching.write_recipe(tmp_path / "recipe.py", model)

  def go(*args: str, workdir: Path | str = tmp_path / "run", config: Path = recipe) -> str:
    code = main(["main.py", f"--config={config}", f"--workdir={workdir}", *args])
    out, err = capsys.readouterr()
    assert code == 1, (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in out + err
    return lines[0]

  return go


def rows(tmp_path: Path, text: str) -> str:
  path = tmp_path / "rows.jsonl"
  path.write_text(text)
  return f"--config.taskset.path={path}"


FROM_FILE = "--config.taskset.generate="


def test_missing_file(run, tmp_path):
  line = run(FROM_FILE, f"--config.taskset.path={tmp_path}/no.jsonl")
  assert f"taskset file {tmp_path}/no.jsonl does not exist" in line
  assert "set taskset.path to a JSONL file" in line


def test_bad_json_row(run, tmp_path):
  line = run(FROM_FILE, rows(tmp_path, '{"prompt": "1+1="}\n{"prompt": 1+1}\n'))
  assert f"{tmp_path}/rows.jsonl:2: not JSON" in line and "fix or remove the line" in line


def test_unknown_key(run):
  line = run("--config.explorer.group_sise=4")
  assert line == "error: config.explorer.group_sise: unknown key; did you mean 'group_size'?"


def test_wrong_type(run):
  line = run("--config.trainer.total_steps=many")
  assert "config.trainer.total_steps = 'many': expected int >= 1; Optimizer steps" in line


def test_zero_group(run):
  line = run("--config.explorer.group_size=0")
  assert "config.explorer.group_size = 0: must be at least 1" in line


def test_group_of_one(run):
  line = run("--config.explorer.group_size=1", "--config.explorer.batch_size=8")
  assert "config.explorer.group_size = 1: algorithm 'grpo' compares the runs" in line


def test_no_prompt_fits(run):
  line = run("--config.sampler.max_prompt_length=3")
  assert "no prompt (a sample of 256 of " in line
  assert "fits config.sampler.max_prompt_length = 3" in line
  assert re.search(r"the shortest has \d+ tokens", line)
  assert re.search(r"raise the limit to at least \d+", line)


def test_demonstration_longer_than_the_limit(run, tmp_path):
  text = "".join(json.dumps({"prompt": "1+1=", "response": "2" * n}) + "\n" for n in (1, 2, 9))
  line = run(FROM_FILE, rows(tmp_path, text), "--config.algorithm.name=sft")
  assert "row 2: its response has 10 tokens, more than sampler.max_response_length = 4" in line
  text = json.dumps({"prompt": "1" * 20, "response": "2"}) + "\n"
  line = run(FROM_FILE, rows(tmp_path, text), "--config.algorithm.name=sft",
             workdir=tmp_path / "other")  # fmt: skip
  assert "row 0: its prompt has " in line and "sampler.max_prompt_length = 9" in line


def test_checkpoint_of_another_shape(run, model, tmp_path):
  shutil.copytree(model, tmp_path / "model")
  config = json.loads((tmp_path / "model" / "config.json").read_text())
  config["intermediate_size"] = 64
  (tmp_path / "model" / "config.json").write_text(json.dumps(config))
  line = run(f"--config.model.path={tmp_path}/model")
  assert "model.layers.0.mlp.gate_proj.weight is (32, 32), expected (64, 32)" in line
  assert f"{tmp_path}/model" in line


def test_truncated_safetensors(run, model, tmp_path):
  shutil.copytree(model, tmp_path / "model")
  file = tmp_path / "model" / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1000])
  line = run(f"--config.model.path={tmp_path}/model")
  assert f"{file}: truncated or not safetensors" in line


def test_unknown_model_type(run, model, tmp_path):
  shutil.copytree(model, tmp_path / "model")
  config = json.loads((tmp_path / "model" / "config.json").read_text())
  config["model_type"] = "mamba"
  (tmp_path / "model" / "config.json").write_text(json.dumps(config))
  line = run(f"--config.model.path={tmp_path}/model")
  assert f"{tmp_path}/model/config.json: model_type = 'mamba' is not supported" in line
  assert "(supported: qwen2, qwen3, llama, mistral)" in line


def test_missing_model(run, tmp_path):
  line = run(f"--config.model.path={tmp_path}/none")
  assert f"config.model.path = '{tmp_path}/none': no such folder" in line


def test_mesh_that_does_not_divide(run):
  line = run("--config.mesh.tensor=3")
  assert "mesh data=-1, fsdp=1, context=1, tensor=3 does not fit 8 device(s)" in line
  assert "choose sizes that divide 8" in line


def test_heads_that_the_mesh_does_not_divide(run, tmp_path):
  line = run("--config.mesh.tensor=8", workdir=tmp_path / "b")
  assert "model: num_heads = 2 does not divide over mesh axis tensor of size 8" in line


def test_rows_that_the_mesh_does_not_divide(run):
  line = run("--config.trainer.rows_per_micro=3")
  assert "config.trainer.rows_per_micro = 3: must be a multiple of the 8 devices" in line
  assert "use 8" in line


@pytest.mark.parametrize("where", ["file", "/proc/trinity"])
def test_unwritable_workdir(run, tmp_path, where):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run" if where == "file" else where
  line = run(workdir=workdir)
  assert f"--workdir={workdir} cannot be written" in line and "choose another" in line


def test_workdir_of_another_config(run, tmp_path):
  (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text('{"seed": 7}')
  assert "holds a run with another config (differs in: algorithm, buffer" in run()


@pytest.mark.parametrize("left", ["rows", "groups", "postgresql", "nothing"])
def test_a_workdir_in_which_something_was_sampled(run, tmp_path, left):
  """A run trained on the rollouts that one of another config had left, without a checkpoint."""
  stage = tmp_path / "run" / "grpo"
  stage.mkdir(parents=True)
  url = "postgresql://host/name" if left == "postgresql" else "sqlite"
  config = {"seed": 7, "buffer": {"url": url}}
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  (stage / "metrics.jsonl").write_text("{}\n" if left == "rows" else "")
  store = open_store("sqlite", stage)
  if left == "groups":
    experience = Experience.failed(ExperienceId(1, 0, 0, 0), StopReason.ERROR, {})
    store.put([describe_group([experience])], Rules(8, "id", 1))
  store.close()
  line = run("--config.taskset.reward=arithmetik")
  assert ("holds a run with another config (differs in:" in line) == (left != "nothing")


def test_empty_taskset(run, tmp_path):
  line = run(FROM_FILE, rows(tmp_path, "\n\n"))
  assert f"taskset file {tmp_path}/rows.jsonl has no rows" in line
  line = run("--config.taskset.limit=-3")
  assert "config.taskset.limit = -3: must be at least 0" in line


def test_field_that_rows_do_not_have(run, tmp_path):
  line = run(FROM_FILE, rows(tmp_path, '{"question": "1+1="}\n'))
  assert "rows.jsonl:1: no field 'prompt'" in line and "taskset.prompt_key" in line


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    (["--config.algorithm.name=grop"], "algorithm 'grop' does not exist; did you mean 'grpo'?"),
    (["--config.taskset.reward=arithmetik"], "did you mean 'arithmetic'?"),
    (["--config.taskset.generate=nowhere:f"], "there is no module 'nowhere'"),
    (["--config.taskset.generate=trinity_jax.tasks.arithmetic:generat"], "did you mean 'generate"),
    (["--config.taskset.generate_args.spit=3"], "unexpected keyword argument 'spit'"),
    (["--config.algorithm.policy_loss_args.clip=0.1"], "has no option 'clip'"),
    (["--config.sampler.slots=12"], "config.sampler.slots = 12: must be a multiple of the 8 dev"),
  ],
)
def test_names_that_do_not_exist(run, args, expected):
  assert expected in run(*args)


@pytest.mark.parametrize(
  ("key", "expected"),
  [("url': 'postgres://a@b/c", "buffer store 'postgres://a@b/c': expected memory, sqlite"),
   ("replay': '/no/such", "config.buffer.replay = '/no/such': there is no such")],
)  # fmt: skip
def test_the_last_stages_buffer_is_checked_before_the_first_one_runs(run, tmp_path, key, expected):
  """After hours of supervised training, say, which opens none."""
  line = run(f"--config.stages=({{'name': 'a'}}, {{'name': 'b', 'buffer': {{'{key}'}}}})")
  assert expected in line and not (tmp_path / "run" / "a").exists()


def test_the_last_stage_is_checked_before_the_first_one_runs(run, tmp_path):
  """And a workdir in which nothing was trained takes the corrected config."""
  stages = "({{'name': 'a'}}, {{'name': 'b', 'taskset.reward': '{}'}})"
  line = run(f"--config.stages={stages.format('arithmetik')}")
  assert "did you mean 'arithmetic'?" in line
  assert not (tmp_path / "run" / "a").exists()
  line = run(f"--config.stages={stages.format('arithmetic+x')}", "--config.seed=4")
  assert "'x'" in line and "another config" not in line


# --- in processes of their own -------------------------------------------------------------------


def one_error(*args: str) -> str:
  done = launching.spawn(*args)
  assert done.returncode == 1, done
  assert "Traceback" not in done.stderr + done.stdout
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ")
  return line


def test_in_its_own_process(tmp_path, model):
  recipe = launching.write_recipe(tmp_path / "recipe.py", model)
  line = one_error(f"--config={recipe}", "--config.trainr.total_steps=1")
  assert line == "error: config.trainr: unknown key; did you mean 'trainer'?"
  line = one_error(f"--config={recipe}", f"--workdir={recipe}/run")
  assert "cannot be written: Not a directory" in line
  line = one_error(
    f"--config={recipe}", f"--workdir={tmp_path}/run", FROM_FILE, "--config.taskset.path=no.jsonl"
  )
  assert "taskset file no.jsonl does not exist" in line


def test_debug_prints_the_traceback_too(tmp_path):
  done = launching.spawn(f"--config={tmp_path}/none.py", "--debug")
  assert done.returncode == 1 and "Traceback" in done.stderr
  assert done.stderr.strip().splitlines()[-1].startswith("error: --config=")
