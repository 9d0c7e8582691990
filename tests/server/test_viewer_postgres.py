"""The viewer over runs whose buffer is in a real PostgreSQL server."""

from __future__ import annotations

import dataclasses
import json

import httpx
import made_up_run
import postgres
import pytest

from trinity_jax.config import base_config, resolve
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.server.viewer import Viewer
from trinity_jax.server.viewer.folder import Folder
from trinity_jax.server.viewer.index import Query
from trinity_jax.server.viewer.store_postgres import PostgresStore


@pytest.fixture(scope="module")
def server():
  if reason := postgres.missing():
    pytest.skip(reason)
  with postgres.server() as running:
    yield running


def write_config(folder, url, stages=True, **buffer):
  c = base_config()
  c.model.tiny, c.taskset.path = {"hidden": 32}, "unused"
  c.buffer.url = url
  c.buffer.update(buffer)
  if stages:  # the second has a buffer of its own, named as recipes name keys
    c.stages = ({"name": "grpo"}, {"name": "other", "buffer.url": "memory"})
  config = resolve(c)
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  return config


@pytest.fixture
def run(tmp_path, server):
  out = made_up_run.MadeUpRun(tmp_path / "run", url=server.url)
  write_config(out.folder, server.url)
  out.add(1)
  out.add(2, hostile=True)
  out.log(0, loss=1.0)
  yield out
  out.close()


def test_rollouts_are_read_from_the_server(run):
  with Viewer(run.folder) as viewer:
    headers = {"Authorization": f"Bearer {viewer.token}"}
    url = viewer.url.split("/#")[0] + "/api/"
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
      (stage,) = client.get("run").json()["stages"]
      assert (stage["groups"], stage["experiences"], stage["note"]) == (4, 12, "")

      def ids(**params):
        rows = client.get("rollouts", params={"stage": "grpo", **params}).json()["rows"]
        return [row["id"] for row in rows]

      assert ids(text="<SCRIPT>") == ["2/1/0/0", "2/0/0/0"]
      assert ids(reward_min=1.5, batch_max=1) == ["1/1/2/0", "1/0/2/0"]
      run.add(3)
      assert ids(batch_min=3, order="oldest")[0] == "3/0/0/0"
      found = client.get("rollout", params={"stage": "grpo", "id": "1/1/2/0"}).json()
      assert "".join(found["tokens"]["text"]) == "what is 1+1?2 of run 2"
      assert [row["id"] for row in found["group"]] == [f"1/1/{i}/0" for i in range(3)]
      gone = client.get("rollout", params={"stage": "grpo", "id": "9/9/9/9"})
      assert gone.status_code == 404
      big = client.get("rollout", params={"stage": "grpo", "id": f"1/{2**40}/0/0"})
      assert big.status_code == 404


def test_nothing_is_ever_written(run, server):
  import psycopg

  store = PostgresStore(server.url, (run.stage / "buffer.namespace").read_text())
  refused = "read-only transaction"
  with pytest.raises(RunFailed, match=refused), store.opened() as reader:
    reader._connection.execute("CREATE TABLE anything (a int)")
  with psycopg.connect(server.url) as other:
    assert other.execute("SELECT to_regclass('anything')").fetchone() == (None,)


def test_headers_longer_than_the_first_read_and_damaged_ones(run, server, monkeypatch):
  import psycopg

  monkeypatch.setattr("trinity_jax.server.viewer.store_postgres._FIRST", 20)
  namespace = (run.stage / "buffer.namespace").read_text()
  index = Folder(run.folder).index("grpo")
  assert index is not None and index.refresh()["experiences"] == 12
  assert index.search(Query(text="run 1"), 0, 9).total == 4
  with psycopg.connect(server.url) as other:
    for run_, data in enumerate((b"", b"\xff" * 99, (90).to_bytes(8, "little") + b"{")):
      other.execute(
        f"UPDATE {namespace}.experiences SET data = %s WHERE batch = 1 AND run = %s", (data, run_)
      )
    other.execute(f"UPDATE {namespace}.groups SET digest = '\\x00' WHERE batch = 1")
  assert index.refresh()["experiences"] == 6


@pytest.mark.parametrize("single", [False, True])
def test_a_namespace_that_the_config_names(tmp_path, server, single):
  stage = "run" if single else "grpo"
  namespace = f"mine{single}".lower()
  run = made_up_run.MadeUpRun(tmp_path / "run", url=server.url, namespace=f"{namespace}_{stage}")
  write_config(run.stage if single else run.folder, server.url, not single, namespace=namespace)
  run.add(1)
  run.log(0, loss=1.0)
  folder = Folder(run.stage if single else run.folder)
  assert not (run.stage / "buffer.namespace").exists()
  assert folder.describe(folder.stages()[0])["experiences"] == 6
  run.close()


def test_a_server_that_is_not_there_is_named_and_curves_are_shown(run, tmp_path):
  write_config(run.folder, "postgresql://me:pass-word@127.0.0.1:1/rollouts")
  folder = Folder(run.folder)
  note = folder.describe("grpo")["note"]
  assert "postgresql://me:***@127.0.0.1:1/rollouts" in note and "does the server run?" in note
  assert "pass-word" not in note
  assert folder.curves("grpo", ["loss"])["series"] == {"loss": [[0, 1.0]]}
  with Viewer(run.folder) as viewer:
    answer = httpx.get(
      viewer.url.split("/#")[0] + "/api/rollouts", params={"stage": "grpo"}, timeout=60,
      headers={"Authorization": f"Bearer {viewer.token}"},
    )  # fmt: skip
  assert answer.status_code == 503 and "cannot be read" in answer.json()["error"]


def test_what_the_config_does_not_say(run, server):
  (run.stage / "buffer.namespace").write_text('nobody"s')
  assert "holds no buffer of a run" in Folder(run.folder).describe("grpo")["note"]
  write_config(run.folder, "memory")
  assert "No rollouts are kept" in Folder(run.folder).describe("grpo")["note"]
  write_config(run.folder, "postgresql://host:port/name")
  with pytest.raises(UserError, match="no PostgreSQL URL"):
    Folder(run.folder).index("grpo")
  (run.folder / "config.json").write_text('{"bufer": {}}')
  assert "config.bufer: unknown key" in Folder(run.folder).describe("grpo")["note"]
