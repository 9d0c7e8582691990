"""Answers with a truth and whether a person would accept them, made by rules written by hand.

What the labels hold to:
  - the value counts, not how it is written: 1/2 = 0.5 = 2/4 = 50 %, and a surd need not be
    simplified; but a value that was rounded is another value;
  - a unit, a currency or a percent sign may be missing on either side; where both sides give one it
    must be the same one;
  - "x = 3" answers "3"; several solutions may come in any order, coordinates may not;
  - brackets of intervals matter; an inequality in x says the same as its interval;
  - two different answers are no answer.

The labels follow from the rules alone: nothing here asks a grader.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


class Labelled(NamedTuple):
  kind: str
  answer: str  # as it stands in the box, or a whole response
  truth: str
  correct: bool


def labelled() -> list[Labelled]:
  """All of them, without repetitions."""
  makers = (
    integers, separators, decimals, powers_of_ten, fractions, mixed_numbers, percent, units,
    degrees, surds, constants, functions, polynomials, equations, points, sets, several_solutions,
    intervals, inequalities, words, choices, complex_numbers, matrices, responses, nothing,
    second_round,
  )  # fmt: skip
  found = [Labelled(make.__name__, *row) for make in makers for row in make()]
  return list(dict.fromkeys(found))


Rows = Iterator[tuple[str, str, bool]]


def each(truths: str | list[str], right: list[str], wrong: list[str]) -> Rows:
  """Each answer against each way to write the truth."""
  for truth in [truths] if isinstance(truths, str) else truths:
    yield from ((answer, truth, True) for answer in right)
    yield from ((answer, truth, False) for answer in wrong)


def integers() -> Rows:
  for n in (0, 7, -3, 42, 1000, -250, 123456):
    right = [f"{n}", f"{n}.0", f"{n}.00", f"${n}$", f" {n} ", f"{n}.", f"\\text{{{n}}}"]
    right += [f"\\mathbf{{{n}}}", f"{{{n}}}", f"x={n}"]
    right += [f"+{n}"] if n > 0 else []
    right += [f"\u2212{-n}", f"- {-n}"] if n < 0 else []
    wrong = [f"{n + 1}", f"{n}1", f"{n}.5", f"{n}.01"]
    wrong += [f"{-n}", f"{10 * n}", f"\\frac{{1}}{{{n}}}"] if n else ["-1", "10"]
    yield from each(f"{n}", right, wrong)


def separators() -> Rows:
  for plain, parts in (("1080", "1,080"), ("1234567", "1,234,567"), ("-20500", "-20,500")):
    right = [plain, parts, parts.replace(",", "{,}"), parts.replace(",", "\\,")]
    right += [parts.replace(",", "\\!,"), parts.replace(",", "{,}\\!"), f"{parts}.0", f"${parts}$"]
    wrong = [plain[:-1], plain + "0", parts.replace(",", "."), parts.split(",")[0]]
    yield from each([plain, parts], right, wrong)


def decimals() -> Rows:
  for value, same, other in (
    ("0.5", [".5", "0.50", "0.500", "\\frac12", "1/2", "\\frac{2}{4}"], ["0.05", "5", "0.51"]),
    ("2.75", ["2.750", "\\frac{11}{4}", "11/4"], ["2.7", "2.8", "27.5", "275"]),
    ("-0.125", ["-.125", "-1/8", "-\\frac{1}{8}", "\u22120.125"], ["0.125", "-0.12", "-0.13"]),
    ("3.14", ["3.140", "\\frac{157}{50}"], ["\\pi", "3.1", "3.141"]),
    ("1234.5", ["1,234.5", "1{,}234.50", "\\frac{2469}{2}"], ["1234", "1235", "12345"]),
  ):
    yield from each(value, [value, *same], other)
  yield from each("\\frac{1}{3}", ["1/3"], ["0.3", "0.33", "0.333", "0.3333"])
  yield from each("\\frac{2}{3}", ["2/3"], ["0.66", "0.67", "0.667"])


def powers_of_ten() -> Rows:
  yield from each(
    "1200",
    ["1.2 \\times 10^3", "1.2\\cdot 10^{3}", "12 \\times 10^2", "1.2\\times10^{3}"],
    ["1.2 \\times 10^2", "1.2 \\times 10^4", "1.2", "12 \\times 10^{3}"],
  )
  yield from each(
    "3 \\times 10^{-4}",
    ["0.0003", "3\\cdot10^{-4}", "\\frac{3}{10000}", "30 \\times 10^{-5}"],
    ["0.003", "3 \\times 10^4", "30000", "0.00003"],
  )
  yield from each("10^6", ["1000000", "1,000,000", "10^{6}"], ["10^5", "100000", "60", "106"])
  yield from each("2^{10}", ["1024", "2^{10}", "4^5"], ["2^9", "20", "1000", "210"])


def fractions() -> Rows:
  for a, b in ((3, 4), (7, 2), (-5, 6), (22, 7), (1, 8), (9, 5)):
    sign, a_ = ("-", -a) if a < 0 else ("", a)
    right = [f"{sign}\\frac{{{a_}}}{{{b}}}", f"{sign}\\dfrac{{{a_}}}{{{b}}}", f"{a}/{b}"]
    right += [f"{sign}\\tfrac{{{a_}}}{{{b}}}", f"\\frac{{{2 * a}}}{{{2 * b}}}", f"{3 * a}/{3 * b}"]
    right += [f"\\frac{{{a}}}{{{b}}}", f"{a} / {b}", f"$\\frac{{{a}}}{{{b}}}$"]
    right += [f"{sign}\\cfrac{{{a_}}}{{{b}}}", f"\\left({a}/{b}\\right)"]
    if Fraction(a, b).denominator in (2, 4, 5, 8):
      right.append(str(a / b))
    if 0 < a < 10:
      right.append(f"\\frac{a}{b}")
    wrong = [f"\\frac{{{b}}}{{{a}}}", f"\\frac{{{-a}}}{{{b}}}", f"{a + 1}/{b}", f"{a}/{b + 1}"]
    wrong += [f"{a}", f"{a}{b}", f"{a}.{b}"]
    yield from each(f"\\frac{{{a}}}{{{b}}}", right, wrong)
  yield from each("\\frac{a}{b}", ["a/b", "\\frac{2a}{2b}"], ["\\frac{b}{a}", "ab", "a-b"])


def mixed_numbers() -> Rows:
  for whole, a, b in ((1, 1, 2), (3, 3, 4), (12, 2, 5)):
    top = whole * b + a
    right = [f"{whole}\\frac{{{a}}}{{{b}}}", f"{whole} \\frac{{{a}}}{{{b}}}", f"{top}/{b}"]
    right += [f"{whole} {a}/{b}", f"\\frac{{{top}}}{{{b}}}", str(top / b)]
    right += [f"{whole}+\\frac{{{a}}}{{{b}}}", f"{whole}\\dfrac{{{a}}}{{{b}}}"]
    wrong = [
      f"{whole}",
      f"\\frac{{{a}}}{{{b}}}",
      f"{whole * a}/{b}",
      f"{whole + 1}\\frac{{{a}}}{{{b}}}",
    ]
    yield from each([f"\\frac{{{top}}}{{{b}}}", f"{whole}\\frac{{{a}}}{{{b}}}"], right, wrong)


def percent() -> Rows:
  for n in ("25", "12.5", "150"):
    right = [f"{n}\\%", f"{n}%", f"{n} \\%", f"{n} %", f"{n}", f"{n} percent"]
    right += [f"{n}\\text{{ percent}}"]
    wrong = [f"1{n}\\%", f"{n}1%", f"-{n}\\%"]
    yield from each([f"{n}\\%", f"{n}%", n], right, wrong)
  yield from each("0.25", ["25\\%", "25%", "\\frac14"], ["25", "2.5\\%", "0.025"])
  yield from each("50\\%", ["0.5", "\\frac{1}{2}", "50"], ["0.05", "5", "\\frac{1}{5}", "500"])


def units() -> Rows:
  yield from each(
    ["18", "\\$18", "$18"],
    ["18", "\\$18", "$18", "\\$18.00", "18 dollars", "18\\text{ dollars}", "\\text{18 dollars}"],
    ["\\$17", "\\$1.80", "-\\$18", "81 dollars", "180\\text{ dollars}"],
  )
  for unit in ("cm", "km", "kg", "hours", "apples"):
    right = ["12", f"12 {unit}", f"12\\text{{ {unit}}}", f"12\\ \\text{{{unit}}}", f"12~{unit}"]
    right += [f"12\\,\\mathrm{{{unit}}}", f"12\\;\\text{{{unit}}}", f"12.0 {unit}", f"$12$ {unit}"]
    wrong = [f"13 {unit}", f"-12\\text{{ {unit}}}", f"1.2\\,\\mathrm{{{unit}}}", f"120 {unit}"]
    yield from each(["12", f"12\\text{{ {unit}}}", f"12 {unit}"], right, wrong)
  yield from each("12\\text{ cm}", [], ["12\\text{ m}", "12 km", "12\\,\\mathrm{mm}", "12 kg"])
  yield from each("90 minutes", ["90 min"], ["90 hours", "90 seconds"])
  squares = ["30\\text{ cm}^2", "30\\,\\text{cm}^2", "30\\ \\mathrm{cm}^{2}", "30"]
  yield from each(["30\\text{ cm}^2", "30"], squares, ["31\\text{ cm}^2", "3\\text{ cm}^2", "900"])
  yield from each("60", ["60 miles per hour", "60\\text{ mph}", "60 km/h"], ["6 km/h", "61 mph"])


def degrees() -> Rows:
  right = ["45^\\circ", "45^{\\circ}", "45", "45\\text{ degrees}", "45 degrees", "45\u00b0"]
  yield from each(["45^\\circ", "45"], right, ["54^\\circ", "4.5^\\circ", "-45^\\circ", "450"])


def surds() -> Rows:
  for truth, same, other in (
    ("\\sqrt{2}", ["2^{1/2}", "2^{\\frac12}", "\\sqrt2", "\\frac{2}{\\sqrt{2}}"], ["2", "1.41"]),
    ("2\\sqrt{2}", ["\\sqrt{8}", "2 \\sqrt 2", "2\\cdot\\sqrt{2}"], ["\\sqrt{2}", "4", "2.83"]),
    ("\\frac{\\sqrt{2}}{2}", ["\\frac{1}{\\sqrt{2}}", "\\sqrt{\\frac{1}{2}}", "\\sqrt{0.5}",
                              "\\sqrt{2}/2"], ["\\sqrt{2}", "\\frac{2}{\\sqrt{2}}", "0.7"]),
    ("3+\\sqrt{5}", ["\\sqrt{5}+3", "3 + \\sqrt 5"], ["3-\\sqrt{5}", "\\sqrt{8}", "3\\sqrt{5}"]),
    ("\\sqrt[3]{4}", ["4^{1/3}", "\\sqrt[3]4"], ["\\sqrt{4}", "3\\sqrt{4}", "2", "\\sqrt[4]{3}"]),
    ("5\\sqrt{3}-2", ["-2+5\\sqrt{3}", "\\sqrt{75}-2"], ["5\\sqrt{3}+2", "3\\sqrt{3}"]),
  ):  # fmt: skip
    yield from each(truth, [truth, f"${truth}$", f"x = {truth}", *same], [*other, f"-({truth})"])


def constants() -> Rows:
  yield from each(
    "2\\pi", ["2\\pi", "2 \\pi", "\\pi \\cdot 2", "2\\cdot\\pi"], ["\\pi", "6.28", "2"]
  )
  yield from each(
    "\\frac{\\pi}{3}", ["\\pi/3", "\\frac{2\\pi}{6}", "\\frac13\\pi"], ["\\frac{3}{\\pi}", "60"]
  )
  yield from each("e^2", ["e^{2}", "e\\cdot e", "\\exp(2)"], ["2e", "e", "7.4", "2^e"])
  yield from each("16\\pi", ["4^2\\pi", "16 \\pi", "16\\pi\\text{ cm}^2"], ["16", "8\\pi", "50.3"])
  yield from each("\\infty", ["+\\infty", "\\infty"], ["-\\infty", "0", "1000000"])
  yield from each("-\\infty", ["-\\infty", "- \\infty"], ["\\infty", "0"])


def functions() -> Rows:
  yield from each("\\ln 2", ["\\ln(2)", "\\ln{2}", "\\log_e 2"], ["\\log_{10} 2", "0.69", "\\ln 3"])
  yield from each("3", ["\\log_2 8", "\\log_{2} 8", "\\log_2(8)"], ["\\log_2 9", "\\log_3 8"])
  yield from each("120", ["5!", "5 \\cdot 4!"], ["4!", "6!", "5"])
  yield from each("10", ["\\binom{5}{2}", "\\binom52", "\\dbinom{5}{3}"], ["\\binom{5}{1}", "5/2"])
  yield from each("\\sin x", ["\\sin(x)", "\\sin{x}"], ["\\cos x", "\\sin(2x)", "x"])
  yield from each("\\frac{1}{2}", ["\\sin 30^\\circ", "\\cos\\frac{\\pi}{3}"], ["\\sin 60^\\circ"])
  yield from each("5", ["|-5|", "\\sqrt{25}", "\\lfloor 5.7 \\rfloor"], ["|-6|", "\\sqrt{5}"])


def polynomials() -> Rows:
  for truth, same, other in (
    ("(x+1)^2", ["x^2+2x+1", "1+2x+x^2", "(1+x)^2", "(x+1)(x+1)"], ["x^2+1", "(x-1)^2", "2x+1"]),
    ("x^2-4", ["(x-2)(x+2)", "-4+x^2", "x\\cdot x-4"], ["(x-2)^2", "x^2+4", "x-4"]),
    ("2x^3-6x", ["2x(x^2-3)", "-6x+2x^3"], ["2x^3+6x", "2x^2-6x", "x^3-3x"]),
    ("\\frac{x+1}{2}", ["0.5x+0.5", "\\frac{1}{2}(x+1)", "(x+1)/2"], ["\\frac{x-1}{2}", "x+1"]),
    ("3a+2b", ["2b+3a", "a+2(a+b)"], ["3b+2a", "5ab", "3a-2b"]),
    ("n(n+1)/2", ["\\frac{n^2+n}{2}", "\\frac{n(n+1)}{2}"], ["n(n-1)/2", "n^2/2", "n(n+1)"]),
    ("\\frac{1}{x}", ["x^{-1}", "1/x"], ["x", "-\\frac{1}{x}", "\\frac{1}{x^2}"]),
    ("2^{n+1}", ["2\\cdot 2^n", "2^{1+n}"], ["2^n+1", "2^{n-1}", "4^n"]),
  ):
    yield from each(truth, [truth, f"${truth}$", *same], other)


def equations() -> Rows:
  yield from each("3", ["x=3", "x = 3", "n=3", "x=3.0", "x = \\frac{6}{2}"], ["x=4", "x=-3", "3x"])
  yield from each("x=3", ["3", "x = 3"], ["x=4", "-3"])
  yield from each("y=2x+1", ["y = 2x + 1", "y=1+2x", "2x+1"], ["y=2x-1", "y=x+1", "2x"])
  yield from each("x^2+y^2=9", ["x^2 + y^2 = 9", "y^2+x^2=9"], ["x^2+y^2=3", "x^2-y^2=9"])
  yield from each("2x+3y=6", ["3y+2x=6", "2x+3y-6=0"], ["3x+2y=6", "2x+3y=5"])
  yield from each("2x+1", ["f(x)=2x+1", "y=2x+1"], ["f(x)=2x", "y=x+2"])


def points() -> Rows:
  for truth, same, other in (
    ("(1,2)", ["(1, 2)", "\\left(1,2\\right)", "\\left( 1, 2 \\right)", "(1.0,2)", "( 1 , 2 )"],
     ["(2,1)", "(1,3)", "(1,2,3)", "(-1,2)", "12", "1"]),
    ("(-3,\\frac12)", ["(-3, 0.5)", "\\left(-3,\\frac{1}{2}\\right)", "(-3,1/2)"],
     ["(3,\\frac12)", "(\\frac12,-3)", "(-3,2)", "-3"]),
    ("(0,0,5)", ["(0, 0, 5)", "\\left(0,0,5\\right)"], ["(0,5)", "(5,0,0)", "(0,0,-5)", "(0,0)"]),
    ("(\\sqrt{2},\\pi)", ["(\\sqrt2, \\pi)", "\\left(2^{1/2},\\pi\\right)"],
     ["(\\pi,\\sqrt{2})", "(2,\\pi)"]),
  ):  # fmt: skip
    yield from each(truth, [truth, f"${truth}$", *same], other)
  yield from each("(1,2)", ["(x,y)=(1,2)", "(x, y) = (1, 2)"], ["(x,y)=(2,1)"])


def sets() -> Rows:
  yield from each(
    "\\{1,2,3\\}",
    ["\\{1,2,3\\}", "\\{3,2,1\\}", "\\left\\{1, 2, 3\\right\\}", "\\{ 1 , 3 , 2 \\}",
     "\\{1,1,2,3\\}", "\\{1,2,\\frac{6}{2}\\}", "$\\{2,1,3\\}$"],
    ["\\{1,2\\}", "\\{1,2,3,4\\}", "\\{1,2,4\\}", "\\{-1,2,3\\}", "6", "\\{\\}", "1"],
  )  # fmt: skip
  yield from each(
    "\\{\\frac{1}{2}, -3\\}", ["\\{-3,0.5\\}", "\\{1/2,-3\\}"], ["\\{2,-3\\}", "\\{\\frac12,3\\}"]
  )
  yield from each("\\emptyset", ["\\emptyset", "\\varnothing", "\\{\\}"], ["0", "\\{0\\}", "1"])
  yield from each("\\{5\\}", ["\\{5\\}", "5", "x=5"], ["\\{6\\}", "\\{5,6\\}"])


def several_solutions() -> Rows:
  yield from each(
    ["1, 2", "1,2", "\\{1,2\\}", "x=1, x=2", "1 \\text{ and } 2"],
    ["1, 2", "2,1", "1,2", "1 and 2", "1\\text{ and }2", "x=1,x=2", "x=1 \\text{ or } x=2",
     "x=2, 1"],
    ["1", "2", "1,3", "1,2,3", "-1,-2", "x=1, x=3", "3"],
  )  # fmt: skip
  yield from each(
    ["2,-2", "\\pm 2"],
    ["-2,2", "\\pm 2", "\\pm2", "2, -2", "x=\\pm 2", "x = 2, x = -2"],
    ["2", "-2", "\\pm 4", "2,-3", "0"],
  )


def intervals() -> Rows:
  for truth, same, other in (
    ("[0,1)", ["[0, 1)", "\\left[0,1\\right)", "[0,1.0)"],
     ["(0,1)", "[0,1]", "(0,1]", "[0,2)", "[1,0)", "0", "1"]),
    ("(2,5)", ["(2, 5)", "\\left(2,5\\right)"], ["[2,5]", "[2,5)", "(2,6)", "(-2,5)"]),
    ("[-1,\\frac{3}{2}]", ["[-1, 1.5]", "\\left[-1,\\frac32\\right]"],
     ["(-1,\\frac32)", "[1,\\frac32]", "[-1,1.4]"]),
    ("(-\\infty,3]", ["(-\\infty, 3]", "\\left(-\\infty,3\\right]"],
     ["(-\\infty,3)", "[3,\\infty)", "(\\infty,3]", "(-\\infty,-3]", "3"]),
    ("(3,\\infty)", ["(3, \\infty)", "(3,+\\infty)", "\\left(3,\\infty\\right)"],
     ["[3,\\infty)", "(-\\infty,3)", "(4,\\infty)"]),
    ("(-\\infty,-1)\\cup(1,\\infty)",
     ["(-\\infty, -1) \\cup (1, \\infty)", "(1,\\infty)\\cup(-\\infty,-1)",
      "\\left(-\\infty,-1\\right)\\cup\\left(1,\\infty\\right)"],
     ["(-\\infty,-1]\\cup[1,\\infty)", "(-1,1)", "(1,\\infty)", "(-\\infty,\\infty)"]),
    ("[0,1]\\cup[2,3]", ["[2,3]\\cup[0,1]", "[0, 1] \\cup [2, 3]"],
     ["[0,3]", "[0,1]", "[0,1]\\cup[2,4]", "[0,1]\\cap[2,3]"]),
  ):  # fmt: skip
    yield from each(truth, [truth, f"${truth}$", f"x\\in{truth}", f"x \\in {truth}", *same], other)


def inequalities() -> Rows:
  yield from each("x>3", ["x > 3", "3<x", "x\\gt 3"], ["x\\ge 3", "x<3", "x>4", "3"])
  yield from each("x \\le -2", ["x\\leq -2", "-2\\geq x", "x \\leqslant -2"], ["x<-2", "x\\ge -2"])
  yield from each("0\\le x<1", ["0 \\leq x < 1"], ["0<x<1", "0\\le x\\le 1", "0\\le x<2"])
  yield from each("(3,\\infty)", ["x>3", "x > 3"], ["x\\ge 3", "x<3", "x>4"])
  yield from each("[0,1)", ["0\\le x<1", "0 \\leq x < 1"], ["0<x<1", "0\\le x\\le1"])
  yield from each("-1<x<2", ["(-1,2)", "-1 < x < 2"], ["[-1,2]", "(-2,1)", "-1\\le x<2"])


def words() -> Rows:
  for word, other in (("even", "odd"), ("Monday", "Tuesday"), ("yes", "no"), ("Evelyn", "Carla")):
    right = [word, f"\\text{{{word}}}", f"\\text{{ {word} }}", f"\\mathrm{{{word}}}"]
    right += [f"\\textbf{{{word}}}", f"{word}."]
    yield from each(
      [word, f"\\text{{{word}}}"], right, [other, f"\\text{{{other}}}", f"not {word}", "1", ""]
    )


def choices() -> Rows:
  for letter, other in (("A", "B"), ("C", "D")):
    right = [letter, f"({letter})", f"\\text{{{letter}}}", f"\\text{{({letter})}}", f"{letter}."]
    right += [f"\\textbf{{({letter})}}", f"\\mathrm{{({letter})}}"]
    wrong = [other, f"({other})", f"\\text{{({other})}}", f"{letter} or {other}", "1"]
    yield from each([letter, f"\\text{{({letter})}}", f"({letter})"], right, wrong)


def complex_numbers() -> Rows:
  yield from each(
    "3+4i", ["3+4i", "3 + 4i", "4i+3", "4\\cdot i+3"], ["3-4i", "4+3i", "3+4", "5", "3", "7i"]
  )
  yield from each("-i", ["-i", "- i", "0-i", "\\frac{1}{i}"], ["i", "-1", "1"])
  yield from each("2i", ["2i", "\\sqrt{-4}", "i\\cdot 2"], ["-2i", "2", "i^2"])


def matrices() -> Rows:
  def matrix(a: str, kind: str = "pmatrix") -> str:
    return f"\\begin{{{kind}}}{a}\\end{{{kind}}}"

  yield from each(
    matrix("1 & 2 \\\\ 3 & 4"),
    [matrix("1&2\\\\3&4"), matrix("1 & 2 \\\\ 3 & 4", "bmatrix"), matrix("1.0 & 2 \\\\ 3 & 4")],
    [matrix("1 & 3 \\\\ 2 & 4"), matrix("1 & 2 \\\\ 3 & 5"), matrix("1 & 2"), "4", "10"],
  )
  yield from each(
    matrix("-2 \\\\ \\frac12"),
    [matrix("-2\\\\0.5"), matrix("-2 \\\\ 1/2"), matrix("-2 \\\\ \\frac{1}{2}", "bmatrix")],
    [matrix("2 \\\\ \\frac12"), matrix("\\frac12 \\\\ -2"), "-2"],
  )


def responses() -> Rows:
  """Whole texts, as models write them."""
  for value, other in (("72", "71"), ("\\frac{5}{8}", "\\frac{8}{5}"), ("(1,2)", "(2,1)")):
    right = [
      f"We add both sides. So the answer is $\\boxed{{{value}}}$.",
      f"First I got \\boxed{{{other}}}, which is wrong. Correct: \\boxed{{{value}}}",
      f"Adding gives\n\\[ \\boxed{{{value}}} \\]",
      f"#### {value}",
      f"some steps\n#### {value}\n",
      f"\\boxed{{{other}}}\n#### {value}",
      f"\\fbox{{1}} and $\\boxed {{{value}}}$",
    ]
    wrong = [
      f"We might think ${value}$ but it is $\\boxed{{{other}}}$.",
      f"\\boxed{{{value}}} no, \\boxed{{{other}}}",
      f"#### {other}",
      f"\\boxed{{{value} \\text{{ or }} {other}}}",
      "I do not know.",
      "\\boxed{}",
      f"The value {value} is not it.\n#### ",
    ]
    yield from each(value, right, wrong)
  for text in ("The answer is 72.", "So there are 72 apples.", "24+48 = 72", "**Answer: 72**"):
    yield from each("72", [text], [text.replace("72", "73"), text.replace("72", "7.2")])


def nothing() -> Rows:
  blanks = [
    "",
    " ",
    "\n",
    "\\boxed{ }",
    "\\boxed",
    "####",
    "$",
    "?",
    "None",
    "N/A",
    "...",
    "{",
    "}",
  ]
  yield from each(["5", "\\frac{1}{2}", "(1,2)", "x+1"], [], blanks)


def second_round() -> Rows:
  """Written after the grader had been made to agree with the others: found what those had not."""
  yield from each(
    "17",
    [
      "17",
      "\\boldsymbol{17}",
      "17 \\text{ students}",
      "n = 17",
      "\\text{17 students}",
      "17\\,",
      "17\\quad",
      "\\displaystyle 17",
      "\\textbf{17}",
      "17 students.",
      "\\mathbf{17}",
    ],
    ["71", "17x", "-17", "17!", "\\frac{17}{2}", "17, 18", "1.7"],
  )
  yield from each(
    "\\frac{11}{36}",
    [
      "11/36",
      "\\dfrac{11}{36}",
      "\\frac{22}{72}",
      "\\displaystyle\\frac{11}{36}",
      "\\frac{11}{36}.",
      "P = \\frac{11}{36}",
      "\\frac {11}{36}",
      "$\\dfrac{11}{36}$",
    ],
    ["\\frac{36}{11}", "\\frac{11}{35}", "0.3", "0.306", "11", "\\frac{12}{36}"],
  )
  yield from each(
    "-\\frac{7}{4}",
    ["-7/4", "\\frac{-7}{4}", "\\frac{7}{-4}", "-1.75", "-1\\frac{3}{4}", "-\\dfrac74", "-1 3/4"],
    ["7/4", "1.75", "-4/7", "-\\frac{7}{5}", "-1.7"],
  )
  yield from each(
    "2,500",
    [
      "2500",
      "2,500",
      "2\\,500",
      "2{,}500",
      "\\$2,500",
      "\\$2{,}500.00",
      "2500.0",
      "2.5 \\times 10^3",
      "2,500 dollars",
    ],
    ["250", "25000", "2.500", "2,501", "-2500"],
  )
  yield from each(
    "6\\sqrt{5}",
    [
      "\\sqrt{180}",
      "6\\sqrt5",
      "6 \\cdot \\sqrt{5}",
      "\\sqrt{5}\\cdot 6",
      "6\\sqrt{5}\\text{ cm}",
      "6\\,\\sqrt{5}",
    ],
    ["5\\sqrt{6}", "6\\sqrt{3}", "30", "13.4", "\\sqrt{30}"],
  )
  yield from each(
    "x^2-5x+6",
    ["(x-2)(x-3)", "x^{2}-5x+6", "6-5x+x^2", "(x-3)(x-2)"],
    ["x^2+5x+6", "(x-1)(x-6)", "x^2-5x", "x^2-6x+5"],
  )
  yield from each(
    "(4,-1)",
    ["(4, -1)", "\\left(4,-1\\right)", "\\big(4,-1\\big)", "(4,\\,-1)", "(4.0,-1.0)"],
    ["(-1,4)", "(4,1)", "(-4,-1)", "4,1", "(4,-1,0)"],
  )
  yield from each(
    "\\left\\{-2, 0, \\frac{3}{2}\\right\\}",
    ["\\{0,-2,1.5\\}", "\\{-2,0,3/2\\}", "-2, 0, \\frac32", "x=-2, x=0, x=\\frac{3}{2}"],
    ["\\{-2,0\\}", "\\{2,0,1.5\\}", "\\{-2,0,\\frac23\\}"],
  )
  yield from each(
    "(-\\infty,-4]\\cup[4,\\infty)",
    [
      "[4,\\infty)\\cup(-\\infty,-4]",
      "(-\\infty,-4] \\cup [4,+\\infty)",
      "x \\le -4 \\text{ or } x \\ge 4",
    ],
    ["(-\\infty,-4)\\cup(4,\\infty)", "[-4,4]", "[4,\\infty)", "(-\\infty,4]"],
  )
  yield from each(
    "40\\%",
    ["40%", "40", "0.4", "\\frac{2}{5}", "40\\text{ percent}", "40.0\\%"],
    ["4\\%", "0.04", "60\\%", "-40\\%"],
  )
  yield from each("3:2", ["3:2", "3 : 2"], ["2:3", "3:4"])
  yield from each("10:30", ["10:30"], ["10:31", "1:30"])
  yield from each(
    "8\\pi+4", ["4+8\\pi", "4(2\\pi+1)", "8 \\pi + 4"], ["8\\pi", "8\\pi-4", "12\\pi", "29.1"]
  )
  yield from each(
    "\\tan^{-1}(2)", ["\\arctan 2", "\\arctan(2)", "\\tan^{-1} 2"], ["\\tan 2", "\\arctan 3"]
  )
  yield from each("e^{-x}", ["\\frac{1}{e^x}", "e^{-x}", "\\exp(-x)"], ["e^x", "-e^x", "e^{-2x}"])
  yield from each("-2+5i", ["5i-2", "-2 + 5i", "-(2-5i)"], ["2+5i", "-2-5i", "5-2i", "3"])
  yield from each(
    "\\text{(B)}",
    ["B", "(B)", "\\text{B}", "\\textbf{(B)}", "B.", "\\mathrm{B}", "\\textbf{(B) }"],
    ["C", "(A)", "\\text{(D)}"],
  )
  yield from each(
    "\\text{Saturday}",
    ["Saturday", "\\text{Saturday}", "saturday", "\\textbf{Saturday}"],
    ["Sunday", "\\text{Friday}"],
  )
  yield from each(
    "\\text{no solution}",
    ["\\text{no solution}", "no solution", "\\text{No solution}"],
    ["0", "\\text{one solution}"],
  )
  yield from each("1101_2", ["1101_2", "1101_{2}"], ["1011_2", "1101_3"])
  yield from each(
    "\\begin{pmatrix} 0 & -1 \\\\ 1 & 0 \\end{pmatrix}",
    [
      "\\begin{pmatrix}0&-1\\\\1&0\\end{pmatrix}",
      "\\begin{bmatrix} 0 & -1 \\\\ 1 & 0 \\end{bmatrix}",
      "\\left(\\begin{array}{cc} 0 & -1 \\\\ 1 & 0 \\end{array}\\right)",
    ],
    [
      "\\begin{pmatrix} 0 & 1 \\\\ -1 & 0 \\end{pmatrix}",
      "\\begin{pmatrix} 0 & -1 \\\\ 1 & 1 \\end{pmatrix}",
      "1",
    ],
  )
  yield from each(
    "25\\text{ km/h}",
    ["25", "25 km/h", "25\\text{ km/h}", "25 \\frac{\\text{km}}{\\text{h}}"],
    ["26\\text{ km/h}", "2.5", "25\\text{ m/s}"],
  )
  yield from each(
    "64\\text{ in}^3",
    ["64", "64\\text{ in}^3", "64 \\text{ cubic inches}", "64\\,\\text{in}^{3}"],
    ["46", "64\\text{ cm}^3", "640"],
  )
  yield from each("0.\\overline{3}", ["\\frac13", "1/3"], ["0.3", "0.33"])
  yield from each("x \\neq 2", ["x\\ne 2", "x \\neq 2"], ["x=2", "2", "x>2"])
  yield from each(
    "\\frac{x}{x+1}",
    ["x/(x+1)", "1-\\frac{1}{x+1}", "\\frac{2x}{2x+2}"],
    ["\\frac{x+1}{x}", "\\frac{x}{x-1}", "\\frac{1}{x+1}"],
  )
  yield from each(
    "y=\\frac12x-3",
    ["y = \\frac{x}{2} - 3", "y=0.5x-3", "y=\\frac{1}{2}x-3"],
    ["y=2x-3", "y=\\frac12x+3", "y=-\\frac12x-3"],
  )
