"""The report's sections: words, tables and figures, or one line that says why a section is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from atesd.evaluate.metrics import Difference
from atesd.report.compare import LEARNED, Findings, caution, pairs_by_key
from atesd.report.panels import PANELS
from atesd.report.plots import Shown
from atesd.report.quality import quality_tables
from atesd.report.rollouts import pack_rollouts
from atesd.report.study import Run, Study
from atesd.report.tables import (
    NOT_TOLD_APART,
    behaviour_table,
    paired_table,
    percent,
    points,
    result_table,
    settings_table,
    swatch,
    verdict,
)
from atesd.report.words import config_in_full, duration, listed, run_in_words, settings_in_words

INTRODUCTION = """<p class="lead">A language model, the <em>student</em>, answers training problems on its own. A
<em>teacher</em>, the same kind of model, scores every token that the student wrote, and the student moves towards the
teacher's probabilities. The teacher knows more only because it reads a <em>hint</em>: the final answer and the leading
part of the reference solution. The <em>exposure ratio</em> is the share of the solution shown, from 0 (answer only) to
1 (whole solution).</p>"""

FLOW = """<p class="lead">A flow, the <em>student</em>, makes {samples} out of noise by a chain of small random
steps, each a normal distribution. A <em>teacher</em>, by default the same network as it was before training, says for
every state on the student's own way where it would go, and the student moves towards that. The teacher knows more only
because it sees more of a <em>condition</em>: numbers about a real example. The <em>exposure ratio</em> is the share of
it shown, from 0 to 1; where a line here speaks of a solution, this condition is meant.</p>"""

REINFORCEMENT = """<p class="lead">{start} <em>reinforced</em>: several attempts at one problem form a group, and the
student moves towards those with more reward than the group's mean and away from the others. The difference to the mean
is the attempt's <em>advantage</em>; where all attempts are equally good, there is nothing to learn.</p>"""

PLANTED = """<p class="note"><strong>About the pico task.</strong> The harm of full exposure is planted here: before
every line of work the warm start's teacher answers at once with probability c&nbsp;·&nbsp;(share of the solution
shown)<sup>2</sup>, and the student imitates that. This small task shows whether a controller finds what is there to be
found. It is no evidence about how mismatch or accuracy depend on exposure in large models.</p>"""

PAIRS = """<h3>Paired differences</h3><p>Arms are compared within the same seed and problem. An interval that contains 0
does not tell the two apart. With few seeds the intervals are somewhat too narrow.</p>"""


FLOW_MISMATCH = """<p>In every state both roles foresee an end, x&nbsp;+&nbsp;(1&nbsp;&minus;&nbsp;t)&nbsp;v. Top-1
disagreement is how often the two ends look like different labels; the divergence is that of a transition.</p>"""

UNSCORED = "no run has an exposure that is learned from rewards, or ended before a decision was scored"
NAMED_PAIRS = 3  # in the finding
MOST_NOTES = 20  # of one kind


@dataclass(frozen=True)
class Section:
    """One part of the page. `missing` is set where its data is; `notes` say what of it was damaged."""

    name: str
    title: str
    html: str = ""
    panels: tuple[Shown, ...] = ()
    rollouts: dict[str, Any] | None = None
    missing: str = ""
    notes: tuple[str, ...] = ()


def sections(study: Study, findings: Findings) -> list[Section]:
    """Return all sections in reading order."""
    completions = _rollouts(study)
    notes = [*study.notes, *completions.notes]
    if study.right:
        return _flow_sections(study, findings, notes)
    return [
        _results(study, findings, notes),
        _setup(study),
        _figures(study, "accuracy", "Accuracy over training", "no evaluation was written"),
        _figures(
            study,
            "levels",
            "Accuracy by level",
            "the task names fewer than two levels, or seeds have different numbers of problems at one",
        ),
        _figures(study, "exposure", "Exposure over training", "no step with a teacher was logged"),
        _figures(
            study,
            "controls",
            "Routes and gates over training",
            "every group was distilled, every token at full weight",
        ),
        _figures(study, "mismatch", "Mismatch against exposure", "no distillation step was logged"),
        _figures(study, "reward", "Rewards of the controller", UNSCORED),
        _behaviour(study),
        _figures(study, "curves", "Training curves", "no step was logged"),
        completions,
    ]


def _flow_sections(study: Study, findings: Findings, notes: Sequence[str]) -> list[Section]:
    """Return the sections of flows, which write no completions."""
    return [
        _results(study, findings, notes),
        _setup(study),
        _figures(study, "quality", "Distance and coverage over training", "no evaluation was written"),
        _figures(study, "samples", "Samples", "no evaluation was written"),
        _figures(study, "accuracy", "Accuracy over training", "no evaluation was written"),
        _figures(
            study, "levels", "Accuracy by level", "the student is asked for no label, or seeds asked for different ones"
        ),
        _figures(study, "exposure", "Exposure over training", "no step was logged"),
        _figures(study, "mismatch", "Mismatch against exposure", "no step was logged", FLOW_MISMATCH),
        _figures(study, "reward", "Rewards of the controller", UNSCORED),
        _figures(study, "curves", "Training curves", "no step was logged"),
    ]


def page_header(study: Study, findings: Findings, parts: Sequence[Section]) -> str:
    """Title, the finding in one sentence, facts, navigation and the legend that holds for every figure."""
    links = "".join(f'<a href="#{part.name}">{escape(part.title)}</a>' for part in parts if not part.missing)
    buttons = "".join(
        f'<button type="button" class="chip" data-arm="{index}" aria-pressed="true">'
        f"{swatch(index)}{escape(arm.name)}</button>"
        for index, arm in enumerate(study.arms)
    )
    hint = "" if len(study.arms) < 2 else '<span class="muted">Press an arm to hide it in every figure.</span>'
    return (
        f'<header><p class="kicker">Exposure report</p><h1>{escape(study.title)}</h1>'
        f'<p class="finding">{finding(findings, study.right)}</p>{_facts(study)}'
        f'<nav aria-label="Sections">{links}</nav></header>'
        f'<div class="legend" role="group" aria-label="Arms">{buttons}{hint}</div>'
    )


def finding(findings: Findings, right: str = "") -> str:
    """Say in a sentence or two what came out: the highest, ties named, and the start; learned against other arms."""
    known = {name: entry for name, entry in findings.arms.items() if entry is not None}
    if not known:
        return "No run is complete yet."
    names = [f"<strong>{escape(name)}</strong>" for name in findings.leaders]
    shares = [percent(known[name]["average_at_k"]) for name in findings.leaders]
    start = findings.start
    before = "" if start is None else f", from {percent(start['average_at_k'])} before training"
    answered = shares[0] if shares[0] == shares[-1] else f"{shares[-1]} to {shares[0]}"
    if right:
        lead = (
            f"{names[0]} has the highest share of right samples"
            if len(names) == 1
            else f"Not told apart by the share of right samples: {listed(names)}"
        )
        return f"{lead}: {answered} of the samples {escape(right)}{before}.{_against(findings)}"
    if len(names) > 1 and len(names) == len(known):
        text = f"No arm is told apart from the highest: {listed(names)} answer"
    elif len(names) > 1:
        text = f"{listed(names)} are not told apart from the highest: they answer"
    else:
        text = f"{names[0]} {'has the highest measured accuracy: it ' if len(known) > 1 else ''}answers"
    return f"{text} {answered} of held-out problems right{before}.{_against(findings)}"


def _against(findings: Findings) -> str:
    """Compare the learned arm with the first others, in a sentence."""
    pairs = [
        f"{points(entry.difference)} against {escape(other)} "
        f"({points(entry.low)} to {points(entry.high)}{_untold(entry)})"
        for key, (arm, other) in pairs_by_key(list(findings.arms)).items()
        if arm == LEARNED and (entry := findings.paired.get(key)) is not None
    ]
    if not pairs:
        return ""
    rest = " The table below has the other pairs." if len(pairs) > NAMED_PAIRS else ""
    return f" Learned exposure, in percentage points: {listed(pairs[:NAMED_PAIRS])}.{rest}"


def _untold(entry: Difference) -> str:
    word = verdict(entry.sign)
    return f", {word}" if word == NOT_TOLD_APART else ""


def _facts(study: Study) -> str:
    seeds = [f"{len(study.seeds)} {'seed' if len(study.seeds) == 1 else 'seeds'} ({', '.join(map(str, study.seeds))})"]
    evaluated = max((len(run.evaluations[-1].problem_ids) for run in study.runs if run.evaluations), default=0)
    facts = [
        f"task {study.task}" if study.task else "",
        "one arm" if len(study.arms) == 1 else f"{len(study.arms)} arms",
        *(seeds if study.seeds else []),
        f"{evaluated} held-out problems, {study.k} {'samples' if study.right else 'answers'} each" if evaluated else "",
        f"{duration(study.seconds)} in all" if study.seconds else "",
    ]
    return '<ul class="facts">' + "".join(f"<li>{escape(fact)}</li>" for fact in facts if fact) + "</ul>"


def _results(study: Study, findings: Findings, notes: Sequence[str]) -> Section:
    title = "Results"
    note = _note("Not everything is here yet:", study.missing)
    note += _note("Not everything is as the runs wrote it; read the results with that in mind:", notes)
    if not any(findings.arms.values()):
        return Section("results", title, missing=_left_out("no complete run with graded answers") + note)
    words = (
        f"<p>Average@{study.k} is the share of right answers when every held-out problem is answered {study.k} times. "
        "Intervals hold 95 % of what resampling seeds and problems gives; the dashed line marks the start.</p>"
    )
    if study.right:
        words = (
            f"<p>Average@{study.k} is the share of samples that {escape(study.right)}: it does not see whether they "
            "differ from each other. The numbers below the tables do. Intervals hold 95 % of what resampling seeds and "
            "groups of samples gives; the dashed line marks the start.</p>"
        )
    known = [int(entry["seeds"]) for entry in findings.arms.values() if entry is not None]
    warning = caution([*known, *(pair.seeds for pair in findings.paired.values())])
    words += f"<p>{warning}</p>" if warning else ""
    pairs = paired_table(study, findings)
    return Section(
        "results",
        title,
        note + words + result_table(study, findings) + (PAIRS + pairs if pairs else "") + quality_tables(study),
    )


def _note(words: str, points: Sequence[str]) -> str:
    """A note for the reader with its points, none where there is no point."""
    if not points:
        return ""
    shown = [*points[:MOST_NOTES], *([f"and {len(points) - MOST_NOTES} more"] if len(points) > MOST_NOTES else [])]
    return f'<div class="note">{words}<ul>{"".join(f"<li>{escape(point)}</li>" for point in shown)}</ul></div>'


def _setup(study: Study) -> Section:
    arms = "".join(
        f"<li>{swatch(index)}<strong>{escape(arm.name)}</strong>: "
        f"{escape(run_in_words(arm.runs[0]))}{_overrides(arm.overrides)}</li>"
        for index, arm in enumerate(study.arms)
    )
    planted = PLANTED if study.task == "pico" and any(run.distils for run in study.runs) else ""
    records = "".join(_record(arm.runs[0]) for arm in study.arms)
    settings = settings_table(settings_in_words(study))
    html = f"{_introduction(study)}{settings}<h3>Arms</h3><ul class=arms>{arms}</ul>{planted}{records}"
    return Section("setup", "What was run", html)


def _introduction(study: Study) -> str:
    """Explain distillation, reinforcement, or both."""
    if study.right:
        return FLOW.format(samples=escape(str(study.runs[0].about.get("samples", "samples"))))
    taught = any(run.distils for run in study.runs)
    start = (
        "Groups may also be"
        if taught
        else "A language model, the <em>student</em>, answers training problems on its own and is"
    )
    reinforced = REINFORCEMENT.format(start=start) if any(run.reinforces for run in study.runs) else ""
    return (INTRODUCTION if taught or not reinforced else "") + reinforced


def _overrides(overrides: Sequence[str]) -> str:
    return f" <code>{escape(' '.join(overrides))}</code>" if overrides else ""


def _record(run: Run) -> str:
    """Every setting of a run and what it ran on, folded away."""
    text = config_in_full({"config": dict(run.config), "environment": dict(run.env)})
    return f"<details><summary>Every setting of {escape(run.label)}</summary><pre>{escape(text)}</pre></details>"


def _behaviour(study: Study) -> Section:
    words = (
        f"<p>pass@{study.k} is the share of problems with at least one right answer among {study.k}. Accuracy that "
        "rises while it falls means that answers became more alike. Traits are habits of completions written without "
        "any hint, such as citing the hint or answering early.</p>"
    )
    html = words + behaviour_table(study) if any(run.evaluations for run in study.runs) else ""
    return _figures(study, "behaviour", "Behaviour", "no evaluation was written", html)


def _rollouts(study: Study) -> Section:
    packed = pack_rollouts(study)
    title, notes = "Read completions", tuple(packed.pop("notes"))
    if not packed["shown"]:
        reason = "all completions are damaged" if notes else "no completions were written"
        return Section("rollouts", title, missing=_left_out(reason), notes=notes)
    words = (
        f"<p>Completions that the student wrote in training, token by token: {packed['shown']} of the "
        f"{packed['total']} on disk are in this file. {_talk(packed)}{_colours(packed['taught'])} "
        "Point at a token, tap it, or move with the arrow keys.</p>"
    )
    return Section("rollouts", title, words + '<div id="inspector"></div>', rollouts=packed, notes=notes)


def _talk(packed: Mapping[str, Any]) -> str:
    """Say how a conversation is shown, where there is one."""
    attempts = [attempt for run in packed["runs"] for step in run["steps"] for attempt in step["rows"]]
    if not any("turns" in attempt for attempt in attempts):
        return ""
    return (
        "A conversation is shown turn by turn: what the environment said, the student's action, and beside it what the "
        "teacher had read when it scored that action. "
    )


def _colours(taught: bool) -> str:
    """Say what the colours of tokens mean."""
    if not taught:
        return "Colours show which losses a token fed, or how unsure the student was."
    return (
        "Strong colour marks tokens where the teacher, who saw the hint, would have gone on differently; colours can "
        "also show how much a token weighs in the distillation loss, and which losses it feeds."
    )


def _figures(study: Study, name: str, title: str, reason: str, html: str = "") -> Section:
    """The panels of a section under its words; left out where there is neither."""
    panels = tuple(shown for panel in PANELS if panel.section == name and (shown := panel.show(study)))
    return Section(name, title, html, panels, missing="" if html or panels else _left_out(reason))


def _left_out(reason: str) -> str:
    return f"<p class=muted>Left out: {escape(reason)}.</p>"
