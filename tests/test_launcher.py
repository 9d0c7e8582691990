"""The launcher: help, keys, flags, config files, exit codes."""

from __future__ import annotations

from pathlib import Path

import launching
import pytest

from trinity_jax import config_keys
from trinity_jax.errors import RunFailed, UserError, root_cause, suggestion

ROOT = launching.ROOT
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "transformers", "tokenizers", "numpy", "rich",
         "matplotlib", "tensorboardX", "math_verify", "safetensors", "torch")  # fmt: skip


@pytest.fixture(scope="module")
def launch():
  return launching.launcher()


@pytest.fixture
def recipe(tmp_path) -> Path:
  return launching.write_recipe(tmp_path / "recipe.py", "model")


def test_help_is_light_and_complete(launch):
  code = (
    "import sys, time; start = time.monotonic(); sys.argv = ['launch/main.py', '--help'];"
    "import runpy\n"
    "try:\n  runpy.run_path('launch/main.py', run_name='__main__')\n"
    "except SystemExit as e:\n  assert e.code == 0, e.code\n"
    f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules], time.monotonic() - start)"
  )
  done = launching.spawn(code=code)
  assert done.returncode == 0, done.stderr
  help_text, _, rest = done.stdout.rpartition("HEAVY ")
  assert rest.startswith("[]"), rest
  for name in launch.own_flags():
    assert f"--{name}" in help_text
  for mode in launch.MODES:
    assert mode in help_text
  assert "--mode=keys lists every key" in help_text


def test_help_wins_over_everything(launch, capsys):
  assert launch.main(["main.py", "--help", "--config.a.b=3"]) == 0
  assert "Exit codes" in capsys.readouterr().out
  assert launch.main(["main.py", "-h"]) == 0


def test_keys_are_printed(launch, capsys):
  assert launch.main(["main.py", "--mode=keys"]) == 0
  out = capsys.readouterr().out
  assert all(f"config.{path} = " in out for path, _, _ in config_keys.walk())


def test_overrides_of_every_kind(launch, recipe):
  own, values = launch.parse([
    "main.py", f"--config={recipe}", "--workdir=w", "--config.seed", "3", "--debug",
    "--config.optimizer.learning_rate=1e-3", "--config.explorer.deterministic=false",
    "--noconfig.eval.on_start", "--config.sampler.prompt_buckets=(4,9)", "--config.name=other",
    "--config.model.tiny={'hidden': 64}", "--config.model.tiny.layers=2",
    "--config.algorithm.policy_loss_args.clip_high=0.28", "--config.taskset.generate_args.n=4",
    "--config.taskset.reward_args.weights={'format': 0.5}", "--config.trainer.row_lengths=13",
    "--config.trainer.total_steps=4", "--config.trainer.total_steps=5",
    "--config.stages=({'name': 'a', 'trainer.save_interval': 5},)",
  ])  # fmt: skip
  assert own["workdir"].value == "w" and own["debug"].value and own["mode"].value is None
  assert values.seed == 3 and values.optimizer.learning_rate == 1e-3 and values.name == "other"
  assert values.explorer.deterministic is False and values.eval.on_start is False
  assert values.sampler.prompt_buckets == (4, 9) and values.trainer.row_lengths == (13,)
  assert values.model.tiny.to_dict() == {"hidden": 64, "layers": 2}
  assert values.algorithm.policy_loss_args.to_dict() == {"clip_high": 0.28}
  assert values.taskset.generate_args.to_dict() == {"split": "rl", "n": 4}
  assert values.taskset.reward_args.weights.to_dict() == {"format": 0.5}
  assert values.trainer.total_steps == 5  # the last one wins
  assert values.stages == ({"name": "a", "trainer.save_interval": 5},)


def test_arguments_of_a_config_that_was_unlocked_and_locked_again(launch):
  """ml_collections' `unlocked()` locks everything at its end, open groups of arguments too."""
  _, values = launch.parse([
    "main.py", "--config=configs/algorithms.py:dpo",
    "--config.algorithm.policy_loss_args.nll_coef=1.0",
  ])  # fmt: skip
  assert values.algorithm.policy_loss_args.to_dict() == {"nll_coef": 1.0}


def test_a_process_can_parse_twice(launch, recipe):
  for seed in (1, 2):
    _, values = launch.parse(["main.py", f"--config={recipe}", f"--config.seed={seed}"])
    assert values.seed == seed


def test_config_argument(launch, tmp_path):
  path = tmp_path / "swept.py"
  path.write_text(
    "from trinity_jax.config import base_config\n"
    "def get_config(size):\n  c = base_config()\n  c.name = size\n  return c\n"
  )
  assert launch.load_config(f"{path}:large").name == "large"
  with pytest.raises(UserError, match=r"swept.py: TypeError: get_config\(\) missing 1 required"):
    launch.load_config(str(path))


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    ([], "--config is missing: name a Python file such as configs/quickstart.py"),
    (["--workdir=w"], "--config is missing"),
    (["--config.seed=1"], "--config.seed without --config"),
    (["--cnfig=x"], "unknown flag --cnfig; did you mean 'config'?"),
    (["--config=RECIPE", "--wrkdir=x"], "unknown flag --wrkdir; did you mean 'workdir'?"),
    (["--config=RECIPE"], "--workdir is missing: name the folder"),
    (["--config=RECIPE", "--mode=tran"], "flag --mode=tran: value should be one of <both|explore"),
    (["--config=RECIPE", "left.py"], "unexpected argument 'left.py'"),
    (["--config=RECIPE", "--config.seed=x"], "config.seed = 'x': expected int >= 0; Seed of"),
    (["--config=RECIPE", "--config.seed=-1"], "config.seed = -1: must be at least 0"),
    (["--config=RECIPE", "--config.trainer=4"], "config.trainer = '4': expected a group of keys"),
    (["--config=RECIPE", "--config.trainer.keep.x=4"], "config.trainer.keep is one value"),
    (["--config=RECIPE", "--config.sampler.prefill_batches=a"], "prefill_batches[0] = 'a'"),
    (["--config=RECIPE", "--config.eval.on_start=maybe"], "on_start = 'maybe': expected bool"),
    (["--config=nope.py"], "--config=nope.py: does not exist (looked in "),
    (["--config=."], "--config=.: is a folder"),
    (["--config=LICENSE"], "--config=LICENSE: not a Python file"),
    (["--config=RECIPE", "--verbosity=loud"], "flag --verbosity=loud"),
  ],
)
def test_wrong_flags(launch, recipe, capsys, monkeypatch, args, expected):
  monkeypatch.chdir(ROOT)
  assert launch.main(["main.py", *(a.replace("RECIPE", str(recipe)) for a in args)]) == 1
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
  assert expected in err and "Traceback" not in err


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("def get_config(:\n", ":1: SyntaxError: "),
    ("x = 1\n", ": defines no get_config(); see configs/quickstart.py"),
    ("def get_config():\n  return None\n", ": get_config() returned NoneType; start from"),
    ("def get_config():\n  return {}['a']\n", ":2: KeyError: 'a'"),
    ("def get_config():\n  raise OSError('a\\nb')\n", ":2: OSError: a b"),
    ("import nothing_of_this_name\n", ":1: ModuleNotFoundError: No module named"),
    (
      "from trinity_jax.config import base_config\ndef get_config():\n  c = base_config()\n"
      "  c.trainer.total_step = 3\n  return c\n",
      ":4: AttributeError: 'Key \"total_step\" does not exist",
    ),
    (
      "from trinity_jax.config import base_config\ndef get_config():\n  c = base_config()\n"
      "  c.trainer.total_steps = 'x'\n  return c\n",
      ":4: TypeError: Could not override field 'total_steps'",
    ),
  ],
)
def test_config_files_that_fail(launch, tmp_path, capsys, text, expected):
  path = tmp_path / "bad.py"
  path.write_text(text)
  assert launch.main(["main.py", f"--config={path}", "--workdir=w"]) == 1
  _, err = capsys.readouterr()
  assert err.count("\n") == 1 and f"{path}{expected}" in err, err
  if "total_step " in text:
    assert 'Did you mean "total_steps"' in err and "batch_size" not in err


def test_a_run_that_had_to_stop_keeps_its_traceback(launch, recipe, capsys, monkeypatch):
  def fail(*_):
    raise ExceptionGroup("runs", [RunFailed("the sampler died")])

  monkeypatch.setattr(launch, "launch", fail)
  assert launch.main(["main.py", f"--config={recipe}"]) == 3
  err = capsys.readouterr().err
  assert "Traceback" in err and "the sampler died" in err


def test_a_bug_of_ours_is_no_user_error(launch, monkeypatch):
  def fail(*_):
    raise ZeroDivisionError

  monkeypatch.setattr(launch, "launch", fail)
  with pytest.raises(ZeroDivisionError):
    launch.main(["main.py"])


def test_root_cause_and_suggestion():
  inner = UserError("x")
  assert root_cause(ExceptionGroup("a", [ExceptionGroup("b", [inner, UserError("y")])])) is inner
  mixed = ExceptionGroup("a", [inner, ValueError("z")])
  assert root_cause(mixed) is mixed and root_cause(inner) is inner
  assert suggestion("traner", ["trainer", "x"]) == "; did you mean 'trainer'?"
  assert suggestion("zzz", ["b", "a"]) == "; known: a, b"


def test_gpu_check_checks(monkeypatch, capsys):
  """Its comparisons hold on the CPU too; without an accelerator it says so and fails."""
  import importlib.util

  spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "launch" / "gpu_check.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert "relative gradient difference" in module.check_linear_logprob(vocabulary=9000)
  assert "relative difference" in module.check_attention(names=(None,))
  assert module.main() == 1
  assert "no accelerator" in capsys.readouterr().err
