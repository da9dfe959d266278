"""Conversations in the inspector's data: turns put together, prompts in parts, nothing counted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.report.html import write_report
from atesd.report.load import load_study
from atesd.report.rollouts import CHARACTERS, attempts_of, pack_attempt, pack_rollouts, pack_row
from atesd.runlog import RunDir

from support.runs import write_run
from support.talks import HINT, PROBLEM, talk, talk_rows


def study_of(folder: Path, rows: list[dict[str, Any]]) -> Any:
    run = RunDir.create(folder / "run", {})
    run.write_rows("rollouts", 1, rows)
    return load_study([run.path])


def test_turns_of_an_attempt_are_put_together() -> None:
    rows = talk_rows()
    assert [len(attempt) for attempt in attempts_of(rows)] == [3, 2, 2]
    # a second first turn begins another attempt, even at the same problem; a turn that is missing breaks one
    assert [len(attempt) for attempt in attempts_of([rows[0], rows[0], rows[1]])] == [1, 2]
    assert [len(attempt) for attempt in attempts_of([rows[0], rows[2]])] == [1, 1]
    assert [len(attempt) for attempt in attempts_of([rows[0], rows[1] | {"problem_id": "other"}])] == [1, 1]
    assert [len(attempt) for attempt in attempts_of([{"problem_id": "p"}, {"problem_id": "p"}])] == [1, 1]


def test_a_conversation_has_its_turns_and_what_each_role_read_in_parts() -> None:
    packed = pack_attempt(talk_rows()[:3])
    assert {key: packed[key] for key in ("id", "problem", "hint", "reward", "ended", "invalid", "of", "stop")} == {
        "id": "doors-ab", "problem": PROBLEM, "hint": HINT, "reward": 1.0, "ended": "over", "invalid": 1, "of": 3,
        "stop": "eos",
    }  # fmt: skip
    assert not {"tokens", "streams", "teacher", "student"} & set(packed), "they are a turn's"
    turns = packed["turns"]
    assert [turn["observation"] for turn in turns] == ["a", "a4", "b"]
    assert [turn["tokens"] for turn in turns] == [["*", "<|end|>"], ["7", "<|end|>"], ["x", "<|end|>"]]
    assert [turn["streams"][0] for turn in turns] == [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]
    assert [turn["streams"][4] for turn in turns] == [[0.0, 1.0], [0.25, 0.5], [-0.4, 0.02]]
    later = ["*<|end|><|user|>a4<|assistant|>", "7<|end|><|user|>b<|assistant|>"]
    assert [turn["teacher"] for turn in turns] == [f"<|user|>ab#\n>{HINT}\na<|assistant|>", *later]
    assert [turn["student"] for turn in turns] == ["<|user|>ab#\na<|assistant|>", *later]
    assert [turn["anew"] for turn in turns] == [[], [], []]


def test_a_prompt_that_does_not_begin_with_the_one_before_is_whole() -> None:
    rows = talk_rows()[:2]
    rows[1] = rows[1] | {"teacher_prompt": "rewritten"}
    turn = pack_attempt(rows)["turns"][1]
    assert (turn["anew"], turn["teacher"]) == (["teacher"], "rewritten")
    assert turn["student"] == "*<|end|><|user|>a4<|assistant|>"


def test_an_attempt_that_was_cut_off_by_the_file_says_how_many_turns_it_had() -> None:
    packed = pack_attempt(talk_rows()[-2:])
    assert (len(packed["turns"]), packed["of"], packed["ended"], packed["invalid"]) == (2, 4, "hang", 2)


def test_a_conversation_of_one_turn_is_one_and_a_lone_completion_is_none() -> None:
    lone = talk([("a", "*")], ended="context", invalid=0, reward=0.0)[0]
    assert len(pack_attempt([lone])["turns"]) == 1
    assert pack_attempt([lone | {"observation": ""}]) == pack_row(lone | {"observation": ""})


def test_the_last_turn_says_whether_it_was_cut_at_the_length_limit() -> None:
    rows = talk([("a", "*"), ("a4", "7")], ended="length", invalid=0, reward=0.0)
    assert pack_attempt([rows[0], rows[1] | {"stop": "length"}])["stop"] == "length"


def test_long_observations_are_cut_and_say_so() -> None:
    row = talk([("a", "*"), ("o" * (CHARACTERS + 3), "7")], ended="over", invalid=0, reward=0.0)[1]
    (turn,) = pack_attempt([row])["turns"]
    assert turn["observation"].endswith("o ... (3 more characters)")


def test_completions_are_counted_and_all_of_them_scale_the_colours(tmp_path: Path) -> None:
    packed = pack_rollouts(study_of(tmp_path, talk_rows()))
    (step,) = packed["runs"][0]["steps"]
    assert [len(attempt["turns"]) for attempt in step["rows"]] == [3, 2, 2]
    assert (packed["shown"], packed["total"], packed["taught"]) == (7, 7, True)
    # ten divergences of distilled turns: .1 .1 .2 .2 .3 1 1 2 2 3; place .99 * 9 = 8.91 lies .91 of the way from 2 to 3
    assert packed["scale"] == pytest.approx(2.91)


@pytest.mark.parametrize(("place", "change", "field"), [
    (1, {"observation": 7}, "observation"),
    (2, {"turn": "3"}, "turn"),
    (0, {"invalid": -1}, "invalid"),
    (1, {"ended": None}, "ended"),
    (1, {"gate": [1.0]}, "gate"),
])  # fmt: skip
def test_a_damaged_turn_leaves_its_conversation_out_by_name(
    tmp_path: Path, place: int, change: dict[str, Any], field: str
) -> None:
    rows = talk_rows()
    rows[place] = rows[place] | change
    packed = pack_rollouts(study_of(tmp_path, rows))
    (note,) = packed["notes"]
    assert f"its field '{field}' is damaged" in note
    (step,) = packed["runs"][0]["steps"]
    lengths = [len(attempt["turns"]) for attempt in step["rows"]]
    assert lengths == ([2, 2, 2] if field == "turn" else [2, 2]), "a turn without a number stands alone"


def test_the_page_says_how_a_conversation_is_shown(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    run.write_rows("rollouts", 1, talk_rows())
    page = write_report([run.path], tmp_path / "talk.html").read_text()
    assert "A conversation is shown turn by turn" in page
    assert "7 of the 7 on disk" in page
    lone = write_run(tmp_path / "lone", steps=4, problems=2).path
    assert "A conversation is shown" not in write_report([lone], tmp_path / "lone.html").read_text()
