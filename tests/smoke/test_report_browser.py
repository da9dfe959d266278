"""The report in a real browser: nothing is fetched, nothing runs that a model wrote, and it fits a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atesd.report.html import write_report

from support.runs import ARMS, HOSTILE, write_compare, write_run
from support.visits import CHROMIUM, Visit

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, sync_playwright

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install one, such as Debian's chromium"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = (*ARMS, "composed")
    folder = write_compare(tmp_path_factory.mktemp("runs") / "cmp", arms=arms, steps=20, problems=12, hostile=True)
    return write_report([folder], folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def visits(browser: Browser, report: Path) -> Callable[..., Visit]:
    """Pages by width and scheme, opened once: drawing thirteen figures takes a while."""
    opened: dict[tuple[int, bool], Visit] = {}

    def visit(*, width: int, dark: bool = False) -> Visit:
        if (width, dark) not in opened:
            opened[width, dark] = Visit(browser, report, width=width, dark=dark)
            opened[width, dark].page.wait_for_selector("#figure-curves .main-svg")
        return opened[width, dark]

    return visit


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_quiet_and_fits(visits: Callable[..., Visit], width: int, dark: bool) -> None:
    visit = visits(width=width, dark=dark)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = visit.page.eval_on_selector_all(".plot", "plots => plots.map(p => p.querySelectorAll('.main-svg').length)")
    assert len(drawn) == 13
    assert all(drawn)
    assert visit.trouble == []


def test_result_tables_keep_the_numbers_of_their_intervals_in_view_on_a_phone(visits: Callable[..., Visit]) -> None:
    """What stands under a head of an interval lies whole inside the table's window, which nobody has scrolled."""
    visit = visits(width=390)
    cells = visit.page.evaluate("""() => [...document.querySelectorAll('#results .scroll')].flatMap((box, number) => {
        const edge = box.getBoundingClientRect();
        const heads = [...box.querySelectorAll('thead th')];
        const wanted = heads.flatMap((head, index) => /interval|over seeds/.test(head.textContent) ? [index] : []);
        return [...box.querySelectorAll('tr')].flatMap(row => wanted.map(index => {
            const cell = row.children[index], range = document.createRange();
            range.selectNodeContents(cell);
            const text = range.getBoundingClientRect();
            return {number, text: cell.textContent, seen: getComputedStyle(cell).display !== 'none',
                    left: text.left - edge.left, over: text.right - Math.min(edge.right, innerWidth)};
        }));
    })""")
    assert {cell["number"] for cell in cells} == {0, 1}, "results and paired differences"
    assert sum(" to " in cell["text"] for cell in cells) >= 4 * (len(ARMS) + 1), "both intervals of every row"
    for cell in cells:
        assert cell["seen"], cell
        assert cell["left"] >= 0, cell
        assert cell["over"] <= 0, cell
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_markup_in_a_completion_shows_as_text(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1280)
    assert HOSTILE in visit.page.locator(".tokens").inner_text()
    assert HOSTILE in visit.page.locator("#inspector pre").first.inner_text()
    assert visit.page.locator("img").count() == 0
    assert visit.page.locator("script").count() == 3
    assert visit.trouble == []


def test_a_stronger_divergence_has_a_stronger_colour(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1280)
    shares = visit.page.eval_on_selector_all(
        ".tokens span", "spans => spans.map(s => Number(s.style.getPropertyValue('--share') || 0))"
    )
    data = visit.page.evaluate("JSON.parse(document.getElementById('data').textContent).rollouts")
    divergence = data["runs"][0]["steps"][0]["rows"][0]["streams"][0]
    for share, value in zip(shares, divergence, strict=True):
        expected = min(1.0, value / data["scale"]) ** 0.5
        assert share == pytest.approx(expected if expected > 0.02 else 0.0, abs=1e-3)


def test_the_inspector_shows_the_chosen_completion_and_its_values(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1280)
    run, step, problem, colours = (visit.page.locator(".pickers select").nth(index) for index in range(4))
    run.select_option(label="learned, seed 2")
    step.select_option(index=0)
    problem.select_option(index=3)
    data = visit.page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).rollouts.runs"
        ".find(run => run.label === 'learned, seed 2').steps[0].rows[3]"
    )
    assert visit.page.locator("#inspector pre").nth(0).inner_text() == data["problem"]
    assert visit.page.locator("#inspector pre").nth(1).inner_text() == data["hint"]
    assert visit.page.locator(".tokens span").count() == len(data["tokens"])
    visit.page.locator('.tokens [data-token="4"]').hover()
    tooltip = visit.page.locator(".tooltip")
    shown = [cell.replace("\u2212", "-") for cell in tooltip.locator("td.number").all_inner_texts()]
    assert [float(cell) for cell in shown] == [stream[4] for stream in data["streams"]]
    visit.page.locator(".tokens").focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator(".tokens .chosen").get_attribute("data-token") == "5"
    visit.page.keyboard.press("Escape")
    assert tooltip.is_hidden()
    for index in (1, 2, 3, 4, 0):
        colours.select_option(index=index)
    # a run that has the same step stays at it
    run.select_option(label="full, seed 1")
    assert step.input_value() == "0"
    assert visit.trouble == []


@pytest.mark.parametrize("width", [1280, 390])
def test_tokens_show_the_losses_that_they_feed_in_words_too(visits: Callable[..., Visit], width: int) -> None:
    """The composed arm has one completion on every route, and of the distilled ones every second token selected."""
    visit = visits(width=width)
    run, step, problem, colours = (visit.page.locator(".pickers select").nth(index) for index in range(4))
    run.select_option(label="composed, seed 1")
    step.select_option(index=0)
    colours.focus()
    visit.page.keyboard.press("Home")
    for _ in range(2):
        visit.page.keyboard.press("ArrowDown")
    assert colours.locator("option:checked").inner_text() == "component: which losses it feeds"
    facts = visit.page.locator("#inspector .facts li")
    kinds = visit.page.locator(".kinds li")
    expected = [
        ("distilled", "distil", "none", ["distil", "none"]),
        ("reinforced", "rl", None, ["rl"]),
        ("distilled and reinforced", "distil, rl", None, ["rl", "both"]),
        ("trained on its reference", "nll", "none", ["nll"]),
        ("skipped", "none, not trained on", "none", ["none"]),
    ]
    for index, (route, components, advantage, names) in enumerate(expected):
        problem.select_option(index=index)
        shown = facts.all_inner_texts()
        assert shown[:2] == [f"Route of the group: {route}", f"Components: {components}"]
        if advantage is None:  # of a right and of a wrong completion
            assert shown[2] in {"Advantage: +0.968", "Advantage: \u22121.033"}
        else:
            assert shown[2] == f"Advantage: {advantage}"
        total = visit.page.locator(".tokens span").count()
        counts = [visit.page.locator(f".tokens span.kind-{name}").count() for name in names]
        assert sum(counts) == total
        legend = [text.split(": ") for text in kinds.all_inner_texts()]
        assert [text[0].split()[0] for text in legend] == names
        assert [text[1] for text in legend] == [f"{count} of {total} tokens" for count in counts]
        assert counts[0] == (total // 2 if names == ["rl", "both"] else (total + 1) // 2 if len(names) == 2 else total)
    # lines under the tokens differ besides the colour
    problem.select_option(index=2)
    lines = [
        visit.page.locator(f".tokens span.kind-{name}").first.evaluate("s => getComputedStyle(s).textDecorationLine")
        for name in ("rl", "both")
    ]
    assert lines == ["overline", "underline overline"]
    visit.page.locator(".tokens").focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator(".tooltip td").last.inner_text() == "distilled and reinforced"
    visit.page.keyboard.press("Escape")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    colours.select_option(index=0)
    assert visit.trouble == []


def test_gates_colour_tokens_by_their_weight(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1280)
    run, step, problem, colours = (visit.page.locator(".pickers select").nth(index) for index in range(4))
    run.select_option(label="composed, seed 1")
    step.select_option(index=0)
    problem.select_option(index=5)  # distilled
    colours.select_option(label="gate: weight in the distillation loss")
    gates = visit.page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).rollouts.runs"
        ".find(run => run.label === 'composed, seed 1').steps[0].rows[5].streams[4]"
    )
    spans = visit.page.locator(".tokens span")
    shares = spans.evaluate_all("all => all.map(s => Number(s.style.getPropertyValue('--share') || 0))")
    assert shares == pytest.approx([gate if gate > 0.02 else 0.0 for gate in gates], abs=1e-3)
    ignored = spans.evaluate_all("all => all.map(s => s.classList.contains('weightless'))")
    assert ignored == [gate == 0 for gate in gates]
    assert any(ignored)
    problem.select_option(index=1)  # reinforced: no teacher
    assert visit.page.locator(".scalebar").inner_text().startswith("No teacher scored this completion")
    assert "no teacher read" in visit.page.locator("#inspector pre").nth(1).inner_text()
    visit.page.locator('.tokens [data-token="1"]').hover()
    assert visit.page.locator(".tooltip td").all_inner_texts().count("n/a") == 3
    visit.page.keyboard.press("Escape")
    colours.select_option(index=0)
    assert visit.trouble == []


def test_a_tap_shows_values_inside_a_phone_screen(visits: Callable[..., Visit]) -> None:
    visit = visits(width=390)
    visit.page.locator('.tokens [data-token="2"]').tap()
    box = visit.page.locator(".tooltip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert visit.trouble == []


def test_an_arm_can_be_hidden_in_every_figure(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1280)
    lines = visit.page.locator("#figure-accuracy .scatterlayer .trace")
    assert lines.count() == 10  # a band and a line for each of five arms
    chip = visit.page.get_by_role("button", name="half")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert lines.count() == 8
    assert visit.page.locator("#figure-curves .scatterlayer .trace").count() == 4
    chip.click()
    assert lines.count() == 10
    assert visit.trouble == []


def test_a_masked_hint_is_as_dark_as_it_is_read(browser: Browser, tmp_path: Path) -> None:
    run, hints = write_run(tmp_path / "run", steps=2, problems=2), set()
    for file in (run.path / "rollouts").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            hint = row["hint"]
            hints.add(hint)
            shades = [[hint[:2], 1.0], [hint[2:4], 0.25], [hint[4:], 0.0]]
            row |= {"attended": [3, len(hint)], "shades": shades}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    visit = Visit(browser, write_report([run.path], tmp_path / "report.html"), width=390)
    parts = visit.page.locator("#inspector .shaded span")
    assert parts.count() == 3
    assert "".join(parts.all_text_contents()) in hints
    assert [parts.nth(index).get_attribute("title") for index in range(3)] == [
        f"reached by {share} % of layers and heads" for share in (100, 25, 0)
    ]
    grounds = [parts.nth(index).evaluate("e => getComputedStyle(e).backgroundColor") for index in range(3)]
    opacity = [float(ground.replace(")", "").split()[-1]) for ground in grounds]
    assert opacity[0] > opacity[1] > opacity[2] == 0
    assert "attention reaches 3 of" in visit.page.locator("#inspector h3").nth(1).inner_text()
    assert visit.trouble == []
