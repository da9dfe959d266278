"""Choose and pack the completions and conversations that the report's inspector shows, within a bound on their size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atesd.report.checked import is_number, is_shade, is_step, is_text, list_of, optional, read_rows
from atesd.report.study import Run, Study

BYTES = 2_000_000  # of all packed completions
STEPS = 8  # steps a run
PER_STEP = 8  # attempts a step
TOKENS = 600  # tokens a completion
CHARACTERS = 8_000  # of a prompt, problem or hint

STREAMS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "gate")
OF_TEACHER = ("divergence", "teacher_logprob", "gate")  # without meaning where nothing is distilled
SHOWN = {  # fields of a completion; the first six are in every file
    "problem_id": is_text,
    "problem": is_text,
    "ratio": optional(is_number),
    "reward": optional(is_number),
    "stop": is_text,
    "tokens": list_of(is_text),
    "level": is_text,
    "hint": is_text,
    "attended": list_of(is_step),
    "shades": list_of(is_shade),
    "teacher_prompt": is_text,
    "student_prompt": is_text,
    "route": is_text,
    "advantage": is_number,
    "components": list_of(is_text),
    "turn": is_step,
    "turns": is_step,
    "observation": is_text,
    "ended": is_text,
    "invalid": is_step,
    **dict.fromkeys(STREAMS, list_of(is_number)),
}
NEEDED = list(SHOWN)[:6]
ROLES = ("student", "teacher")
OF_TURN = {*ROLES, "tokens", "streams", "hidden", "stop", "components"}
"""What differs between the turns of a conversation."""
COMPONENTS = {"distil": ["distil"], "rl": ["rl"], "both": ["distil", "rl"], "nll": ["nll"], "skip": []}


def pack_rollouts(study: Study, *, budget: int = BYTES) -> dict[str, Any]:
    """Return the inspector's data: `runs` with their steps and attempts, `shown`, `total`, `taught`, `scale`.

    Attempts are taken round by round, the first of every run and step before any second, until the budget is spent;
    later ones that would still fit are not looked for. `shown` and `total` count completions, a conversation's turns
    each. `taught` tells whether a teacher scored any of them, `scale` is the 99th percentile of the divergences shown,
    `notes` name completions that were left out as damaged, with the rest of their conversation.
    """
    runs: dict[int, dict[str, Any]] = {
        id(run): {"label": run.label, "arm": index, "steps": {}} for index, run in _indexed(study)
    }
    spent, shown, notes = 0, 0, list[str]()
    for run, step, rows in _rounds(study):
        if damage := next(filter(None, map(damage_of, rows)), None):
            notes.append(f"{run.label}: a completion of step {step} was left out, its field {damage!r} is damaged")
            continue
        packed = pack_attempt(rows)
        size = len(json.dumps(packed, ensure_ascii=False).encode(errors="replace"))
        if spent + size > budget:
            break
        spent, shown = spent + size, shown + len(rows)
        runs[id(run)]["steps"].setdefault(step, []).append(packed)
    kept = [run | {"steps": _sorted(run["steps"])} for run in runs.values() if run["steps"]]
    total = sum(_count(path) for run in study.runs for path in run.rollouts.values())
    values = _divergences(kept)
    about = {"shown": shown, "total": total, "taught": bool(values), "scale": _scale(values), "notes": notes}
    return {"runs": kept, **about}


def damage_of(row: Mapping[str, Any]) -> str | None:
    """Name a field of a completion that is missing or not what it should be; None where all are well."""
    missing = [field for field in NEEDED if field not in row]
    wrong = [field for field, test in SHOWN.items() if field in row and not test(row[field])]
    if missing or wrong:
        return (missing + wrong)[0]
    streams = [name for name in STREAMS if name in row]
    if "divergence" in row and len(streams) < len(STREAMS):
        return next(name for name in STREAMS if name not in row)
    return next((name for name in streams if len(row[name]) != len(row["tokens"])), None)


def attempts_of(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Put the turns of a conversation together: a file has them one behind the other, the last one's end may be cut."""
    attempts: list[list[Mapping[str, Any]]] = []
    for row in rows:
        before = attempts[-1][-1] if attempts else {}
        follows = is_step(row.get("turn")) and row["turn"] > 1 and before.get("turn") == row["turn"] - 1
        if follows and before.get("problem_id") == row.get("problem_id"):
            attempts[-1].append(row)
        else:
            attempts.append([row])
    return attempts


def pack_attempt(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page needs of an attempt: its one completion, or a conversation with its `turns`.

    A turn has what the student read before it (`observation`), and of both roles' prompts what stands behind the
    prompt of the turn before; a prompt that does not begin with that one is whole (`anew` names its role).
    `of` is the number of turns that were taken, of which fewer may have been kept.
    """
    first = rows[0]
    if len(rows) == 1 and first.get("turns", 1) == 1 and not first.get("observation"):
        return pack_row(first)
    packed, turns = pack_row(first), []
    before: Mapping[str, Any] = {}
    for row in rows:
        turn = {key: value for key, value in pack_row(row).items() if key in OF_TURN}
        anew = [
            role for role in ROLES if not row.get(f"{role}_prompt", "").startswith(before.get(f"{role}_prompt", ""))
        ]
        for role in ROLES:
            known = "" if role in anew else before.get(f"{role}_prompt", "")
            turn[role] = _cut(row.get(f"{role}_prompt", "")[len(known) :])
        turns.append(turn | {"observation": _cut(row.get("observation", "")), "anew": anew})
        before = row
    whole = {key: value for key, value in packed.items() if key not in OF_TURN - {"components", "stop"}}
    return whole | {
        "stop": turns[-1]["stop"],
        "ended": first.get("ended", ""),
        "invalid": first.get("invalid", 0),
        "of": first.get("turns", len(rows)),
        "turns": turns,
    }


def pack_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page needs of one completion, numbers rounded to three decimals, long parts cut.

    Streams of the teacher are empty where nothing was distilled. Gates keep three digits: 0 is 0 and nothing else.
    """
    tokens = [str(token) for token in row["tokens"]]
    components = components_of(row)
    return {
        "id": str(row["problem_id"]),
        "level": row.get("level", ""),
        "problem": _cut(row["problem"]),
        "hint": _cut(row.get("hint", "")),
        **({"attended": row["attended"]} if len(row.get("attended", ())) == 2 else {}),
        **({"shades": row["shades"]} if _spells(row.get("shades", ()), row.get("hint", "")) else {}),
        "teacher": _cut(row.get("teacher_prompt", "")),
        "student": _cut(row.get("student_prompt", "")),
        "ratio": row["ratio"],
        "reward": row["reward"],
        "stop": row["stop"],
        "route": row.get("route", ""),
        "components": components,
        "advantage": round(row["advantage"], 3) if "advantage" in row else None,
        "hidden": max(0, len(tokens) - TOKENS),
        "tokens": tokens[:TOKENS],
        "streams": [_stream(row, name, components) for name in STREAMS] if "divergence" in row else [],
    }


def _spells(shades: Sequence[tuple[str, float]], hint: str) -> bool:
    """Tell whether parts of a hint make the hint, of which nothing is cut."""
    return bool(shades) and len(hint) <= CHARACTERS and "".join(text for text, _ in shades) == hint


def components_of(row: Mapping[str, Any]) -> list[str]:
    """Return the losses that a completion feeds; early files name its route at most."""
    if "components" in row:
        return [str(name) for name in row["components"]]
    return COMPONENTS.get(row.get("route", ""), ["distil"] if "divergence" in row else [])


def _stream(row: Mapping[str, Any], name: str, components: Sequence[str]) -> list[float]:
    if name in OF_TEACHER and "distil" not in components:
        return []
    values = row[name][:TOKENS]
    return [float(f"{value:.3g}") if name == "gate" else round(value, 3) for value in values]


def _indexed(study: Study) -> Iterator[tuple[int, Run]]:
    for index, arm in enumerate(study.arms):
        for run in arm.runs:
            yield index, run


def _rounds(study: Study) -> Iterator[tuple[Run, int, list[Mapping[str, Any]]]]:
    """Yield candidates: in round r, attempt r of every run's last chosen step, then of the one before, and so on."""
    steps = [(rank, run, step) for run in study.runs for rank, step in enumerate(_steps(run))]
    steps.sort(key=lambda entry: entry[0])
    chosen = [(run, step, attempts_of([row for _, row in read_rows(run.rollouts[step])])) for _, run, step in steps]
    for number in range(PER_STEP):
        for run, step, attempts in chosen:
            if number < len(attempts):
                yield run, step, attempts[number]


def _steps(run: Run) -> list[int]:
    steps = sorted(run.rollouts)
    if len(steps) > STEPS:
        steps = [steps[index] for index in np.linspace(0, len(steps) - 1, STEPS).round().astype(int)]
    return steps[::-1]


def _sorted(steps: Mapping[int, Sequence[Any]]) -> list[dict[str, Any]]:
    return [{"step": step, "rows": steps[step]} for step in sorted(steps)]


def _divergences(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    attempts = [attempt for run in runs for step in run["steps"] for attempt in step["rows"]]
    completions = [turn for attempt in attempts for turn in attempt.get("turns", [attempt])]
    return [value for turn in completions if turn["streams"] for value in turn["streams"][0]]


def _scale(values: Sequence[float]) -> float:
    return max(1e-3, round(float(np.quantile(values, 0.99)), 3)) if values else 1.0


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + f" ... ({len(text) - CHARACTERS} more characters)"


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
