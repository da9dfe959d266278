"""Batch mates, padding and the engine change nothing about a sample, and what was sampled is what is scored."""

from __future__ import annotations

import random

import pytest
import torch

from atesd.envs.single_turn import SingleTurn
from atesd.exposure.prompt import PromptConfig, student_messages
from atesd.losses.divergence import LossConfig
from atesd.losses.target import Plain
from atesd.rollout.driver import Driver
from atesd.rollout.hf import HFSampler
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig
from atesd.train.batch import Passage, labels, view_input
from atesd.train.scorer import Scorer
from atesd.types import Problem, StopReason

from support.models import EOS, PAD, VOCABULARY, tiny_model
from support.rollouts import byte_tokenizer

CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0, max_new_tokens=24)


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of 1 to 30 tokens; pad and EOS ids occur anywhere."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def sampler_of(model: torch.nn.Module, pad_id: int = PAD) -> HFSampler:
    return HFSampler(model, eos_ids=[EOS], pad_id=pad_id, decode=str)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_a_sequence_sampled_alone_equals_itself_inside_a_ragged_batch(pad_id: int) -> None:
    sampler, prompts = sampler_of(tiny_model(), pad_id), ragged_prompts(12)
    together = sampler.sample(prompts, GREEDY, seed=0)
    for prompt, inside in zip(prompts, together, strict=True):
        (alone,) = sampler.sample([prompt], GREEDY, seed=0)
        assert alone.completion_ids == inside.completion_ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(inside.logprobs), atol=1e-5, rtol=0)


def test_the_order_of_prompts_does_not_matter() -> None:
    sampler, prompts = sampler_of(tiny_model()), ragged_prompts(12)
    forwards = sampler.sample(prompts, GREEDY, seed=0)
    backwards = sampler.sample(prompts[::-1], GREEDY, seed=0)[::-1]
    assert [turn.completion_ids for turn in forwards] == [turn.completion_ids for turn in backwards]


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_the_trainer_scores_what_the_sampler_sampled(pad_id: int) -> None:
    """Equal log-probabilities at every sampled token, with truncation on, at the sampling temperature of 1.1."""
    model = tiny_model()
    sampling = SamplingConfig(temperature=1.1, top_p=0.9, top_k=8, max_new_tokens=24)
    turns = sampler_of(model, pad_id).sample(ragged_prompts(16), sampling, seed=0)
    assert {turn.stop for turn in turns} == {StopReason.EOS, StopReason.LENGTH}
    passages = [Passage(turn.prompt_ids, turn.completion_ids) for turn in turns]
    assert sum(len(each.places_N) for each in view_input(passages, pad_id, CPU).passes) == sum(
        len(turn.logprobs) for turn in turns
    )
    scorer = Scorer(model, pad_id=pad_id, loss=LossConfig(), temperature=sampling.temperature, token_budget=10_000)
    with torch.no_grad():
        scored = scorer.streams(passages, [scorer.hidden(passages)], Plain()).logprob_N
    sampled = torch.tensor([logprob for turn in turns for logprob in turn.logprobs])
    torch.testing.assert_close(scored, sampled, atol=1e-5, rtol=0)


def test_ids_given_to_the_sampler_are_the_ids_scored() -> None:
    """No text round trip: a chat with special tokens reaches the turn id by id, and so does an odd completion."""
    renderer = Renderer(byte_tokenizer())
    torch.manual_seed(0)
    config = tiny_model().config
    config.update({"vocab_size": 259, "max_position_embeddings": 256})
    model = type(tiny_model())(config)
    sampler = HFSampler(model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, decode=renderer.decode)
    prompt = PromptConfig(student="{problem} \u221a <|im_end|>")
    driver = Driver(
        sampler=sampler,
        renderer=renderer,
        environment=SingleTurn(),
        student_messages=lambda problem: student_messages(problem, prompt),
        reward=lambda **columns: [0.0] * len(columns["prompts"]),
    )
    problems = [Problem("a", "one", "1"), Problem("b", "a longer one", "2")]
    for group in driver.rollout(problems, SamplingConfig(max_new_tokens=20, group_size=3), seed=0):
        expected = renderer.student_ids(student_messages(group.problem, prompt))
        for trajectory in group.trajectories:
            (turn,) = trajectory.turns
            assert list(turn.prompt_ids) == expected
            passage = Passage(turn.prompt_ids, turn.completion_ids)
            inputs = view_input([passage], renderer.pad_id, CPU)
            assert inputs.passes[0].ids_BL[0].tolist() == [*expected, *turn.completion_ids[:-1]]
            assert labels([passage], CPU).tolist() == list(turn.completion_ids)
