"""Shows a run in a browser: curves and rollouts, while it goes on or after it.

  python launch/view.py --workdir=runs/quickstart

  --workdir=DIR      the run's folder, or one stage's
  --port=N           0 (the default) takes a free one
  --host=ADDRESS     127.0.0.1 (the default): only this machine can connect
  --tokenizer=DIR    HF folder whose tokenizer.json turns ids into text; default: the run's own

Prints an address that holds a token; whoever has it can read the run. Nothing is written. Rollouts
are read where the run's config.json says they are, in its folder or in PostgreSQL. They are deleted
once they have been trained on, unless the run has --config.buffer.keep=True.
"""

from __future__ import annotations

import sys

from absl import flags

from trinity_jax.errors import RunFailed, UserError


def main(argv: list[str]) -> int:
  """Runs the viewer until it is interrupted; returns the exit code."""
  own = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=own)
  flags.DEFINE_integer("port", 0, "Port.", lower_bound=0, upper_bound=65535, flag_values=own)
  flags.DEFINE_string("host", "127.0.0.1", "Address to bind to.", flag_values=own)
  flags.DEFINE_string("tokenizer", "", "HF folder.", flag_values=own)
  flags.DEFINE_bool("help", False, "Print the usage.", short_name="h", flag_values=own)
  try:
    rest = own(argv)
    if own["help"].value:
      print(__doc__)
      return 0
    if rest[1:]:
      raise UserError(f"unexpected argument {rest[1]!r}")
    if not own["workdir"].value:
      raise UserError("--workdir is missing: name the folder a run writes to")
    from trinity_jax.server.viewer import Viewer

    viewer = Viewer(
      own["workdir"].value,
      host=str(own["host"].value),
      port=int(own["port"].value or 0),
      tokenizer=str(own["tokenizer"].value),
    )
    print(viewer.url, flush=True)
    viewer.run()
  except (flags.Error, UserError, RunFailed) as error:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 3 if isinstance(error, RunFailed) else 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
