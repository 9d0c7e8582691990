"""The error of a kernel that was asked for what it cannot do."""


class CannotRun(ValueError):
  """A named implementation cannot serve these operands, or not on this platform; says why."""
