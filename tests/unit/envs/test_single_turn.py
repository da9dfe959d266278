from __future__ import annotations

from atesd.envs.single_turn import SingleTurn
from atesd.facts import RunFacts
from atesd.types import Message, Problem


def test_one_reply_ends_the_attempt_and_the_grader_grades_it() -> None:
    environment = SingleTurn().build(RunFacts())
    assert (environment.limit, environment.grades) == (1, False)
    episode = environment.episode(Problem("a", "one", "1"), seed=3)
    prompt = [Message(role="user", content="one?")]
    assert list(episode.reset(prompt)) == prompt
    assert list(episode.step("a reply")) == []
    assert episode.reward() is None
