"""Rows whose texts could pass for control are named: set, file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from atesd.exposure.prompt import OPSD_TEACHER, PromptConfig
from atesd.facts import RunFacts
from atesd.tasks.files import Columns, JsonlConfig
from atesd.tasks.kinds import PicoConfig
from atesd.tasks.texts import control_look, fence_flaw, fences, flaws, overlong, refuse_texts, unread
from atesd.types import Problem, UserError

BEGIN, CLOSE = "=== Reference Solution Begin ===", "=== Reference Solution End ==="


def spells_end(text: str) -> str | None:
    return "spells <end>" if "<end>" in text else None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OPSD_TEACHER, [BEGIN, CLOSE]),
        ("{problem}\n>{hint}", []),  # pico's: `>` introduces, nothing follows
        ("{problem}\nSolution: {hint}\n\n---\nGo on.", ["---"]),
        ("{problem}\n<solution>{hint}</solution>\nGo on.", ["</solution>"]),
        ("{problem}\n```\n{hint}\n```\n", ["```", "```"]),
        ("{hint}\nNow solve: {problem}", []),  # a line with a placeholder differs between problems
        ("{hint}\n.\n", []),  # too short to be told from text
        ("no hint", []),
    ],
)
def test_fences_are_what_stands_around_the_hint(template: str, expected: list[str]) -> None:
    assert fences(template) == expected


@pytest.mark.parametrize(
    ("text", "fence", "is_found"),
    [
        (f"so 9\n{CLOSE}\nignore that", CLOSE, True),
        (f"so 9 {CLOSE} ignore that", CLOSE, True),
        ("so 9\n  Now solve it.  \nagain", "Now solve it.", True),
        ("so 9. Now solve it. Again", "Now solve it.", False),  # words may stand in a sentence
        ("so 9", CLOSE, False),
    ],
)
def test_a_fence_of_words_counts_on_its_own_line_others_anywhere(text: str, fence: str, is_found: bool) -> None:
    found = fence_flaw(text, [BEGIN, fence])
    assert (found is not None) == is_found
    assert found is None or (repr(fence) in found and "prompt.teacher" in found)


def test_every_text_of_every_set_is_read_and_named() -> None:
    good = Problem("g", "1+1?", "2", "2")
    sets = {
        "train": [good, Problem("a", "<end>?", "2", None)],
        "probe": [Problem("b", "?", "<end>", "2"), good],
        "evaluation": [Problem("c", "?", "2", "<end>"), Problem("d", "?", f"2\n{BEGIN}")],
    }
    found = list(flaws(PicoConfig().build(RunFacts()), sets, spells_end, fences(OPSD_TEACHER)))
    assert [line.partition(":")[0] for line in found] == [
        "train problem 'a', problem",
        "probe problem 'b', solution",
        "evaluation problem 'c', answer",
        "evaluation problem 'd', solution",
    ]
    with pytest.raises(UserError, match=r"^train problem 'a', problem: spells <end>\n"):
        refuse_texts(None, sets, spells_end)
    refuse_texts(None, {"train": [good]}, spells_end, fences(PromptConfig().teacher))


def test_ten_rows_are_named_and_the_others_counted() -> None:
    problems = [Problem(str(number), "<end>", "s") for number in range(12)]
    with pytest.raises(UserError) as caught:
        refuse_texts(None, {"train": problems}, spells_end)
    assert len(str(caught.value).splitlines()) == 11
    assert str(caught.value).endswith("\nand 2 more")


def test_a_file_names_line_and_column_whatever_the_split(tmp_path: Path) -> None:
    for name, total in (("a", 6), ("b", 3)):
        rows = [
            {"q": f"{name}{n}?", "cot": "<end>" if n == 1 else "s", "answer": n, "id": f"{name}{n}"}
            for n in range(total)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    config = JsonlConfig(
        path=str(tmp_path / "a.jsonl"),
        eval_path=str(tmp_path / "b.jsonl"),
        columns=Columns(problem="q", solution="cot"),
        probe_size=2,
    )
    task = config.build(RunFacts())
    sets = {"train": task.train(), "probe": task.probe(), "evaluation": task.evaluation()}
    # the second object of each file, behind an empty line
    assert sorted(flaws(task, sets, spells_end)) == [
        f"{tmp_path}/{name}.jsonl:3: field 'cot': spells <end>" for name in ("a", "b")
    ]


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<\uff5cAssistant\uff5c>", "</s>", "<eos>", "<end_of_turn>", "[/INST]", "<</SYS>>", "<|end|>"],
)
def test_spellings_of_known_models_look_like_control(text: str) -> None:
    assert repr(text) in str(control_look(f"1+1={text}2"))


@pytest.mark.parametrize("text", ["a < b > c", "|x| < 3", "f<|x|", "<p>html</p>", "[1, 2]", "P(A|B) > 0", "<|a|<|b|"])
def test_mathematics_does_not(text: str) -> None:
    assert control_look(text) is None


def letters_beyond(known: str) -> Callable[[str], list[str]]:
    return lambda text: [letter for letter in text if letter not in known]


def test_what_a_tokenizer_does_not_know_is_named_and_counted() -> None:
    problems = [Problem("a", "1+1", "2"), Problem("b", "xy", "3"), Problem("c", "1", "yz")]
    assert unread(problems, letters_beyond("123+xyz")) is None
    assert unread([], letters_beyond("")) is None
    said = str(unread(problems, letters_beyond("123+")))
    assert "knows no token for 'x', 'y', 'z', which 2 of 3 problems hold" in said
    many = str(unread([Problem("a", "abcdefghijkl", "1")], letters_beyond("1")))
    assert "'i', 'j' ..., which 1 of 1 problems" in many


def test_of_many_problems_some_from_all_over_are_looked_at() -> None:
    problems = [Problem(str(index), "?" if index >= 240 else "1", "1") for index in range(250)]
    seen: list[str] = []

    def unknown(text: str) -> list[str]:
        seen.append(text)
        return letters_beyond("1")(text)

    assert "which 4 of 84 problems hold" in str(unread(problems, unknown))  # every third: 240, 243, 246, 249
    assert len(seen) == 2 * 84


def test_problems_beyond_a_models_context_are_named_with_their_lengths() -> None:
    sets = {
        "train": [Problem("fits", "12", "345"), Problem("long", "12", "3456")],
        "probe": [Problem("longer", "123", "3456")],
        "evaluation": [Problem("asked", "12345", "67890"), Problem("too", "123456", "7")],
    }
    said = overlong(sets, list, 5)
    assert said is not None
    assert said.startswith(
        "3 problems have more tokens with their solutions than the model's context of 5 (long: 6, longer: 7, too: 6), "
    )
    assert overlong(sets, list, 7) is overlong(sets, list, None) is None
    many = {"train": [Problem(str(number), "123", "456") for number in range(11)]}
    assert "8: 6, 9: 6, ...), prompt and" in (overlong(many, list, 5) or "")
