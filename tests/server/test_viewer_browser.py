"""The rollout viewer's page in headless Chromium: what a person sees and does."""

from __future__ import annotations

import shutil

import made_up_run
import pytest

from trinity_jax.monitor.writers import JsonlWriter
from trinity_jax.server.viewer import Viewer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
  (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
if CHROMIUM is None:
  pytest.skip("there is no chromium on the PATH", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as driver:
    # No sandbox: it cannot be set up for root, as tests in containers run.
    out = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield out
    out.close()


@pytest.fixture
def run(tmp_path):
  out = made_up_run.MadeUpRun(tmp_path / "run<b>")
  out.add(1)
  out.add(2, hostile=True)
  for step in range(3):
    out.log(step, loss=1.0 / (step + 1), **{"reward/mean": step / 2, "other": 1.0})
  yield out
  out.close()


@pytest.fixture
def page(run, browser):
  """Of an open viewer; a message of the browser's console or an uncaught error fails the test."""
  problems = []
  with Viewer(run.folder) as viewer:
    out = browser.new_page(viewport={"width": 1400, "height": 1000})
    out.set_default_timeout(20_000)
    # A refused request is no mistake of the page, but the browser notes it.
    out.on("console", lambda m: problems.append(m.text) if "status of 400" not in m.text else None)
    out.on("pageerror", lambda error: problems.append(str(error)))
    out.goto(viewer.url)
    out.wait_for_selector("body[data-ready]")
    yield out
    out.close()
  assert not problems


def ids(page) -> list[str]:
  return [row.get_attribute("data-id") for row in page.query_selector_all("#rows tr")]


def wait_for_count(page, count: int) -> None:
  wait_for_text(page, "#count", f"{count} rollouts")


def wait_for_text(page, selector: str, text: str) -> None:
  playwright.expect(page.locator(selector)).to_have_text(text, timeout=20_000)


def test_curves_list_and_search(page):
  assert page.inner_text("#workdir") == "run<b>" and page.inner_text("#state") == "not finished"
  names = [f.get_attribute("data-metric") for f in page.query_selector_all("figure")]
  assert names == ["reward/mean", "loss"]
  assert page.get_attribute("figure[data-metric=loss] path", "d").count("L") == 2
  page.fill("#metric", "other")
  page.press("#metric", "Enter")
  page.wait_for_selector("figure[data-metric=other]")
  assert len(ids(page)) == 12 and ids(page)[0] == "2/1/2/0"
  page.fill("[name=text]", "of run 1")
  page.press("[name=text]", "Enter")
  wait_for_count(page, 4)
  page.fill("[name=batch_max]", "1")
  page.click("#filters button[type=submit]")
  wait_for_count(page, 2)
  page.select_option("[name=stop]", "length")
  wait_for_count(page, 0)
  page.click("#clear")
  wait_for_count(page, 12)
  page.fill("[name=reward_min]", "nonsense")
  page.click("#filters button[type=submit]")
  page.wait_for_selector("#error:not([hidden])")
  assert "reward_min = 'nonsense'; expected a number" in page.inner_text("#error")
  page.click("#defaults")  # what goes well does not hide it
  page.wait_for_selector("figure[data-metric=other]", state="detached")
  assert page.is_visible("#error")
  page.click("#clear")
  page.wait_for_selector("#error", state="hidden")


def test_turns_masks_and_colours(page):
  page.click("tr[data-id='1/1/2/0']")
  page.wait_for_selector("#tokens .tok")
  turns = page.query_selector_all("#tokens .turn")
  assert ["action" in t.get_attribute("class") for t in turns] == [False, True]
  assert turns[1].inner_text().replace("\n", "") == "policy2 of run 2"
  tokens = turns[1].query_selector_all(".tok")
  colour = "e => getComputedStyle(e).backgroundColor"
  red = [t.evaluate(colour) for t in tokens]
  assert len(set(red)) == len(tokens)  # each token's log-prob is another
  assert "log-prob -1.2 (p = 0.301)\nversion 0" in tokens[0].get_attribute("title")
  assert turns[0].query_selector(".tok").evaluate(colour) == "rgba(0, 0, 0, 0)"
  page.select_option("#colour", "versions")
  assert page.inner_text("#legend") == "version 0"
  page.select_option("#colour", "advantages")
  assert page.inner_text("#legend") == "not recorded for this rollout"
  page.click("#group button:nth-child(1)")
  wait_for_text(page, "#detail-id", "Rollout 1/1/0/0")


def test_hostile_text_is_only_text(page):
  page.click("tr[data-id='2/0/0/0']")
  page.wait_for_selector("#tokens .tok")
  page.click("details summary")
  messages = page.query_selector_all("#messages .message div")
  shown = made_up_run.HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\u0000")
  shown = shown.replace("\x1b", "\\u001b")
  assert [m.text_content() for m in messages] == [shown] * 4
  assert "<script>" in page.inner_text("#raw")
  assert page.title() == "run<b>: rollouts"
  assert page.evaluate("document.scripts.length") == 1
  assert page.evaluate("document.querySelectorAll('img, style, td > *').length") == 0
  turns = page.query_selector_all("#tokens .turn")
  assert len(turns) == 4 and page.is_visible("#tokens")


def test_the_page_follows_a_run_and_keeps_its_token_to_itself(page, run):
  assert "token" not in page.url
  wait_for_text(page, "#live", "following")
  run.add(3)
  run.log(3, loss=0.1)
  wait_for_count(page, 18)
  wait_for_text(page, "figure[data-metric=loss] b", "0.1")
  page.reload()  # the token is kept for this tab
  wait_for_count(page, 18)


def test_long_rollouts_come_in_parts(page, monkeypatch):
  monkeypatch.setattr("trinity_jax.server.viewer.records.TOKENS", 15)
  page.click("tr[data-id='1/1/2/0']")
  wait_for_text(page, "#token-note", "Tokens 1–15 of 22. ")
  assert page.locator("#tokens .tok").count() == 15
  page.click("#more")
  playwright.expect(page.locator("#tokens .tok")).to_have_count(22, timeout=20_000)
  assert page.locator("#tokens .turn").count() == 2 and not page.is_visible("#more")
  assert page.inner_text("#tokens .turn.action").replace("\n", "") == "policy2 of run 2"
  page.click("#group button:nth-child(1)")
  wait_for_text(page, "#detail-id", "Rollout 1/1/0/0")
  assert page.locator("#tokens .tok").count() == 15


def test_the_page_goes_on_to_the_next_stage_unless_one_was_chosen(page, run):
  def begin(name: str) -> None:
    writer = JsonlWriter(run.folder / name / "metrics.jsonl")
    writer.write(0, {"loss": 1.0})
    writer.close()

  wait_for_text(page, "#live", "following")
  run.stage.joinpath("buffer.sqlite").rename(run.folder / "moved")  # no rollouts to prefer
  begin("second")
  playwright.expect(page.locator("#stage")).to_have_value("second", timeout=20_000)
  page.select_option("#stage", "grpo")
  begin("third")
  playwright.expect(page.locator("#stage option")).to_have_count(3, timeout=20_000)
  assert page.input_value("#stage") == "grpo"
