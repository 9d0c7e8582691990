"""Opening stores: URLs, schemas, migrations, namespaces, damage."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sqlite3
import threading

import pytest
import sqlalchemy as sa
from groups import content, group, keys

from trinity_jax.buffer import schema
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store, own_namespace
from trinity_jax.errors import UserError


def buffer_of(store, **kwargs):
  return ReplayBuffer(store, **{"capacity": 100, "order": "id", "tasks_per_step": 1} | kwargs)


@pytest.mark.parametrize("url", ["mysql://x", "redis", "postgresql", "sqlite3:///x", ""])
def test_urls_that_name_no_store(url, tmp_path):
  with pytest.raises(UserError, match="expected memory, sqlite, sqlite:///PATH or postgresql://"):
    open_store(url, tmp_path)


def test_sqlite_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for url, file in (("sqlite", "run/buffer.sqlite"), ("sqlite:///a/b.db", "a/b.db"),
                    (f"sqlite:///{tmp_path}/c.db", "c.db")):  # fmt: skip
    store = open_store(url, "run")
    assert (tmp_path / file).is_file() and store.place.endswith(file)
    store.close()


def test_durability_is_what_was_asked_for(tmp_path):
  for name, level in (("process", 1), ("power", 2)):
    store = open_store("sqlite", tmp_path / name, durability=name)
    read = lambda c: c.exec_driver_sql("PRAGMA synchronous").scalar_one()
    assert store.database.read(read) == level
    mode = lambda c: c.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    assert store.database.read(mode) == "wal"
    store.close()
  with pytest.raises(UserError, match="durability 'full': expected process or power"):
    open_store("sqlite", tmp_path, durability="full")


def test_every_selection_uses_an_index(shared):
  """No statement of put, sample, commit, restore or claim reads a whole table."""
  buffer = shared.buffer(order="priority", max_staleness=1, max_uses=2, tasks_per_step=1)
  database = buffer.store.database
  if database.postgres:
    pytest.skip("a planner that sees small tables reads them whole")
  seen = {}

  def note(connection, cursor, statement, parameters, context, many):
    if statement.split()[0] in ("SELECT", "UPDATE", "DELETE") and not many:
      seen[statement] = parameters

  sa.event.listen(database.engine, "before_cursor_execute", note)
  for step, order in enumerate(("priority", "id", "ready"), 1):
    other = buffer_of(buffer.store, order=order, max_staleness=5)
    batch = buffer.claim("a", 60).batch
    asyncio.run(other.put(group(batch, 0)))
    other.sample(1, step, 0)
    other.restore(step - 1)
    other.sample(1, step, 0)
    other.commit(step)
    other.stats()
  sa.event.remove(database.engine, "before_cursor_execute", note)
  assert len(seen) > 20
  with database.engine.connect() as c:
    for statement, parameters in seen.items():
      if "numbers" not in statement:  # a dozen rows
        plan = c.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
        scans = [r[3] for r in plan if r[3].startswith("SCAN")]
        assert not [s for s in scans if "INDEX" not in s and "CONSTANT ROW" not in s], statement


def test_a_newer_schema_is_refused(shared):
  store = shared.open()

  def newer(connection, _):
    numbers = schema.NUMBERS
    connection.execute(numbers.update().where(numbers.c.name == "schema").values(value=99))

  store.database.write(newer)
  with pytest.raises(UserError, match=r"schema is version 99, .* up to 1; upgrade trinity_jax"):
    shared.open()


def test_an_older_schema_is_migrated(shared):
  store = shared.open()
  asyncio.run(buffer_of(store).put(group(1, 0)))

  def add(connection):
    tables = connection.get_execution_options().get("schema_translate_map", {}).get(None)
    name = f"{tables}.groups" if tables else "groups"
    connection.execute(sa.text(f"ALTER TABLE {name} ADD COLUMN colour INTEGER DEFAULT 7"))

  steps = (*schema.MIGRATIONS, add)
  for _ in range(2):  # the second time there is nothing to do
    store.database.write(lambda c, _: schema.migrate(c, "here", steps))
    assert store.database.read(schema.schema_version) == 2
  assert keys(buffer_of(store).sample(1, 1, 0)) == [(1, 0)]

  def fails(connection):
    add(connection)

  with pytest.raises(Exception, match="colour"):
    store.database.write(lambda c, _: schema.migrate(c, "here", (*steps, fails)))
  assert store.database.read(schema.schema_version) == 2  # all or nothing


def test_processes_that_open_a_new_store_at_once(shared):
  errors = []

  def go():
    try:
      shared.open()
    except Exception as e:
      errors.append(e)

  threads = [threading.Thread(target=go) for _ in range(6)]
  for t in threads:
    t.start()
  for t in threads:
    t.join(60)
  assert not errors


def test_a_folder_has_a_namespace_of_its_own(server, tmp_path):
  one, again, two = (open_store(server.url, tmp_path / n) for n in ("one", "one", "two"))
  asyncio.run(buffer_of(one).put(group(1, 0)))
  assert [s.held(1) for s in (one, again, two)] == [{0}, {0}, set()]
  for store in (one, again, two):
    store.close()


def test_processes_that_ask_at_once_get_one_namespace(tmp_path):
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    names = set(pool.map(own_namespace, [tmp_path] * 64))
  assert len(names) == 1
  assert [p.name for p in tmp_path.iterdir()] == ["buffer.namespace"]


def test_namespaces_share_a_server(server, tmp_path):
  stores = [open_store(server.url, tmp_path, namespace=n) for n in ("Run one/1", "two")]
  asyncio.run(buffer_of(stores[0]).put(group(1, 0)))
  assert [s.stats().ready for s in stores] == [1, 0]
  assert all("tester" in s.place and n in s.place for s, n in zip(stores, ("Run one/1", "two")))
  for store in stores:
    store.close()


def test_a_file_that_is_no_database(tmp_path):
  (tmp_path / "buffer.sqlite").write_bytes(b"no database at all" * 100)
  with pytest.raises(UserError, match=r"buffer\.sqlite: is damaged or no database"):
    open_store("sqlite", tmp_path)


def test_a_damaged_record_is_named_and_the_others_stay(tmp_path):
  store = open_store("sqlite", tmp_path)
  buffer = buffer_of(store)
  for b in (1, 2):
    asyncio.run(buffer.put(group(b, 0)))
  with sqlite3.connect(tmp_path / "buffer.sqlite") as c:
    c.execute("UPDATE experiences SET data = substr(data, 1, 40) WHERE batch = 2 AND run = 1")
  c.close()
  assert content(buffer.sample(1, 1, 0)[0]) == content(group(1, 0)[0])
  with pytest.raises(UserError, match=r"buffer\.sqlite: experience 2/0/1/0 .* is damaged"):
    buffer.sample(1, 2, 0)
  assert buffer.stats()["ready"] == 1  # nobody has used it
  store.close()


def test_passwords_are_not_shown(server, tmp_path):
  store = open_store(server.url.replace("tester@", "tester:secret@"), tmp_path, namespace="p")
  assert "secret" not in store.place
  store.close()
