"""A conversation in the report, in a real browser: turn by turn, the teacher's view beside it, on a phone below it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from atesd.report.html import write_report
from atesd.runlog import RunDir

from support.runs import HOSTILE
from support.talks import HINT, talk_rows
from support.visits import CHROMIUM, Visit

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Locator, sync_playwright

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install one, such as Debian's chromium"),
]
WIDE, PHONE = 1200, 390


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Visit]]:
    run = RunDir.create(tmp_path_factory.mktemp("runs") / "run", {})
    run.write_rows("rollouts", 1, talk_rows(hostile=HOSTILE + "long" * 60))
    report = write_report([run.path], run.path / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield {width: Visit(browser, report, width=width) for width in (WIDE, PHONE)}
        browser.close()


def chosen(visit: Visit, *, attempt: int = 0, colour: str = "divergence") -> Locator:
    _, _, problem, colours = (visit.page.locator(".pickers select").nth(index) for index in range(4))
    problem.select_option(index=attempt)
    colours.select_option(label=colour)
    return visit.page.locator(".turn")


def shares(box: Locator, name: str) -> list[float]:
    given = f"all => all.map(s => Number(s.style.getPropertyValue('{name}') || 0))"
    return [float(value) for value in box.locator(".tokens span").evaluate_all(given)]


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_a_conversation_shows_what_was_said_done_and_read_at_every_turn(visits: dict[int, Visit], width: int) -> None:
    visit = visits[width]
    turns = chosen(visit, attempt=0)
    assert turns.count() == 3
    heading = visit.page.locator("#inspector .wide h3").inner_text()
    assert heading == "The conversation: right, 3 turns, 1 invalid action; the environment ended it"
    said = [turn.locator("pre").first.inner_text() for turn in turns.all()]
    assert (said[0][:2], said[1:]) == ("a" + HOSTILE[0], ["a4", "b"])
    actions = [turn.locator(".tokens").inner_text() for turn in turns.all()]
    assert actions[0] == "*<|end|>"
    assert actions[1].startswith("7" + HOSTILE)
    assert actions[2] == "x<|end|>"
    views = [turn.locator(".view") for turn in turns.all()]
    assert [view.locator("mark").inner_text()[: len(HINT)] for view in views] == [HINT] * 3
    assert views[2].locator(".fresh").inner_text().endswith("<|end|><|user|>b<|assistant|>")
    whole = [row["teacher_prompt"] for row in talk_rows(hostile=HOSTILE + "long" * 60)[:3]]
    assert [view.text_content() for view in views] == whole
    student = turns.nth(1).locator("details")
    student.locator("summary").click()
    assert student.locator("pre").inner_text().endswith("*<|end|><|user|>a4<|assistant|>")
    student.locator("summary").click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.locator("img").count() == 0
    assert visit.trouble == []


def test_the_teachers_view_stands_beside_the_action_and_on_a_phone_below(visits: dict[int, Visit]) -> None:
    for width, beside in ((WIDE, True), (PHONE, False)):
        turn = chosen(visits[width]).nth(1)
        left, right = (turn.locator(":scope > div").nth(place).bounding_box() for place in (0, 1))
        assert left is not None
        assert right is not None
        assert (right["x"] >= left["x"] + left["width"]) is beside
        assert (right["y"] >= left["y"] + left["height"]) is not beside
        assert right["x"] + right["width"] <= width


def test_every_token_has_its_divergence_and_its_gate(visits: dict[int, Visit]) -> None:
    """The colour of n nats is (n / scale)^(1/2), capped; scale is 2.91 (test_talks.py). Bars are gates, unsigned."""
    turns = chosen(visits[WIDE])
    expected = [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]
    for turn, values in zip(turns.all(), expected, strict=True):
        assert shares(turn, "--share") == pytest.approx([min(1.0, value / 2.91) ** 0.5 for value in values], abs=1e-3)
    bars = [shares(turn, "--gate") for turn in turns.all()]
    assert bars == [[0.0, 1.0], [0.25, 0.5], [0.4, 0.02]]
    colours = (
        turns.nth(2).locator(".tokens span").evaluate_all("all => all.map(s => s.style.getPropertyValue('--bar'))")
    )
    assert colours == ["var(--rl)", "var(--distil)"], "a negative gate looks otherwise"
    # the means: (1 + .1) / 2 and (0 + 1) / 2; (3 + .3) / 2 and (-.4 + .02) / 2
    words = [turn.locator("p.muted").first.inner_text().replace("\u2212", "-") for turn in turns.all()]
    assert words[0] == "Mean over the action: divergence 0.55 nats, gate 0.5"
    assert words[2] == "Mean over the action: divergence 1.65 nats, gate -0.19"
    assert "pushed away" in visits[WIDE].page.locator(".scalebar").nth(1).inner_text()
    turns = chosen(visits[WIDE], colour="gate: weight in the distillation loss")
    assert shares(turns.nth(0), "--share") == [0.0, 1.0]
    assert turns.locator(".gated").count() == 0, "the gate is the colour already"


def test_a_tap_on_a_token_of_any_turn_shows_its_values(visits: dict[int, Visit]) -> None:
    visit = visits[PHONE]
    turns = chosen(visit)
    for place in (0, 2):
        turns.nth(place).locator('[data-token="0"]').tap()
        cells = visit.page.locator(".tooltip td.number").all_inner_texts()
        assert float(cells[0]) == place + 1
    assert visit.page.locator(".tokens .chosen").count() == 1, "the token of the turn before is let go"
    box = visit.page.locator(".tooltip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE


def test_an_attempt_without_a_teacher_and_one_that_was_not_kept_whole_say_so(visits: dict[int, Visit]) -> None:
    visit = visits[WIDE]
    turns = chosen(visit, attempt=1, colour="component: which losses it feeds")
    assert turns.locator("text=No teacher read this turn.").count() == 2
    assert visit.page.locator(".kinds li").all_inner_texts() == ["rl reinforced by the reward: 4 of 4 tokens"]
    chosen(visit, attempt=2)
    heading = visit.page.locator("#inspector .wide h3").inner_text()
    assert heading == (
        "The conversation: not gradable, the first 2 of 4 turns, 2 invalid actions; "
        "the environment did not answer in time"
    )
    names = visit.page.locator(".pickers select").nth(2).locator("option").all_inner_texts()
    assert names[0] == "1: doors-ab, two, right, 3 turns, distil + rl"
    assert visit.trouble == []
