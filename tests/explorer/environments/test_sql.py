"""Questions in SQL: what is right, and what a query cannot do to its database or to us."""

from __future__ import annotations

import asyncio

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments.process import Processes
from trinity_jax.explorer.environments.sql import Sql
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.tasks import queries

TABLE = "create table t(a int, b text); insert into t values (1, 'x'), (2, 'y'), (3, 'x'), (3, 'x')"
FOREVER = "with recursive n(i) as (select 1 union all select i + 1 from n) select "


def database(reference="select a from t where b = 'x'", **options) -> Sql:
  return Sql(TABLE, "the question", reference, **options)


@pytest.mark.parametrize(
  ("query", "right"),
  [
    ("select a from t where b = 'x'", 1),
    ("SELECT a FROM t WHERE b <> 'y' ORDER BY a DESC;", 1),  # the order does not count
    ("Let me see.\n```sql\nselect a from t where b = 'x'\n```\n", 1),
    ("select 1.0 union all select 3 union all select 3.0", 1),
    ("select distinct a from t where b = 'x'", 0),  # how often does
    ("select a, b from t where b = 'x'", 0),
    ("select a from t", 0),
    ("select c from t", 0),
  ],
)
def test_the_last_result_is_compared(query, right):
  db = database()
  assert db.reset() == "the question"
  assert db.step(query).reward == 0
  end = db.step(" Submit\n")
  assert (end.reward, end.done) == (right, True)
  db.close()


def test_where_the_order_counts_and_what_sums_depend_on():
  db = database("select a from t order by a", ordered=True)
  for query, right in (("select a from t order by a", 1), ("select a from t order by -a", 0)):
    db.step(query)
    assert db.step("submit").reward == right
  db = database("select 0.1 + 0.2 + 0.3")
  db.step("select 0.3 + 0.2 + 0.1")
  assert db.step("submit").reward == 1


def test_nothing_asked_or_an_error_last_is_not_right():
  db = database("select a from t where 0")
  assert db.step("submit").reward == 0
  db.step("select a from t where 0")
  assert db.step("select").invalid and db.step("submit").reward == 0


def test_what_is_shown():
  db = database(show_rows=2)
  assert db.step("select * from t").observation == "1|x\n2|y\n(4 rows)"
  assert db.step("select null, x'00ff', 1.5").observation == "NULL|00ff|1.5"
  assert db.step("select a from t where 0").observation == "(no rows)"
  assert db.step("select c from t").observation == "error: no such column: c"
  long = db.step("select printf('%.5000c', 'x')").observation
  assert len(long) < 2050 and long.endswith("... (5000 characters)")


@pytest.mark.parametrize(
  ("query", "told"),
  [
    ("insert into t values (4, 'z')", "not authorized"),
    ("delete from t", "not authorized"),
    ("drop table t", "not authorized"),
    ("create temp table u(a)", "not authorized"),
    ("pragma query_only = off", "not authorized"),
    ("attach 'here.sqlite' as u", "not authorized"),
    ("vacuum into 'here.sqlite'", "authorization denied"),
    ("select load_extension('libc.so')", "not authorized"),
    ("select random()", "not authorized"),
    ("begin", "not authorized"),
    ("select 1; drop table t", "one statement at a time"),
    ("", "no query"),
    ("select '\ud800'", "surrogates not allowed"),
    ("select\x00 1", "null character"),
    (FOREVER + "max(i) from n", "takes more than 0.1 s"),
    (FOREVER + "i from n", "more than 1000 rows"),
    (FOREVER + "zeroblob(900000) from n", "or 1000000 characters"),
    ("select zeroblob(100000000)", "too big"),
    ("select " + "1 + " * 9000 + "1", "too large"),
  ],
)
def test_what_a_query_may_not(query, told, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  db = database(seconds=0.1)
  step = db.step(query)
  assert step.invalid and not step.done and told in step.observation, step.observation
  assert db.step("select count(*) from t").observation == "4"  # and it goes on
  assert not list(tmp_path.iterdir())
  db.close()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("create tabl", "q", "select 1"), "syntax error"),
    ((TABLE, "q", "select c from t"), "no such column"),
    ((TABLE, "q", "delete from t"), "not authorized"),
    ((TABLE, "q", ""), "no query"),
  ],
)
def test_rows_that_are_wrong(args, message):
  with pytest.raises(UserError, match=message):
    Sql(*args)
  with pytest.raises(UserError, match="max_rows = 0"):
    database(max_rows=0)


class Scripted:
  sampler = None

  def __init__(self, *lines, processes):
    self.lines, self.messages, self.total, self.processes = list(lines), [], 0.0, processes

  def reward(self, value):
    self.total += value

  async def chat(self, messages):
    self.messages = [*messages, {"role": "assistant", "content": self.lines[0]}]
    return self.lines.pop(0)


def test_the_recipes_rows_in_a_process_of_their_own():
  """The reference earns the reward; what the demonstrations often say mostly does not."""
  rows, processes, earned = queries.generate("eval", held_out=12), Processes(1), []
  try:
    for row in rows:
      task = Task(0, ({"role": "user", "content": row["prompt"]},), raw=row)
      for query in (row["answer"], row["answer"].partition(" WHERE")[0]):
        model = Scripted(query, "submit", processes=processes)
        asyncio.run(find_workflow("environment")(task, model))
        earned.append(model.total)
  finally:
    processes.close()
  assert earned[::2] == [1.0] * 12 and sum(earned[1::2]) <= 6
  assert processes.started >= 1
