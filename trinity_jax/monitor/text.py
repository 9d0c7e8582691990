"""Makes any text safe and short enough to print: a model's output must not steer a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

_NAMED = {"\n": "⏎", "\t": " "}
# Control, format (bidi overrides, zero width), surrogate, private use, unassigned, separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_BARS = "▁▂▃▄▅▆▇█"


def sanitize(text: object, limit: int = 200) -> str:
  """Returns one printable line of at most `limit` characters.

  Escape sequences, cursor movements, bidi overrides and zero-width characters are shown as
  `\\x1b`-like escapes, line breaks as ⏎, and at most two combining marks are kept per character.
  Rich markup is not touched: print the result as `rich.text.Text` or with markup off.
  """
  text = str(text)
  out: list[str] = []
  size = marks = 0
  for char in text:
    if char in _NAMED:
      piece = _NAMED[char]
    elif (kind := unicodedata.category(char)) in _UNSAFE:
      piece = char.encode("unicode_escape", "surrogatepass").decode("ascii")
    elif kind in ("Mn", "Me"):
      marks += 1
      if marks > 2:
        continue
      piece = char
    else:
      marks, piece = 0, char
    if size + len(piece) > limit:
      return "".join(out)[: max(limit - 1, 0)] + "…"[:limit]
    out.append(piece)
    size += len(piece)
  return "".join(out)


def encodable(text: str, encoding: str | None) -> str:
  """Returns the text with what the stream's encoding lacks replaced by `?`."""
  try:
    return text.encode(encoding or "ascii", "replace").decode(encoding or "ascii", "replace")
  except LookupError:  # an encoding that Python does not know
    return text.encode("ascii", "replace").decode("ascii")


def sparkline(values: Sequence[float], width: int) -> str:
  """Returns the values as bars, averaged down to at most `width`; a non-finite value is a blank.

  Scaled between the smallest and the largest finite value; all equal gives the lowest bar.
  """
  if width <= 0 or not values:
    return ""
  width = min(width, len(values))
  edges = [len(values) * i // width for i in range(width + 1)]
  means = []
  for a, b in zip(edges, edges[1:]):
    finite = [v for v in values[a:b] if math.isfinite(v)]
    means.append(sum(finite) / len(finite) if finite else math.nan)
  known = [m for m in means if math.isfinite(m)]
  if not known:
    return " " * width
  low, span = min(known), max(known) - min(known)
  if not math.isfinite(span) or span == 0:
    span = math.inf  # everything on the lowest bar
  return "".join(
    " " if math.isnan(m) else _BARS[min(int((m - low) / span * len(_BARS)), len(_BARS) - 1)]
    for m in means)


def duration(seconds: float) -> str:
  """Returns 9s, 1m05s, 2h03m or 3d04h; "?" for what is no duration."""
  if not math.isfinite(seconds) or seconds < 0:
    return "?"
  whole = int(round(seconds))
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m{whole % 60:02d}s"
  if whole < 86400:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def number(value: float) -> str:
  """Returns a number in at most 8 characters: 0.512, 12.3k, 1.2e-05, nan."""
  if not math.isfinite(value):
    return str(value)
  size = abs(value)
  if size >= 1e15:
    return f"{value:.1e}"
  for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= limit:
      return f"{value / (1e3 if unit == 'k' else limit):.1f}{unit}"
  if size >= 100:
    return f"{value:.0f}"
  if size >= 1 or value == int(value):
    return f"{value:.3g}"
  return f"{value:.3f}" if size >= 0.01 else f"{value:.1e}"
