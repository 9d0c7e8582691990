"""For tests: stand-ins of the programs that the launchers call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "tpu"

HEAD = f"""#!{sys.executable} -IS
import json, os, pathlib, subprocess, sys
here = pathlib.Path({{folder!r}})
args, text = sys.argv[1:], sys.stdin.read() if "-" in sys.argv or len(sys.argv) == 1 else ""
with (here / "calls.jsonl").open("a") as f:
  f.write(json.dumps([args, text]) + "\\n")

def pop(name, default=""):
  "The next line of a file of what will happen; the last one stays."
  file = here / name
  lines = file.read_text().split("\\n") if file.exists() else [default]
  if len(lines) > 1:
    file.write_text("\\n".join(lines[1:]))
  return lines[0]
"""


class StandIn:
  """A program first on the PATH that writes down how it is called.

  Args:
    folder: an empty one, for the program and its files.
    name: of the program.
    body: Python: sees `args`, `text` (stdin), `here` (its folder), `pop`.
  """

  def __init__(self, folder: Path, name: str, body: str):
    folder.mkdir()
    self.folder, program = folder, folder / "bin" / name
    program.parent.mkdir()
    program.write_text(HEAD.format(folder=str(folder)) + body)
    program.chmod(0o755)

  def put_on(self, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(self.folder / "bin"), prepend=":")

  def calls(self) -> list[list[str]]:
    """The arguments of each call."""
    return [args for args, _ in self._lines()]

  def inputs(self) -> list[str]:
    """What each call was given on stdin."""
    return [text for _, text in self._lines()]

  def will(self, **files: str | list[str]) -> None:
    """What `pop` of a file's name returns, call by call."""
    for name, lines in files.items():
      text = lines if isinstance(lines, str) else "\n".join(lines)
      (self.folder / name).write_text(text)

  def _lines(self) -> list:
    file = self.folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
