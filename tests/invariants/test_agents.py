"""Several turns: what the teacher reads, what is measured, and what is trained, each found again from outside."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from atesd.recipe import build_config
from atesd.routing.route import Route
from atesd.tasks.synthetic import doors
from atesd.train.record import rollout_rows
from atesd.train.setup import Parts, assemble, for_evaluation
from atesd.types import Ending, Group, Measurement, Problem, StopReason

from support.composition import BASE

TREE: dict[str, Any] = BASE | {
    "task": {"kind": "doors", "train_size": 6, "probe_size": 3, "eval_size": 2},
    "env": {"kind": "doors"},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n{answer}"},
    "reveal": {"kind": "turns"},
    "routing": {"kind": "both"},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2, "group_size": 2},
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return assemble(build_config(TREE))


def ids(parts: Parts, text: str) -> list[int]:
    """Encode a conversation by its characters and special tokens."""
    return cast("list[int]", cast("Any", parts.tokenizer).encode(text, add_special_tokens=False))


def conversation(problem: Problem, first: str) -> tuple[str, list[tuple[int, int]]]:
    """Write the expert's conversation and where its replies stand, in characters; doors by hand."""
    text, places = f"<|user|>{first}\n", []
    for name, lock, key in problem.extra["doors"]:
        for read, reply in ((name, "*"), (f"{name}{lock}", str(key))):
            text += f"{read}<|assistant|>"
            places.append((len(text), len(text) + len(reply) + len("<|end|>")))
            text += f"{reply}<|end|><|user|>"
    return text.removesuffix("<|user|>"), places


def replies_nll(parts: Parts, problem: Problem, first: str, turns: slice = slice(None)) -> list[float]:
    """NLL of every token of the expert's replies, from one forward pass over the whole conversation, in float64."""
    text, places = conversation(problem, first)
    whole = ids(parts, text)
    with torch.no_grad():
        logits = cast("Any", parts.model)(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    found = []
    for low, high in places[turns]:
        start, end = len(ids(parts, text[:low])), len(ids(parts, text[:high]))
        found += [-float(logits[place - 1, whole[place]]) for place in range(start, end)]
    return found


def measured(parts: Parts, kind: str, ratio: float | None = None) -> float:
    wanted = Measurement(kind, ratio)
    return float(cast("float", parts.measurer.measure([wanted])[wanted]))


def test_probe_nll_is_the_token_mean_of_the_experts_replies_in_their_conversation(parts: Parts) -> None:
    problems = doors.problems("probe", 3, 0)
    expected = [nll for problem in problems for nll in replies_nll(parts, problem, problem.problem)]
    assert len(expected) == 2 * sum(len(problem.expert) for problem in problems), "a reply and its end token"
    assert measured(parts, "probe_nll") == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", ["solution", "answer", "hidden_only"])
def test_grounded_terms_are_of_the_same_replies_behind_the_hint(parts: Parts, part: str, ratio: float) -> None:
    """The answer is the last turn; what a ratio hides are the turns from floor(ratio m) on."""
    expected: list[float] = []
    for problem in doors.problems("probe", 3, 0):
        shown = int(ratio * len(problem.expert))
        turns = {"solution": slice(None), "answer": slice(-1, None), "hidden_only": slice(shown, None)}[part]
        expected += replies_nll(parts, problem, f"{problem.problem}\n>{doors.hint(problem, shown)}", turns)
    wanted = Measurement(f"gt_{part}", ratio)
    found = parts.measurer.measure([wanted])
    if not expected:
        assert found == {}
        return
    assert found[wanted] == pytest.approx(-sum(expected) / len(expected), abs=1e-5)


def rolled(parts: Parts) -> list[Group]:
    config = build_config(TREE)
    return parts.driver.rollout(parts.problems[:3], config.rollout, seed=1)


def test_the_teacher_reads_the_hint_and_then_what_the_student_read_and_said(parts: Parts) -> None:
    groups = rolled(parts)
    rows = parts.rows.build(groups, [Route.BOTH] * 3, [0.5] * 3, ("teacher",))
    row = iter(rows)
    for group in groups:
        problem = group.problem
        hinted = f"<|user|>{problem.problem}\n>{doors.hint(problem, len(problem.expert) // 2)}\n"
        for attempt in group.trajectories:
            assert attempt.opening == f"\n{problem.problem[0]}"
            said = f"{problem.problem[0]}<|assistant|>"
            for turn in attempt.turns:
                one = next(row)
                assert list(one.view_prompts["teacher"]) == ids(parts, hinted + said)
                assert list(one.prompt) == ids(parts, f"<|user|>{problem.problem}\n" + said)
                assert (one.completion, one.ratio) == (turn.completion_ids, 0.5)
                following = attempt.turns.index(turn) + 1
                if following < len(attempt.turns):
                    later = parts.renderer.prompt_text(attempt.turns[following].prompt_ids)
                    said = later.removeprefix(f"<|user|>{problem.problem}\n")
    assert next(row, None) is None


def test_an_attempt_in_which_the_environment_failed_trains_nothing(parts: Parts) -> None:
    first, *others = rolled(parts)
    broken = replace(first.trajectories[0], ended=Ending.HANG, reward=None)
    groups = [replace(first, trajectories=(broken, *first.trajectories[1:])), *others]
    rows = parts.rows.build(groups, [Route.BOTH] * 3, [0.5] * 3, ("teacher",))
    count = len(broken.turns)
    assert {row.components for row in rows[:count]} == {()}
    assert {row.components for row in rows[count:]} == {("distil", "rl")}


def test_a_conversation_leaves_room_for_the_teachers_longer_prompt(parts: Parts) -> None:
    """256 positions; the longest hint is that of four doors, ">" and 4 * (3 + 4) - 1 characters, behind a new line;
    the bound adds the goal's "\\n" and "{answer}", spelt, and the goal."""
    assert parts.driver.room == 256
    assert parts.driver.reserved == (1 + 1 + 4 * (3 + 4) - 1) + len("\n{answer}") + len("#")
    assert for_evaluation(parts.driver, build_config(TREE)).reserved == 0, "as atesd eval has it"


def test_a_rollout_file_says_what_was_heard_and_how_an_attempt_ended(parts: Parts) -> None:
    """By hand: a look shows door and lock, a wrong key the shut door, a right one the next; a cut reply nothing."""
    groups = rolled(parts)
    rows = parts.rows.build(groups, [Route.BOTH] * 3, [0.5] * 3, ("teacher",))
    nothing_scored = cast("Any", SimpleNamespace(rows={}))
    written = rollout_rows(
        groups,
        [Route.BOTH] * 3,
        rows,
        nothing_scored,
        step=1,
        renderer=parts.renderer,
        count=len(rows) - 1,
        reached=parts.reached,
    )
    assert len(written) == len(rows) - 1
    lines = iter(written)
    for group in groups:
        for attempt in group.trajectories:
            places, heard, invalid = iter(group.problem.extra["doors"]), "", 0
            name, lock, key = next(places)
            heard = name
            for number, turn in enumerate(attempt.turns, start=1):
                line = next(lines, None)
                if line is None:
                    return
                assert (line["turn"], line["turns"]) == (number, len(attempt.turns))
                assert line["observation"] == heard
                assert line["student_prompt"].endswith(f"{heard}<|assistant|>")
                assert line["ended"] == str(attempt.ended)
                if turn.text == key:
                    name, lock, key = next(places, ("", "", ""))
                    heard = name
                else:
                    heard = name + (lock if turn.text == "*" else "-")
                    action = len(turn.text) == 1 and turn.text in "*0123456789"
                    invalid += not action and turn.stop is StopReason.EOS
            assert line is not None
            assert line["invalid"] == invalid
    raise AssertionError("the last turn was not asked for")


def test_a_run_says_that_its_template_rewrites_history() -> None:
    """The warm start's own template keeps replies: no warning (which would be an error here)."""
    forgetful = """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] + '\\n' }}
{%- elif loop.last -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}
{%- else -%}{{ '<|assistant|>' + message['content'].split('</think>')[-1] + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
    tree = TREE | {"prompt": TREE["prompt"] | {"chat_template": forgetful}}
    with pytest.warns(UserWarning, match="drops the thinking of earlier replies .* stays as it was sampled"):
        assemble(build_config(tree))
    assemble(build_config(TREE))
    one_turn = BASE | {"prompt": tree["prompt"]}
    assemble(build_config(one_turn))  # nothing goes on there
