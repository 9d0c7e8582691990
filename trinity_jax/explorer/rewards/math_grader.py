"""math_verify behind `grade(response, truth)`; loaded only inside a grader worker.

Its own time limits use signal.alarm, which fails silently outside the main thread; they are off
here and the worker's CPU-time limit takes their place.
"""

from __future__ import annotations

import logging
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
# A marked answer is taken whole: a number found somewhere inside it would let guesses pass.
_MARKED = {
  "extraction_config": (LatexExtractionConfig(boxed_match_priority=0),),
  "extraction_mode": "first_match",
}


def grade(response: str, truth: str) -> tuple[float, str]:
  """Returns (1.0, "correct"), (0.0, "wrong") or (0.0, "unparsed").

  Args:
    response: a final answer as `\\boxed{...}`, or a whole text to find it in.
    truth: LaTeX or a plain number, as `\\boxed{...}`.

  Raises:
    ValueError: nothing in `truth` can be compared with.
  """
  gold = parse(truth, parsing_timeout=0, **_MARKED)
  if not gold:
    raise ValueError("truth has no answer")
  marked = response.startswith("\\boxed{") and response.endswith("}")
  answer = parse(response, parsing_timeout=0, **(_MARKED if marked else {}))
  if not answer:
    return 0.0, "unparsed"
  # An inequality answers an interval, as an interval answers an inequality.
  options = {"timeout_seconds": 0, "raise_on_error": True, "allow_set_relation_comp": True}
  if verify([_complex(g) for g in gold], [_complex(a) for a in answer], **options):
    return 1.0, "correct"
  return 0.0, "wrong"


def _complex(found: Any) -> Any:
  """math_verify takes i for a variable; on both sides it is the imaginary unit."""
  if not isinstance(found, sympy.Expr):
    return found
  names = [s for s in found.free_symbols if str(s) == "i"]
  return found.subs(names[0], sympy.I) if names else found


def warm_up() -> None:
  """Fills the caches (patterns, parser tables) that every forked child then shares."""
  boxes = ("\\boxed{1{,}234.5}", "\\boxed{-7}", "\\boxed{\\sqrt{2}x^2+1}", "\\boxed{\\frac{3}{4}}")
  for text in (*boxes, "$\\frac{3}{4}$", "7", "so 3*4 = 12"):
    grade(text, "\\boxed{12}")
  grade("\\boxed{(1, 2)}", "\\boxed{\\{1, 2\\}}")
