"""The launcher: python launch/main.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key can be overridden: --config.trainer.total_steps=10. `--mode=check` validates a config and
prints the plan (parameters, memory, steps) without running it.
"""

from __future__ import annotations

import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config() -> ConfigDict; see configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: made, or continued.")
_MODE = flags.DEFINE_enum("mode", None, ["both", "train", "check"], "Overrides config.mode.")
_DEBUG = flags.DEFINE_bool("debug", False, "Print tracebacks of user errors too.")


def main(argv: list[str]) -> None:
  from trinity_jax.config import resolve
  from trinity_jax.errors import RunFailed, UserError

  try:
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; keys are set as --config.a.b=value")
    if _CONFIG.value is None:
      raise UserError("--config is missing: name a Python file such as configs/quickstart.py")
    values = _CONFIG.value
    if _MODE.value:
      values.mode = _MODE.value
    config = resolve(values)
    if config.mode == "check":
      from trinity_jax.check import check

      print(check(config))
      return
    if not _WORKDIR.value:
      raise UserError("--workdir is missing: name the folder the run writes to")
    from trinity_jax.run import run

    run(config, _WORKDIR.value)
  except UserError as e:
    if _DEBUG.value:
      traceback.print_exc()
    sys.exit(f"error: {e}")
  except RunFailed:
    traceback.print_exc()
    sys.exit(3)


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)  # libraries; --verbosity=0 shows what they say
  app.run(main)
