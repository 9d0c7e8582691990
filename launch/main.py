"""The launcher: python launch/main.py --config=configs/quickstart.py --workdir=runs/quickstart

  --config=FILE.py[:ARG]  Python file with get_config() -> ConfigDict; see configs/
  --config.a.b=VALUE      overrides one key; --mode=keys lists every key with its meaning
  --config.stages.NAME.a.b=VALUE  overrides one key of one stage
  --workdir=DIR           the run's folder: made, or continued by the same command
  --mode=both             samples and trains (the default)
        train             only trains; explorers, in processes of their own, fill the buffer
        explore           only samples, for the trainer of the same --workdir; as many as you like,
                          each with its own --config.explorer.name
        bench             evaluates every checkpoint of --workdir on every held-out set
        serve             the newest model of --workdir behind OpenAI's API
        debug             one task (--task=N) through the workflow once, everything printed
        check             validates, prints data, shapes and memory per device, runs nothing
        plan              compiles for --topology, prints memory, traffic and time, runs nothing
        keys              prints every config key: default, limits, meaning
  --topology=NAME         devices of --mode=plan: v5e:2x2, v5p:4x4x8, h100x8, local (default) ...
  --distributed=PLACE     trains in several processes, each started with this command. PLACE is
                          where they meet: ADDRESS:PORT,COUNT,INDEX, or auto (TPU pods, GKE, Slurm).
                          Without it TRINITY_JAX_COORDINATOR, ..._PROCESSES and ..._PROCESS_ID tell
  --debug                 prints tracebacks of user errors too
  --verbosity=N           what libraries log: -1 warnings (default), 0 information, 1 debugging
  --help                  prints this

Exit codes: 0 done, 1 a mistake in what was given (one line on stderr) or a bug (a traceback), 3 a
run that had to stop, 75 asked to end by SIGTERM, everything is saved. The same command continues a
run after any of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from trinity_jax import config_keys, config_schema
from trinity_jax.config import Config, resolve
from trinity_jax.config_overrides import keys_of, override
from trinity_jax.errors import RunFailed, UserError, root_cause, suggestion
from trinity_jax.kernels.errors import CannotRun  # pyright: ignore[reportMissingImports]
from trinity_jax.preemption import EXIT_CODE, Preempted

EXPECTED = (Preempted, RunFailed, UserError, CannotRun)  # all else is a bug of ours
MODES = (*config_schema.MODES, "keys")


def own_flags() -> flags.FlagValues:
  """The flags that are not config keys; a fresh set, so that a process can parse twice."""
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "Config file.", flag_values=values)
  flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
  flags.DEFINE_enum("mode", None, MODES, "What to do.", flag_values=values)
  flags.DEFINE_string("topology", "local", "Devices of --mode=plan.", flag_values=values)
  flags.DEFINE_string("distributed", "", "Where processes meet.", flag_values=values)
  flags.DEFINE_integer("task", 0, "Task of --mode=debug.", lower_bound=0, flag_values=values)
  flags.DEFINE_bool("debug", False, "Print tracebacks of user errors.", flag_values=values)
  flags.DEFINE_integer("verbosity", -1, "What libraries log.", flag_values=values)
  flags.DEFINE_bool("help", False, "Print the usage.", short_name="h", flag_values=values)
  values.set_gnu_getopt(True)  # flags after `--config.a.b value` are flags too
  return values


@contextlib.contextmanager
def _flag_errors(known: list[str]) -> Iterator[None]:
  """absl's errors as ours: the flag, its value, what it should be."""
  try:
    yield
  except flags.UnrecognizedFlagError as e:
    hint = suggestion(e.flagname, known)
    raise UserError(f"unknown flag --{e.flagname}{hint} (config keys: --config.a.b=value)") from e
  except flags.IllegalFlagValueError as e:
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(e), re.DOTALL)
    if found and (expected := config_keys.describe(found[1])):
      raise UserError(f"config.{found[1]} = {found[2]!r}: expected {expected}") from e
    raise UserError(str(e)) from e
  except flags.Error as e:
    raise UserError(str(e)) from e


def load_config(reference: str) -> ConfigDict:
  """What get_config() of "FILE.py" or "FILE.py:ARG" returns.

  Raises:
    UserError: no such file, an error inside it, or something that is no ConfigDict.
  """
  name, *args = reference.split(":", 1)
  path = Path(name)
  if not path.is_file():
    problem = "is a folder" if path.is_dir() else "does not exist"
    raise UserError(f"--config={name}: {problem} (looked in {Path.cwd()}); see configs/")
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise UserError(f"--config={name}: not a Python file; name one such as configs/quickstart.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise UserError(f"--config={name}: defines no get_config(); see configs/quickstart.py")
    values = module.get_config(*args)
  except UserError:
    raise
  except Exception as e:  # whatever a user's file does
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    line = getattr(e, "lineno", None) if isinstance(e, SyntaxError) else (lines or [None])[-1]
    where = f"{name}:{line}" if line else name
    # ml_collections lists all keys of the group between the problem and its suggestion.
    what = re.sub(r' Other fields present: "\{.*\}"', "", str(e), flags=re.DOTALL)
    raise UserError(f"config file {where}: {type(e).__name__}: {what}") from e
  if not isinstance(values, ConfigDict):
    raise UserError(
      f"--config={name}: get_config() returned {type(values).__name__}; start from "
      "trinity_jax.config.base_config() and return it"
    )
  return values


def parse(argv: list[str]) -> tuple[flags.FlagValues, ConfigDict | None]:
  """Returns our flags, and the config with its overrides (None without --config).

  Raises:
    UserError: an unknown flag or key, a value of the wrong type, a config file that fails.
  """
  own = own_flags()
  with _flag_errors(list(own)):
    rest = own(argv, known_only=True)
  if own["help"].value:
    return own, None
  names, rest = keys_of(rest[1:]), rest[1:]
  values = load_config(own["config"].value) if own["config"].value else None
  if names and values is None:
    raise UserError(f"--config.{names[0]} without --config: name the config file it overrides")
  if values is not None:
    with _flag_errors(list(own)):
      values, rest = override(values, rest)
  for arg in rest:
    if arg.startswith("-") and arg != "-":
      name = arg.lstrip("-").split("=")[0]
      raise UserError(f"unknown flag --{name}{suggestion(name, own)}")
    raise UserError(f"unexpected argument {arg!r}; keys are set as --config.a.b=value")
  return own, values


def launch(own: flags.FlagValues, values: ConfigDict | None) -> None:
  """Does what the flags ask for. Heavy packages are imported here, not before."""
  mode = own["mode"].value
  if own["help"].value:
    print(__doc__)
    return
  if mode == "keys":
    print(config_keys.render_keys())
    return
  if values is None:
    raise UserError("--config is missing: name a Python file such as configs/quickstart.py")
  if mode:
    values.mode = mode
  config = resolve(values)
  if config.mode == "check":
    from trinity_jax.check import check

    print(check(config))
    return
  if config.mode == "plan":
    from trinity_jax.plan.report import plan

    print(plan(config, own["topology"].value or "", lambda line: print(line, file=sys.stderr)))
    return
  if not own["workdir"].value:
    raise UserError("--workdir is missing: name the folder the run writes to")
  if config.mode == "bench":
    from trinity_jax.bench import bench

    bench(config, own["workdir"].value)
    return
  if config.mode == "serve":
    from trinity_jax.serving import serve

    serve(config, own["workdir"].value)
    return
  if config.mode == "debug":
    from trinity_jax.debugging import debug

    debug(config, own["workdir"].value, own["task"].value or 0)
    return
  train(config, own["workdir"].value, own["distributed"].value or "", bool(own["debug"].value))


def train(config: Config, workdir: str, place: str, debug: bool) -> None:
  """Runs the config, with the other processes of the run where there are any."""
  from trinity_jax import distributed
  from trinity_jax.run import run

  if config.mode == "explore":  # explorers are alone wherever they run
    place = "off"
  world = distributed.join(place)
  try:
    run(config, workdir, world)
  except Exception as error:  # whatever it is, the other processes wait for this one: tell them
    if world.count > 1 and not isinstance(root_cause(error), Preempted):
      world.fail(root_cause(error), exit_code(error, debug))
    world.close()
    raise
  world.close()


def exit_code(error: BaseException, debug: bool) -> int:
  """Prints what went wrong, as briefly as it deserves; returns the code to exit with."""
  cause = root_cause(error)  # threads and task groups wrap what happened
  if isinstance(cause, Preempted):
    print(cause, file=sys.stderr)
    return EXIT_CODE
  if isinstance(cause, RunFailed):
    traceback.print_exception(error)
    return 3
  if debug or not isinstance(cause, EXPECTED):
    traceback.print_exception(error)
  if isinstance(cause, EXPECTED):
    print("error:", " ".join(str(cause).split()), file=sys.stderr)
  return 1


def main(argv: list[str]) -> int:
  """Runs the launcher; returns the exit code."""
  debug = any(a in ("--debug", "-debug", "--debug=true") for a in argv)
  try:
    own, values = parse(argv)
    logging.set_verbosity(own["verbosity"].value or 0)
    launch(own, values)
  except Exception as error:  # may come wrapped by threads and task groups; a bug goes on up
    if not isinstance(root_cause(error), EXPECTED):
      raise
    return exit_code(error, debug)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
