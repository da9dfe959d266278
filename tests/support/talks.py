"""Conversations as a run writes them, a row a turn: one attempt whole, one without a teacher, one cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROBLEM, HINT = "ab#", "a*\na47\n#"
STREAMS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "gate")


def talk_rows(*, hostile: str = "") -> list[dict[str, Any]]:
    """Return what a step writes; `hostile` stands in an observation, an action and the hint of the first attempt."""
    first = talk(
        [(f"a{hostile}", "*"), ("a4", f"7{hostile}"), ("b", "x")],
        hint=HINT + hostile,
        ended="over",
        invalid=1,
        reward=1.0,
        gates=[[0.0, 1.0], [0.25, 0.5], [-0.4, 0.02]],
    )
    lone = talk([("a", "*"), ("a4", "1")], hint="", ended="limit", invalid=0, reward=0.0, gates=None)
    cut = talk([("a", "*"), ("a4", "7"), ("b", "*"), ("b1", "3")], ended="hang", invalid=2, reward=None)[:2]
    return [*first, *lone, *cut]


def talk(
    turns: Sequence[tuple[str, str]],
    *,
    ended: str,
    invalid: int,
    reward: float | None,
    hint: str = HINT,
    gates: Sequence[Sequence[float]] | None = ((0.5, 0.5),) * 4,
) -> list[dict[str, Any]]:
    """Return the turns of one attempt: (observation, action) each; without gates no teacher read it.

    Turn n has the divergences n and n / 10 on its two tokens, the action and its end.
    """
    rows = []
    prompts = {"student": f"<|user|>{PROBLEM}\n", "teacher": f"<|user|>{PROBLEM}\n>{hint}\n"}
    for number, (said, action) in enumerate(turns, start=1):
        opened = "" if number == 1 else "<|user|>"
        prompts = {role: f"{prompt}{opened}{said}<|assistant|>" for role, prompt in prompts.items()}
        scores: Mapping[str, Sequence[float]] = {
            "divergence": [float(number), number / 10],
            "student_logprob": [-1.0, -0.5],
            "teacher_logprob": [-2.0, -0.25],
            "student_entropy": [0.7, 0.3],
            "gate": gates[number - 1] if gates else [1.0, 1.0],
        }
        rows.append({
            "step": 1,
            "problem_id": "doors-ab",
            "problem": PROBLEM,
            "level": "two",
            "route": "both" if gates else "rl",
            "components": ["distil", "rl"] if gates else ["rl"],
            "advantage": 0.5,
            "ratio": 0.5,
            "hint": hint,
            "student_prompt": prompts["student"],
            "teacher_prompt": prompts["teacher"] if gates else "",
            "turn": number,
            "turns": len(turns),
            "observation": said,
            "ended": ended,
            "invalid": invalid,
            "completion": action,
            "stop": "eos",
            "reward": reward,
            "tokens": [action, "<|end|>"],
            **{name: list(values) for name, values in scores.items()},
        })  # fmt: skip
        prompts = {role: f"{prompt}{action}<|end|>" for role, prompt in prompts.items()}
    return rows
