"""Ways to write an answer that math_verify reads otherwise than people do, rewritten before it.

Runs in our process on what a model wrote: every pattern is one linear pass over the text.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SPACES = "\u00a0\u2007\u2009\u202f"
# Digit groups: 1\,080 and 1~080.
_GROUPED = re.compile(rf"(?<=\d)(?:\\[,;:! ]|~|[{_SPACES}])+(?=\d{{3}}(?!\d))")
_MIXED = re.compile(r"([-+\u2212]?)\s?(\d{1,12})\s{1,3}(\d{1,12})\s?/\s?(\d{1,12})")  # 1 1/2
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|textbf|mathbf|mbox)\s?\{([^{}\\]*)\}")
_PERCENT = re.compile(r"(?<=\d)\s{0,3}(?:\\text\s?\{\s{0,3}percent\s{0,3}\}|percent)\Z")
_QUANTITY = re.compile(r"\s?[-+\u2212]?\s?\$?\s?[\d.,]*\d\s?(?:[A-Za-z][A-Za-z /]{0,40})?")
_SCALED = re.compile(  # 2 million, in front of a unit or not
  r"([-+]?\s?\$?\s?)(\d[\d,]{0,20}(?:\.\d{1,12})?)\s"
  r"(dozen|hundred|thousand|million|billion|trillion)\b(?!\sand\b)"
)
_SCALES = dict(
  dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12
)
_ROOT = re.compile(r"\\sqrt\s?\[(\d{1,6})\]\s?([A-Za-z0-9])")
_BINOMIAL = re.compile(r"\\([dt]?binom)\s?(\d)\s?(\d)(?!\d)")
_NATURAL = re.compile(r"\\log_\s?(?:\{\s?e\s?\}|e(?![A-Za-z]))")
_DEGREES = re.compile(
  r"\\(sin|cos|tan|cot|sec|csc)\s?[({]?\s?(-?\d{1,12}(?:\.\d{1,12})?)\s?\^\s?\{?\s?\\circ\s?\}?[)}]?"
)
_BOLD = re.compile(r"\\(?:boldsymbol|bm)\s?(?=\{)")
_BIG = re.compile(r"\\[bB]ig{1,2}[lr]?\s?(?=[()\[\]|]|\\[{}])")
_WORDS = re.compile(r"[A-Za-z]{2,20}(?: [A-Za-z]{2,20}){1,5}")  # without spaces, a product
_PERIOD = re.compile(r"([-+]?\d{0,12})\.(\d{0,12})\\(?:overline|bar)\s?\{(\d{1,12})\}")
_REPLACED = str.maketrans({"\u00b0": "^\\circ ", "\u2212": "-", **dict.fromkeys(_SPACES, " ")})


def tidy(answer: str) -> str:
  """Returns the answer, rewritten where it is written in one of these ways; else as it is."""
  answer = _GROUPED.sub("", answer.strip())
  answer = answer.translate(_REPLACED).replace("~", " ").strip()
  if answer.endswith(".") and not answer.endswith(".."):
    answer = answer[:-1].rstrip()
  answer = re.sub(r"\.(?=\}\Z)", "", answer)
  if (match := _TEXT.fullmatch(answer)) and _QUANTITY.fullmatch(match[1]):
    answer = match[1].strip()  # \text{18 dollars}
  answer = _PERCENT.sub(r"\\%", answer)
  if match := _SCALED.match(answer):
    number = Decimal(match[2].replace(",", "")) * _SCALES[match[3]]
    answer = f"{match[1]}{number.normalize():f}{answer[match.end() :]}"
  if match := _MIXED.fullmatch(answer):
    sign = "-" if match[1] == "-" else ""
    return f"{sign}{match[2]}\\frac{{{match[3]}}}{{{match[4]}}}"
  if match := _PERIOD.fullmatch(answer):
    return _repeating(*match.groups())
  if _WORDS.fullmatch(answer):
    return f"\\text{{{answer}}}"
  answer = _BIG.sub("", _BOLD.sub("", answer))
  answer = _ROOT.sub(r"\\sqrt[\1]{\2}", answer)
  answer = _BINOMIAL.sub(r"\\\1{\2}{\3}", answer)
  answer = _NATURAL.sub(r"\\ln ", answer)
  answer = _DEGREES.sub(r"\\\1(\\frac{\2\\pi}{180})", answer)
  return answer.replace("\\varnothing", "\\emptyset")


def _repeating(whole: str, fixed: str, period: str) -> str:
  """0.1666... as 1/6: the digits with one period less those without, over 10^n - 10^m."""
  whole, sign = whole.lstrip("+-"), "-" if whole.startswith("-") else ""
  top = int(whole + fixed + period) - int(whole + fixed or "0")
  return f"{sign}\\frac{{{top}}}{{{10 ** len(fixed + period) - 10 ** len(fixed)}}}"


# --- units ---------------------------------------------------------------------------------------

_NAMES = (
  "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
  "in inch inches", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram",
  "kg kilogram", "lb lbs pound", "oz ounce", "s sec second", "min minute", "h hr hour", "day",
  "week", "month", "year", "ml milliliter millilitre", "l liter litre", "dollar", "cent", "euro",
  "am", "pm",
)  # fmt: skip
UNITS = {
  name: names.split()[0]
  for names in _NAMES
  for word in names.split()
  for name in (word, f"{word}s")
}
# A number, then a word (over another, to a power), in the ways that LaTeX sets it apart.
_WITH_UNIT = re.compile(
  r"\$?[-+\u2212]?\s?[\d.,]*\d\s?\$?(?:\\[,;:! ]|~|\s){0,6}"
  r"(?:\\(?:text|mathrm|textrm|mbox)\s?\{)?\s{0,3}([A-Za-z]{1,20})(?:/([A-Za-z]{1,20}))?"
  r"\s{0,3}\}?(?:\^\{?(\d)\}?)?\}?\s{0,3}\.?\s?\$?"
)
_WITH_BASE = re.compile(r"\d{1,1000}_\{?(\d{1,2})\}?")


def unit(answer: str) -> str | None:
  """Returns the known unit of a quantity such as "12 km" or "12\\text{ cm}^2", else None.

  The base of "1101_2" counts as one.
  """
  if match := _WITH_BASE.fullmatch(answer.strip()):
    return f"base {match[1]}"
  match = _WITH_UNIT.fullmatch(answer.strip())
  if not match:
    return None
  top, per = _known(match[1]), _known(match[2] or "")
  if top is None or (match[2] and per is None):
    return None
  return top + (f"/{per}" if per else "") + (match[3] or "")


def _known(word: str) -> str | None:
  return UNITS.get(word) or UNITS.get(word.lower() if len(word) > 2 else word)


def units_differ(answer: str, truth: str) -> bool:
  """True when both name a known unit and not the same one; units are never converted."""
  first, second = unit(answer), unit(truth)
  return first is not None and second is not None and first != second
