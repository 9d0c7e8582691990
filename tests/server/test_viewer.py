"""What the rollout viewer answers, over HTTP."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import tomllib
from pathlib import Path

import httpx
import made_up_run
import pytest

from trinity_jax.errors import UserError
from trinity_jax.server.viewer import Viewer
from trinity_jax.server.viewer.app import STATIC
from trinity_jax.server.viewer.folder import Folder, _thin
from trinity_jax.server.viewer.index import Index, Query
from trinity_jax.server.viewer.stores import SqliteStore


@pytest.fixture
def run(tmp_path):
  out = made_up_run.MadeUpRun(tmp_path / "run")
  out.add(1)
  out.add(2, hostile=True)
  for step in range(3):
    out.log(step, loss=1.0 / (step + 1), entropy=float("nan"))
  yield out
  out.close()


@pytest.fixture
def viewer(run):
  with Viewer(run.folder) as out:
    yield out


def ask(viewer: Viewer, path: str, token: str | None = None, **params) -> httpx.Response:
  token = viewer.token if token is None else token
  url = viewer.url.split("/#")[0] + path
  return httpx.get(url, params=params, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def ids(viewer: Viewer, **params) -> list[str]:
  found = ask(viewer, "/api/rollouts", stage="grpo", **params)
  assert found.status_code == 200, found.text
  return [row["id"] for row in found.json()["rows"]]


def test_nothing_of_the_run_without_the_token(viewer):
  for name in ("run", "curves", "rollouts", "rollout", "changes"):
    for token in ("-", "x" * 32, viewer.token[:-1], viewer.token + "x"):
      answer = ask(viewer, f"/api/{name}", token)
      assert answer.status_code == 401 and list(answer.json()) == ["error"]
  page = ask(viewer, "/", token="-")
  assert page.status_code == 200 and "grpo" not in page.text and viewer.token not in page.text
  assert "script-src 'self'" in page.headers["content-security-policy"]
  assert ask(viewer, "/../launch/view.py", token="-").status_code == 404
  elsewhere = httpx.get(viewer.url.split("/#")[0], headers={"Host": "evil.example"})
  assert elsewhere.status_code == 400


def test_stages_and_curves(viewer, run):
  (stage,) = ask(viewer, "/api/run").json()["stages"]
  assert stage["name"] == "grpo" and not stage["finished"]
  assert (stage["groups"], stage["experiences"], stage["deleted"]) == (4, 12, 0)
  found = ask(viewer, "/api/curves", stage="grpo", names="loss,entropy,missing").json()
  assert found["series"] == {"loss": [[0, 1.0], [1, 0.5], [2, 1 / 3]], "entropy": [], "missing": []}
  assert found["names"] == ["loss"]
  (run.stage / "stage.json").write_text("{}")
  assert ask(viewer, "/api/run").json()["stages"][0]["finished"]


def test_filters_orders_and_pages(viewer):
  assert len(ids(viewer)) == 12
  assert ids(viewer)[0] == "2/1/2/0" and ids(viewer, order="oldest")[0] == "1/0/0/0"
  assert ids(viewer, order="lowest")[-1] == "2/1/2/0"
  assert ids(viewer, reward_min=1.5, batch_max=1) == ["1/1/2/0", "1/0/2/0"]
  assert ids(viewer, reward_max=0.5, task=1) == ["2/1/0/0", "1/1/0/0"]
  assert ids(viewer, stop="length", batch_min=2) == ["2/1/2/0", "2/0/2/0"]
  assert ids(viewer, text="OF RUN 1", batch_min=2) == ["2/1/1/0", "2/0/1/0"]
  assert ids(viewer, text="<SCRIPT>") == ["2/1/0/0", "2/0/0/0"]
  assert ids(viewer, text="no such text") == []
  pages = [ids(viewer, offset=i, limit=5) for i in (0, 5, 10, 15)]
  assert [len(p) for p in pages] == [5, 5, 2, 0] and sum(pages, []) == ids(viewer)


def test_a_rollout_with_its_tokens(viewer):
  found = ask(viewer, "/api/rollout", stage="grpo", id="1/1/2/0").json()
  tokens = found["tokens"]
  assert "".join(tokens["text"]) == "what is 1+1?2 of run 2"
  sampled = [t for t, action in zip(tokens["text"], tokens["action"]) if action]
  assert "".join(sampled) == "2 of run 2" and found["num_actions"] == len(sampled)
  assert tokens["versions"] == [-1] * 12 + [0] * 10
  assert tokens["logprobs"][-1] == pytest.approx(-2.1)
  assert [row["id"] for row in found["group"]] == [f"1/1/{run}/0" for run in range(3)]


def test_bad_requests_are_explained(viewer):
  huge = 10**30
  for path, params, status, message in (
    ("rollouts", {"stage": "../run"}, 400, "stage '../run' does not exist; there are: grpo"),
    ("rollouts", {"reward_min": "much"}, 400, "reward_min = 'much'; expected a number"),
    ("rollouts", {"order": "best"}, 400, "order = 'best'; expected one of"),
    ("rollouts", {"stop": "bored"}, 400, "stop = 'bored'; expected one of"),
    ("rollouts", {"limit": "9" * 5000}, 400, "limit = "),
    ("rollout", {"id": "1/2"}, 400, "expected step/task/run/step"),
    ("rollout", {"id": "9/9/9/9"}, 404, "not stored"),
    ("rollout", {"id": f"{huge}/0/0/0"}, 404, "not stored"),
    ("rollout", {"id": f"{-huge}/0/0/0"}, 404, "not stored"),
  ):
    answer = ask(viewer, f"/api/{path}", **{"stage": "grpo", **params})
    assert answer.status_code == status and message in answer.json()["error"], params


def test_a_growing_run_is_followed(viewer, run):
  """The stream tells of what was written; what was indexed before is not read again."""
  assert len(ids(viewer)) == 12
  url, header = viewer.url.split("/#")[0], {"Authorization": f"Bearer {viewer.token}"}
  with httpx.stream("GET", f"{url}/api/changes", headers=header, timeout=60) as stream:
    lines = stream.iter_lines()
    assert json.loads(next(lines)) == {"changed": False}
    run.add(3)
    assert json.loads(next(lines)) == {"changed": True}
  assert ids(viewer, batch_min=3, order="oldest")[0] == "3/0/0/0"


def test_closing_ends_open_streams(run):
  viewer = Viewer(run.folder).start()
  url, header = viewer.url.split("/#")[0], {"Authorization": f"Bearer {viewer.token}"}
  with httpx.stream("GET", f"{url}/api/changes", headers=header, timeout=60) as stream:
    assert json.loads(next(stream.iter_lines())) == {"changed": False}
    viewer.close()
  assert not [t for t in threading.enumerate() if t.name == "viewer"]


def test_deleted_rollouts_are_said_to_be(tmp_path):
  run = made_up_run.MadeUpRun(tmp_path / "run", keep=False)
  run.add(1)
  run.add(2)
  run.train(1)
  stage = Folder(run.folder).describe("grpo")
  assert (stage["groups"], stage["deleted"], stage["experiences"]) == (4, 2, 6)
  assert "2 of 4 groups" in stage["note"] and "buffer.keep=True" in stage["note"]
  run.close()


def test_what_changes_is_indexed_anew(run):
  """As after a resume, which takes back what an unfinished step had."""
  index = Index(SqliteStore(run.stage / "buffer.sqlite"))
  first = index.refresh()
  assert index.refresh()["generation"] == first["generation"]
  other = sqlite3.connect(run.stage / "buffer.sqlite")
  other.execute("DELETE FROM groups WHERE batch = 2")
  other.execute("DELETE FROM experiences WHERE batch = 2")
  other.execute("UPDATE experiences SET data = x'00' WHERE run = 0")  # damaged records
  other.execute("UPDATE groups SET digest = x'00'")
  other.commit()
  other.close()
  assert index.refresh()["experiences"] == 4
  assert index.search(Query(), 0, 9).total == 4


def test_a_stage_without_rollouts_and_a_folder_that_is_a_stage(run, tmp_path):
  shutil.copytree(run.stage, tmp_path / "alone", ignore=shutil.ignore_patterns("buffer*"))
  folder = Folder(tmp_path / "alone")
  assert folder.stages() == ["."]
  assert "No rollouts are kept" in folder.describe(".")["note"] and folder.index(".") is None
  assert Folder(run.stage).pieces(".", [30])[1].endswith("model")  # beside the stage
  (tmp_path / "alone" / "buffer.sqlite").write_bytes(b"no database" * 100)
  assert "is no buffer of a run" in folder.describe(".")["note"]
  with pytest.raises(UserError, match="is no buffer of a run"):
    Index(SqliteStore(tmp_path / "alone" / "buffer.sqlite")).refresh()
  with pytest.raises(UserError, match="is no folder"):
    Folder(tmp_path / "nowhere")


def test_long_curves_keep_their_spikes():
  points = [[step, 0.0] for step in range(10_000)]
  points[4321][1] = 7.0
  thin = _thin(points, 600)
  assert len(thin) <= 600 and [4321, 7.0] in thin
  assert thin == sorted(thin)


def test_tokens_that_are_parts_of_a_character(run):
  text = "a\u00e9\U0001f600b"
  ids = run.tokenizer.encode(text).ids
  pieces, _ = Folder(run.folder).pieces("grpo", [*ids, ids[1], ids[0], ids[1]])
  assert pieces == ["a", "\u00e9", "", "\U0001f600", "", "", "", "b", "\ufffd", "a", "\ufffd"]


def test_the_pages_files_are_packaged():
  root = Path(__file__).parents[2]
  project = tomllib.loads((root / "pyproject.toml").read_text())
  patterns = project["tool"]["setuptools"]["package-data"]["trinity_jax.server.viewer"]
  assert all(any(Path(name).match(p) for p in patterns) for name in STATIC.values())
  assert all((root / "trinity_jax/server/viewer" / name).is_file() for name in STATIC.values())


def test_an_address_in_use_is_an_error_of_the_user(viewer, run):
  port = int(viewer.url.split(":")[2].split("/")[0])
  with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}.*another --port"):
    Viewer(run.folder, port=port)
