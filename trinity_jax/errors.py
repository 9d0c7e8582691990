"""Errors a user can cause, told apart from bugs of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in what the user gave us: config, dataset row, checkpoint, request.

  The message is one line that names the thing, the value, what was expected and the fix. The
  launcher prints it without a traceback (unless --debug) and exits with a non-zero code.
  """


class RunFailed(RuntimeError):
  """A run that had to stop: a dead thread, an expired wait, numbers that went wrong.

  Says who was waited for and where to look.

  Args:
    cause: what it is the news of, where it is not raised from there.
  """

  def __init__(self, message: str, cause: BaseException | None = None):
    super().__init__(message)
    self.__cause__ = cause


def suggestion(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for a near miss, or the list of known names."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def root_cause(error: BaseException) -> BaseException:
  """Returns what an exception group is about: its only kind of content, however deep, or itself."""
  while isinstance(error, BaseExceptionGroup) and len({type(e) for e in error.exceptions}) == 1:
    error = error.exceptions[0]
  return error
