from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from atesd.report.html import embed_json, write_report
from atesd.runlog import RunDir

from support.runs import HOSTILE, write_compare, write_graded, write_run


class Page(HTMLParser):
    """Elements and script contents, as a browser's parser cuts them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def test_json_in_a_script_element_cannot_close_it_and_reads_back() -> None:
    value = {"text": f"{HOSTILE}<!-- \u2028 & 'x' \"y\""}
    text = embed_json(value)
    assert "<" not in text
    assert json.loads(text) == value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_compare(tmp_path_factory.mktemp("runs") / "cmp", steps=8, problems=4, hostile=True)
    about = json.loads((folder / "compare.json").read_text())
    renamed = "<script>alert(3)<"  # no slash: it names a folder
    (folder / "half").rename(folder / renamed)
    arms = {renamed if arm == "half" else arm: [HOSTILE] for arm in about["arms"]}
    (folder / "compare.json").write_text(json.dumps(about | {"arms": arms, "recipe": "<script>alert(4).toml"}))
    return write_report([folder], folder / "report.html").read_text()


def test_text_of_runs_adds_no_element(hostile: str) -> None:
    page = Page(hostile)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3  # the data, plotly.js and the page's own
    assert "img" not in tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(3)&lt;" in hostile
    shown = json.loads(page.scripts[0])["rollouts"]["runs"][0]["steps"][0]["rows"][0]
    assert HOSTILE in shown["tokens"]
    assert HOSTILE in shown["hint"]


def test_the_policy_allows_the_two_scripts_by_hash_and_nothing_else(hostile: str) -> None:
    page = Page(hostile)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes) or ""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == " ".join(f"'sha256-{value}'" for value in hashes)


def test_nothing_is_loaded_from_elsewhere(hostile: str) -> None:
    for tag, attributes in Page(hostile).tags:
        assert "src" not in attributes, tag
        assert tag != "link"
        assert (attributes.get("href") or "#").startswith("#")
    styles = re.search(r"<style>(.*?)</style>", hostile, re.DOTALL)
    assert styles is not None
    assert "url(" not in styles[1]
    assert "@import" not in styles[1]


def test_a_single_choice_names_its_run(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("composed",), seeds=(1,), steps=20, problems=3)
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert text.count('<div class="choice">Shown: composed, seed 1</div>') == 3  # routes, the cliff and credits


def test_the_file_is_bounded(hostile: str) -> None:
    assert len(hostile.encode()) < 8_000_000


def test_the_finding_states_the_numbers(tmp_path: Path) -> None:
    arms = {"full": {1: [[0.0, 1.0]]}, "learned": {1: [[1.0, 1.0]]}}
    text = write_report([write_graded(tmp_path / "cmp", arms)], tmp_path / "report.html").read_text()
    assert (
        "<strong>learned</strong> has the highest measured accuracy: it answers 100.0\u00a0% of held-out problems "
        "right, from 0.0\u00a0% before training. Learned exposure, in percentage points: "
        "+50.0 against full (+50.0 to +50.0)."
    ) in text


def test_the_finding_names_three_pairs_and_points_to_the_rest(tmp_path: Path) -> None:
    arms = {name: {1: [[1.0]]} for name in ("a", "b", "c", "d", "learned")}
    text = write_report([write_graded(tmp_path / "cmp", arms)], tmp_path / "report.html").read_text()
    finding = re.search(r'<p class="finding">(.*?)</p>', text)
    assert finding is not None
    assert re.findall(r"against (\w)", finding[1]) == ["a", "b", "c"]
    assert finding[1].endswith("The table below has the other pairs.")


def test_missing_sections_say_why(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path / "run", {}, {"exposure": "the whole solution (OPSD)"})
    text = write_report([folder.path], tmp_path / "deep" / "report.html").read_text()
    for reason in (
        "no complete run with graded answers",
        "no evaluation was written",
        "no step was logged",
        "no distillation step was logged",
        "no step with a teacher was logged",
        "every group was distilled, every token at full weight",
        "no run has an exposure that is learned from rewards, or ended before a decision was scored",
        "no completions were written",
    ):
        assert f"Left out: {reason}." in text
    assert "the teacher sees the whole solution (OPSD)" in text


def test_several_runs_share_a_page_without_paired_claims(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, arm="full", steps=4, problems=3).path for name in ("one", "two")]
    text = write_report(paths, tmp_path / "report.html").read_text()
    assert ">one</button>" in text
    assert ">two</button>" in text
    assert "Paired differences" not in text


def test_an_unfinished_comparison_is_reported_with_a_note(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("full",), seeds=(1,), steps=4, problems=3, finished=False)
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "full, seed 1: not finished" in text
    assert "No run is complete yet." in text


def test_the_planted_harm_is_stated_for_the_pico_task_only(tmp_path: Path) -> None:
    pico = write_compare(tmp_path / "pico", arms=("full",), seeds=(1,), steps=4, problems=3)
    other = write_graded(tmp_path / "other", {"full": {1: [[1.0]]}})
    assert "The harm of full exposure is planted here" in write_report([pico], tmp_path / "a.html").read_text()
    assert "planted" not in write_report([other], tmp_path / "b.html").read_text().split('<script type="app')[0]


def test_the_same_runs_give_the_same_file(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("learned",), steps=4, problems=3)
    first, second = (write_report([folder], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def finding_of(text: str) -> str:
    found = re.search(r'<p class="finding">(.*?)</p>', text)
    assert found is not None
    return found[1]


def test_the_finding_crowns_no_tie(tmp_path: Path) -> None:
    rewards: list[list[float | None]] = [[1.0, 1.0], [0.0, 0.0]]
    arms = {name: {1: rewards, 2: rewards} for name in ("a", "b", "c", "d")}
    text = write_report([write_graded(tmp_path / "cmp", arms)], tmp_path / "report.html").read_text()
    assert finding_of(text) == (
        "No arm is told apart from the highest: <strong>a</strong>, <strong>b</strong>, <strong>c</strong> and "
        "<strong>d</strong> answer 50.0\u00a0% of held-out problems right, from 0.0\u00a0% before training."
    )


def test_the_finding_names_those_that_share_the_top(tmp_path: Path) -> None:
    right: list[list[float | None]] = [[1.0, 1.0], [1.0, 1.0]]
    less: list[list[float | None]] = [[1.0, 1.0], [1.0, 0.0]]
    wrong: list[list[float | None]] = [[0.0, 0.0], [1.0, 0.0]]
    arms = {"low": {1: wrong, 2: wrong}, "near": {1: right, 2: less}, "top": {1: right, 2: right}}
    text = write_report([write_graded(tmp_path / "cmp", arms)], tmp_path / "report.html").read_text()
    # near: (1 + .75) / 2 = .875
    assert finding_of(text) == (
        "<strong>top</strong> and <strong>near</strong> are not told apart from the highest: they answer "
        "87.5\u00a0% to 100.0\u00a0% of held-out problems right, from 0.0\u00a0% before training."
    )


def test_half_a_surrogate_pair_in_a_title_is_written(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}})
    about = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(about | {"recipe": "\ud83d.toml"}))
    assert "<h1>?</h1>" in write_report([folder], tmp_path / "report.html").read_text()


def test_a_pair_whose_interval_holds_0_is_not_told_apart(tmp_path: Path) -> None:
    arms = {"full": {1: [[1.0, 0.0]]}, "learned": {1: [[0.0, 1.0]]}}
    text = write_report([write_graded(tmp_path / "cmp", arms)], tmp_path / "report.html").read_text()
    assert finding_of(text).endswith("+0.0 against full (+0.0 to +0.0, not told apart).")


def test_a_complete_run_without_its_last_evaluation_is_not_called_unfinished(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}, "half": {1: [[1.0]]}})
    (folder / "full" / "seed_1" / "eval" / "step_000010.jsonl").unlink()
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "<td class=muted colspan=3>no final accuracy</td>" in text
    assert "no complete run yet" not in text
