"""Guessing tokens of references: the samples of one token at a time, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atesd.recipe import build_config
from atesd.rollout import decode, guess
from atesd.rollout.guess import Guesses, Pace, free_positions
from atesd.rollout.hf import HFEngine, HFSampler
from atesd.rollout.llama import Cache, Decoder
from atesd.rollout.sampler import SamplingConfig
from atesd.train.model import load
from atesd.train.setup import sampling_side
from atesd.types import Turn

from support.families import FAMILIES, family_model
from support.models import EOS, PAD, tiny_model

PROMPTS = [[5, 6, 7], [9], [PAD, 4, EOS, 8, 3, 11, 2], [EOS, PAD], [12, 13, 14, 15, 16], [9], [5, 6, 7]] * 2
ENDS = (EOS, 6, 17)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=24)
CUT = SamplingConfig(temperature=1.1, top_p=0.9, top_k=8, max_new_tokens=24)
OPEN = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=24)


def sample(model: Any, sampling: SamplingConfig, most: int, references: Any = (), **more: Any) -> list[Turn]:
    sampler = HFSampler(model, eos_ids=ENDS, pad_id=PAD, decode=str, guess=most)
    return sampler.sample(PROMPTS, sampling, seed=1, references=references, **more)


def near(turn: Turn, row: int) -> list[int]:
    """Return a reference: the completion itself, another, nothing, one with a token replaced, dropped or put in."""
    ids = list(turn.completion_ids)
    middle = len(ids) // 2
    return [
        ids,
        [*range(20)],
        [],
        [*ids[:middle], 3, *ids[middle + 1 :]],
        [*ids[:middle], *ids[middle + 1 :], *ids],
        [*ids[:middle], 3, 4, *ids[middle:]],
        ids[: middle + 1],
    ][row % 7]


def assert_same(found: list[Turn], expected: list[Turn]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.stop is other.stop


@pytest.mark.parametrize("sampling", [GREEDY, CUT, OPEN], ids=["greedy", "cut", "open"])
@pytest.mark.parametrize("most", [1, 3, 8, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_change_no_sample(
    family: str, most: int, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is guessed, right, wrong or beyond the end, and with rows that leave."""
    model, kept, tried = family_model(family), [], []
    monkeypatch.setattr(guess, "_FREE", 10_000)  # several tokens pay at once
    expected = sample(model, sampling, 0)
    keep, try_on = Cache.keep, Decoder.try_on
    monkeypatch.setattr(Cache, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    monkeypatch.setattr(
        Decoder, "try_on", lambda self, ids, *rest: tried.append(ids.shape[1]) or try_on(self, ids, *rest)
    )
    found = sample(model, sampling, most, [near(turn, row) for row, turn in enumerate(expected)])
    assert_same(found, expected)
    assert max(tried) == most + 1 if most < 24 else max(tried) > 9
    assert kept


@pytest.mark.parametrize("every", [2, 5, 100])
def test_guesses_change_no_sample_where_looks_are_rare(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("qwen3")
    monkeypatch.setattr(guess, "_FREE", 10_000)
    expected = sample(model, CUT, 0)
    monkeypatch.setitem(decode._LOOK_EVERY, "cpu", every)
    assert_same(sample(model, CUT, 4, [near(turn, row) for row, turn in enumerate(expected)]), expected)


def test_a_part_has_the_samples_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = tiny_model(), [1, 4, 5, 11]
    monkeypatch.setattr(guess, "_FREE", 10_000)
    expected = sample(model, CUT, 0)
    references = [near(turn, row) for row, turn in enumerate(expected)]
    asked = []
    take = Guesses.take
    monkeypatch.setattr(
        Guesses, "take", lambda self, *given: asked.append(self._text_BR.tolist()) or take(self, *given)
    )
    assert_same(sample(model, CUT, 4, references, part=part), [expected[place] for place in part])
    first = [[token for token in text if token >= 0] for text in asked[0]]
    assert sorted(first) == sorted(references[place] for place in part)


@pytest.mark.parametrize("budget", [262_144, 60])
def test_right_guesses_save_passes(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 tokens the first comes from the prompt, then each pass gives up to nine; in several calls, too."""
    model, tried, reads = tiny_model(), [], []
    monkeypatch.setattr(guess, "_FREE", 10_000)
    sampling = OPEN.model_copy(update={"batch_tokens": budget})
    expected = HFSampler(model, eos_ids=(), pad_id=PAD, decode=str).sample(PROMPTS, sampling, seed=1)
    sampler = HFSampler(model, eos_ids=(), pad_id=PAD, decode=str, guess=8)
    sampler.sample([[5]], sampling, seed=0)  # compares the two loops
    read, try_on = Decoder.read, Decoder.try_on
    monkeypatch.setattr(Decoder, "read", lambda self, *given, **more: reads.append(1) or read(self, *given, **more))
    monkeypatch.setattr(Decoder, "try_on", lambda self, ids, *rest: tried.append(len(ids)) or try_on(self, ids, *rest))
    assert_same(sampler.sample(PROMPTS, sampling, seed=1, references=[t.completion_ids for t in expected]), expected)
    assert len(tried) == 3 * len(reads)
    assert (len(reads) > 1) == (budget == 60)
    tried.clear()
    assert_same(sampler.sample(PROMPTS, sampling, seed=1), expected)
    assert not tried, "nothing to guess from"


def test_memory_that_was_never_written_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns behind a row's end are read under a weight of 0, which NaN there would survive."""
    monkeypatch.setattr(guess, "_FREE", 10_000)
    model = tiny_model()
    expected = sample(model, CUT, 0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, **more: empty(*given, **more).fill_(float("nan")))
    assert_same(sample(model, CUT, 4, [near(turn, row) for row, turn in enumerate(expected)]), expected)


def drawn(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_where_a_row_stands_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "count", lambda self, rows: 3)
    guesses = Guesses([[1, 2, 3, 4, 5, 2, 3, 9], [7]], 3, torch.zeros(2, 100), 64)
    ended = torch.tensor([False, False])
    assert guesses.take(drawn([1], [8]), ended).tolist() == [0, 0], "a first token is sampled, not guessed"
    assert guesses.tallied().tolist() == [1, 2], "but one of two would have been right"
    assert guesses.next().tolist() == [[2, 3, 4], [0, 0, 0]], "behind the end of a reference stands nothing"
    assert guesses.take(drawn([2, 3, 6, 50], [0, 0, 0, 0]), ended).tolist() == [2, 0], "padding is never right"
    assert guesses.tallied().tolist() == [2, 3 + 1]
    assert guesses.next().tolist()[0] == [5, 2, 3], "6 stands for 4"
    assert guesses.take(drawn([9, 0, 0, 0], [0, 0, 0, 0]), ended).tolist()[0] == 0
    guesses.next()
    assert guesses.take(drawn([2, 3, 1, 1], [0, 0, 0, 0]), ended).tolist()[0] == 2
    assert guesses.next().tolist()[0] == [0, 0, 0], "9 stood for 5, 1 for 9, and then it ends"
    for token in (8, 2, 3):
        guesses.next()
        guesses.take(drawn([token, 0, 0, 0], [0, 0, 0, 0]), ended)
    assert guesses.next().tolist()[0] == [9, 0, 0], "2 3 stand together twice; the second is nearer to the end"


def test_the_nearest_of_two_occurrences_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "count", lambda self, rows: 2)
    guesses = Guesses([[1, 2, 3, 8, 8, 8, 8, 8, 8, 2, 3, 9]], 2, torch.zeros(1, 100), 64)
    ended = torch.tensor([False])
    for token in (2, 3):
        guesses.take(drawn([token]), ended)
        found = guesses.next()
    assert found.tolist() == [[8, 8]]


def test_rows_that_have_ended_are_not_tallied() -> None:
    guesses = Guesses([[1, 2], [1, 2]], 4, torch.zeros(2, 100), 64)
    guesses.take(drawn([1], [5]), torch.tensor([False, True]))
    assert guesses.tallied().tolist() == [1, 1]
    assert guesses.tallied().tolist() == [0, 0], "each is told once"


def test_rows_that_leave_take_their_references_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "count", lambda self, rows: 2)
    guesses = Guesses([[1, 2, 3, 4], [5, 6, 7, 5, 6, 8]], 2, torch.zeros(2, 100), 64)
    guesses.take(drawn([1], [5]), torch.tensor([False, False]))
    guesses.keep(torch.tensor([1]))
    assert guesses.next().tolist() == [[6, 7]]
    guesses.take(drawn([6, 1, 1]), torch.tensor([False]))
    assert guesses.next().tolist() == [[5, 6]], "1 stands for 7"


@pytest.mark.parametrize(
    ("rows", "right", "asked", "expected"),
    [
        (12, 0, 1000, 0),  # nothing is ever right: no guess
        (12, 1000, 1000, 40),  # all is right: as many as may be
        (64, 700, 1000, 1),  # 1 / 128, 1.7 / 192 = .00885, 2.19 / 256 = .00855
        (12, 700, 1000, 3),  # 2.19 / 100 = .0219, 2.533 / 112 = .0226, 2.773 / 124 = .0224
        (1, 500, 1000, 5),  # 1.9375 / 69 = .02808, 1.96875 / 70 = .02813, 1.984375 / 71 = .02795
    ],
)
def test_as_many_are_guessed_as_pay(rows: int, right: int, asked: int, expected: int) -> None:
    pace = Pace(40, 1000, 64)
    pace.hear(right, asked)
    share = (0.4 + right) / (0.8 + asked)
    worth = [sum(share**power for power in range(count + 1)) / (64 + rows * (count + 1)) for count in range(41)]
    assert pace.count(rows) == worth.index(max(worth))
    assert pace.count(rows) == expected


@pytest.mark.parametrize(
    ("weights", "precise", "free"),
    [
        (3_538_944, True, 10),  # SmolLM2-135M: 8 + 2
        (196_608, True, 58),  # the pico tier: 8 + 50
        (10_000, True, 64),
        (3_538_944, False, 64),  # in half precision, or on a GPU
    ],
)
def test_a_large_layer_in_float32_has_few_free_positions(weights: int, precise: bool, free: int) -> None:
    assert free_positions(weights, is_precise=precise) == free


@pytest.mark.parametrize(("dtype", "free"), [(torch.float32, 8 + 10), (torch.bfloat16, 64)])
def test_a_decoder_knows_its_layers_size(dtype: torch.dtype, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hands it to the pace: launching takes as long here as ten positions of a layer of the tiny model."""
    model = tiny_model().to(dtype)
    layer = model.model.layers[0]
    size = sum(each.weight.numel() for each in layer.modules() if isinstance(each, torch.nn.Linear))
    monkeypatch.setattr(guess, "_LAUNCHING", 10 * size)
    assert Decoder(model).free == free
    paces: list[int] = []
    monkeypatch.setattr(decode, "Guesses", lambda *given: paces.append(given[3]) or Guesses(*given))
    sample(model, OPEN, 3, [[1, 2, 3]] * len(PROMPTS))
    assert set(paces) == {free}


def test_a_pace_forgets() -> None:
    pace = Pace(40, 1000, 64)
    pace.hear(0, 100)
    assert pace.count(12) == 0
    for _ in range(20):
        pace.hear(100, 100)
    assert pace.count(12) > 20
    for _ in range(20):
        pace.hear(0, 100)
    assert pace.count(1) == 0


@pytest.mark.parametrize(("vocabulary", "rows", "most"), [(2**15, 64, 15), (2**15, 1024, 0), (2**15, 4096, 0)])
def test_logits_of_a_pass_are_bounded(vocabulary: int, rows: int, most: int) -> None:
    pace = Pace(40, vocabulary, 64)
    pace.hear(10**9, 10**9)
    assert pace.count(rows) == most


def test_the_recipe_says_how_many() -> None:
    class Spoken:
        eos_ids, pad_id, decode = ENDS, PAD, staticmethod(str)

    model = tiny_model()
    for most in (0, 8, 3):
        sampler: Any = HFEngine(guess=most).build(model, Spoken())  # type: ignore[arg-type]
        assert sampler._guess == most
    assert HFEngine().guess == 8
    assert HFEngine.guesses


@pytest.mark.parametrize("most", [0, 8])
def test_a_recipes_rollouts_take_fewer_passes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pico tier's own model and solutions, by the setup of a run."""
    config = build_config(
        {
            "threads": 1,
            "task": {"kind": "pico", "train_size": 6, "probe_size": 1, "eval_size": 1},
            "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
            "rollout": {"max_new_tokens": 48, "group_size": 2, "engine": {"kind": "hf", "guess": most}},
        }
    )
    model, tokenizer = load(config.model, 0, None)
    driver, _, task = sampling_side(config, model, tokenizer)
    passes: list[str] = []
    for name in ("step", "try_on"):
        run = getattr(Decoder, name)
        monkeypatch.setattr(Decoder, name, lambda *given, _run=run, _name=name: passes.append(_name) or _run(*given))
    groups = driver.rollout(task.train(), config.rollout, seed=3)
    longest = max(len(each.final.completion_ids) for group in groups for each in group.trajectories)
    compared = 1
    assert set(passes[compared:]) == {"try_on" if most else "step"}
    if most:
        assert len(passes) < 0.7 * longest
    else:
        assert len(passes) == longest - 1 + compared


def test_useless_references_are_soon_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first six tokens are right, and then nothing is."""
    model, tried = tiny_model(), []
    sampler = HFSampler(model, eos_ids=(), pad_id=PAD, decode=str, guess=8)
    try_on = Decoder.try_on
    monkeypatch.setattr(
        Decoder, "try_on", lambda self, ids, *rest: tried.append(ids.shape[1]) or try_on(self, ids, *rest)
    )
    expected = sampler.sample(PROMPTS, OPEN, seed=0)
    assert not tried
    references = [[*turn.completion_ids[:6], *[PAD] * 30] for turn in expected]
    assert_same(sampler.sample(PROMPTS, OPEN, seed=0, references=references), expected)
    assert tried[0] > 2
    assert tried[-1] == 1
