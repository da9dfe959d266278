"""Revealers: what each shows of a problem at a ratio, with a rollout and without."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atesd.exposure.overlap import Overlap
from atesd.exposure.prompt import PromptConfig, hint_text
from atesd.exposure.reveal import reveal
from atesd.exposure.revealer import Revealer
from atesd.exposure.segments import Segments
from atesd.facts import RunFacts
from atesd.types import Observation, Problem, StopReason, Trajectory, Turn, UserError

REFERENCE = "a3*4=7\nb7+2=9\nc9-5=4\n#4"
PROBLEM = Problem("p", "3*4+2-5", REFERENCE, "4")


def rollout(*texts: str) -> Trajectory:
    return Trajectory(tuple(Turn((1,), (2,), (-1.0,), text, StopReason.EOS, 0) for text in texts))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_segments_show_what_the_ratio_says_whatever_the_rollout(ratio: float) -> None:
    section = Segments(unit="line", order="suffix", hidden_marker="[...]")
    revealer = section.build(RunFacts())
    expected = reveal(REFERENCE, ratio, unit="line", order="suffix", hidden_marker="[...]", seed_key="p")
    assert revealer.reveal(PROBLEM, ratio) == revealer.reveal(PROBLEM, ratio, rollout(REFERENCE)) == expected
    assert expected.ratio == ratio
    assert not section.reads_rollout


def test_segments_in_random_order_are_drawn_by_the_problem() -> None:
    long = "".join(f"{index}\n" for index in range(12))
    shown = [Segments(order="random_segments").reveal(Problem(str(name), "q", long), 0.5).text for name in range(5)]
    assert len(set(shown)) == 5
    assert shown[3] == reveal(long, 0.5, order="random_segments", seed_key="3").text


CASES = [
    ("a3*4=7\nb7+2=1\nc1-5=6\n#6", 5, 1, 2),
    ("a3*4=7\nb7+2=9\nc9-5=4\n#4", 5, 1, 4),
    ("a3*4=1\nb1+2=3\n#3", 5, 1, 1),
    ("a3*4=7\nb7+2=1", 5, 0, 1),
    ("a3*4=1", 2, 1, 2),  # the pair `a3 *` is enough to count the first line
    ("c9-5=4", 5, 1, 4),  # the last shared segment counts, not the first that is not shared
    ("", 5, 1, 1),
    ("", 5, 0, 0),
]


@pytest.mark.parametrize(("said", "n", "extra", "segments"), CASES)
def test_overlap_reveals_up_to_where_the_rollout_follows(said: str, n: int, extra: int, segments: int) -> None:
    section = Overlap(n=n, extra=extra, unit="line")
    assert section.reads_rollout
    shown = section.build(RunFacts()).reveal(PROBLEM, 1.0, rollout(said))
    assert shown.ratio == pytest.approx(segments / 4)
    assert (shown.shown, shown.text) == (segments, "".join(REFERENCE.splitlines(keepends=True)[:segments]))


@pytest.mark.parametrize(("ratio", "segments"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 2), (1.0, 2)])
def test_the_ratio_bounds_the_overlap_from_above(ratio: float, segments: int) -> None:
    shown = Overlap(n=5, unit="line").reveal(PROBLEM, ratio, rollout("a3*4=7\nb7+2=1"))
    assert shown.shown == segments
    assert shown.ratio == min(ratio, 0.5)


def test_without_a_rollout_overlap_shows_the_ratio() -> None:
    section = Overlap(unit="line", hidden_marker="...")
    assert section.reveal(PROBLEM, 0.75) == reveal(REFERENCE, 0.75, unit="line", hidden_marker="...", seed_key="p")
    with pytest.raises(UserError, match="outside"):
        section.reveal(PROBLEM, 1.5)


def test_all_turns_of_an_attempt_count_and_their_words_stay_apart() -> None:
    section = Overlap(n=5, extra=0, unit="line")
    assert section.reveal(PROBLEM, 1.0, rollout("b7+2=9", "I see.")).shown == 2
    assert section.reveal(PROBLEM, 1.0, rollout("I see.", "b7+2=9")).shown == 2
    # `b` and `7` join to the word `b7` only where nothing stands between two turns
    assert section.reveal(PROBLEM, 1.0, rollout("b", "7+2=9")).shown == 0


def test_overlap_counts_a_segment_shorter_than_the_gram_as_a_whole() -> None:
    rule = Overlap(n=8, extra=0, unit="sentence")
    assert rule.share("one two. three four five. six", "so three four five it is") == 0.0
    assert rule.share("one two. three four five. six", "three four five. six") == 1.0


FORMULA = "Add both.\n\\[\n3 + 4 = 7\n\\]\nSo 7.\n$$\n"


def test_a_segment_of_signs_alone_is_no_place_that_a_rollout_follows() -> None:
    rule = Overlap(n=8, extra=0, unit="line")
    assert rule.share(FORMULA, "I try \\[ 9 * 9 \\] and $$ x $$") == 0.0
    assert rule.share(FORMULA, "\\[ 3 + 4 = 7 \\]") == 3 / 6
    assert rule.share(FORMULA, "So 7.") == 5 / 6
    assert rule.share("{ ( [ + - * / = < > ]\n7", "{ ( [ + - * / = < > ]") == 0.0  # nor a long one
    assert rule.share("\u7b54\u3002\n_", "\u7b54\u3002 _") == 1 / 2  # letters of any script; `_` is a sign
    assert Overlap(n=8, extra=1, unit="line").share(FORMULA, "\\[ 3 + 4 = 7 \\]") == 4 / 6


def test_the_marker_stands_for_what_overlap_hides() -> None:
    shown = Overlap(n=5, unit="line", hidden_marker="[...]").reveal(PROBLEM, 1.0, rollout("a3*4=1"))
    assert hint_text(PROBLEM, shown, PromptConfig(answer="\n#{answer}")) == "a3*4=7\n[...]\n#4"


@pytest.mark.parametrize("section", [Segments(), Overlap()])
def test_revealers_without_state_are_policies(section: Segments | Overlap) -> None:
    revealer: Revealer = section.build(RunFacts())
    revealer.observe(Observation(0))
    assert (list(revealer.wants(0)), revealer.metrics()) == ([], {})
    state: dict[str, Any] = json.loads(json.dumps(revealer.state_dict()))
    revealer.load_state_dict(state)
    assert revealer.reveal(PROBLEM, 1.0).complete
