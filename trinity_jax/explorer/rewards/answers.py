"""Finds the final answer in a response: `\\boxed{...}` or GSM8K's `#### ...`.

Runs in our process on what a model wrote, so every function is one linear pass over the text.
"""

from __future__ import annotations

import re

from trinity_jax.explorer.rewards import math_text

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SIGNED = r"[-+\u2212]?\s?[$\u20ac\u00a3]?\s?[-+\u2212]?"
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# "1,080", "$3.50", "-7", "25%", "40 minutes.": one number, at most a unit behind it.
_MARKED_NUMBER = re.compile(
  rf"({_SIGNED})({_NUMBER})\s?(?:\\?%|\\?\$)?(?:\s([A-Za-z][A-Za-z /]{{0,40}}))?\.?",
  re.ASCII,
)
_NO_UNIT = re.compile(r"\b(?:is|are|was|were|not|or|if|but)\b", re.IGNORECASE)  # a sentence
_HEADING = re.compile(r"\d{1,3}[.):]\s+\D", re.ASCII)  # "2. Multiply"
_ENDS_IN_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?\s*[.!]?\s*\Z", re.ASCII)


def boxed(text: str) -> tuple[int, str] | None:
  """Returns (position, content) of the last complete `\\boxed{...}`, or None."""
  found, stack = None, []
  for match in _BRACES.finditer(text):
    token = match.group()
    if token == "{" or token.startswith("\\boxed"):
      stack.append(match.end() if len(token) > 1 else -1)
    elif token == "}" and stack:
      start = stack.pop()
      if start >= 0 and (found is None or start > found[0]):
        found = start, text[start : match.start()]
  return found


def hashed(text: str) -> tuple[int, str] | None:
  """Returns (position, rest of the line) of the last `####` that announces an answer, or None.

  A markdown heading ("#### Step 2", "#### 2. Multiply") announces one only as the very last line,
  where nothing else can be the answer.
  """
  start = text.rfind("####")
  if start < 0:
    return None
  line, _, after = text[start + 4 :].partition("\n")
  line = line.strip()
  announces = re.match(rf"{_SIGNED}\.?\d|\\", line) and not _HEADING.match(line)
  if after.strip() and not announces:
    return None
  return start, line


def number(text: str) -> str | None:
  """Returns the one number that `text` consists of, without separators and units, or None."""
  match = _MARKED_NUMBER.fullmatch(text.strip())
  if not match or (match[3] and not _may_be_unit(match[3].strip())):
    return None
  sign = "-" if re.search("[-\u2212]", match.group(1)) else ""
  return sign + match.group(2).replace(",", "")


def _may_be_unit(words: str) -> bool:
  """What may be left out behind a number; a lone letter that is no unit is a variable."""
  return (len(words) > 1 or words in math_text.UNITS) and not _NO_UNIT.search(words)


def final_answer(text: str) -> str | None:
  """Returns the marked final answer ("" when the mark is there and the answer is not), or None.

  Of a box and a `####` the later one counts.
  """
  candidates = [c for c in (boxed(text), hashed(text)) if c]
  return max(candidates)[1].strip() if candidates else None


def ends_in_number(text: str) -> bool:
  """True when the last thing in the text, a full stop aside, is a number."""
  return bool(_ENDS_IN_NUMBER.search(text[-100:]))
