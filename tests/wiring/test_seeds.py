"""Random numbers: of whom they depend and of whom not, told by the seeds that reach the sampler."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from support.recording import Recording, record
from support.wired import CONTRACT, SAMPLING, recipe

TINY: dict[str, Any] = {
    "target": {"kind": "extrapolate", "lambda_x": 1.5, "guard": True},
    "exposure": {"kind": "random", "hold": 1},
    "gate": {"kind": "none"},
    "routing": {"kind": "distil"},
    "cliff": CONTRACT | {"min_hits": 1},
    "rollout": SAMPLING | {"max_new_tokens": 12, "group_size": 1, "temperature": 1.5},
    "step": {"num_steps": 3, "problems": 2},
    "eval": {"every": 1, "k": 1},
    "probe": {"sampling_k": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    """Return runs with the seeds 5, 5 and 6."""
    folder = tmp_path_factory.mktemp("seeds")
    return [record(recipe("cliff", **TINY, seed=seed), folder / str(run)) for run, seed in enumerate((5, 5, 6))]


def seeds(run: Recording) -> dict[str, list[int]]:
    """Return the seeds of a run's requests by purpose."""
    purposes = {"train": run.trainer.parts.problems, "probe": run.probe, "eval": run.evaluation}
    found = {name: [call.seed for call in run.of(problems)] for name, problems in purposes.items()}
    assert sum(len(values) for values in found.values()) == len(run.calls)
    return found


def test_every_step_and_every_purpose_has_a_seed_of_its_own(runs: list[Recording]) -> None:
    for run in runs:
        found = seeds(run)
        assert len(set(found["train"])) == len(found["train"]) == 3
        assert len(set(found["eval"])) == len(found["eval"]) == 4
        assert len(found["probe"]) == 4
        assert len(set(found["probe"])) == 1, "the probe is sampled with the same seed every time"
        assert len({*found["train"], *found["eval"], *found["probe"]}) == 3 + 4 + 1


def test_seeds_follow_the_runs_seed(runs: list[Recording]) -> None:
    first, again, other = (seeds(run) for run in runs)
    assert first == again
    assert not {seed for values in first.values() for seed in values} & {
        seed for values in other.values() for seed in values
    }


def test_a_run_repeats_itself_and_another_seed_differs(runs: list[Recording]) -> None:
    first, again, other = runs
    assert [call.turns for call in first.calls] == [call.turns for call in again.calls]
    assert first.groups == again.groups
    ratios = [[run.groups[step][0]["ratio"] for step in (1, 2, 3)] for run in (first, other)]
    assert not set(ratios[0]) & set(ratios[1]), "the controller draws by the run's seed"


def test_evaluation_and_probe_ask_as_the_recipe_says(runs: list[Recording]) -> None:
    run = runs[0]
    for call in run.of(run.evaluation):
        wanted = {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 12}
        assert {key: call.sampling[key] for key in wanted} == wanted
        assert len(call.prompts) == len(run.evaluation)
    for call in run.of(run.probe):
        assert call.sampling["temperature"] == 1.5
        assert len(call.prompts) == 2 * len(run.probe)


def test_evaluations_are_of_the_weights_of_their_step(runs: list[Recording]) -> None:
    run = runs[0]
    assert [call.updates for call in run.of(run.evaluation)] == [0, 1, 2, 3]
    assert [call.updates for call in run.of(run.probe)] == [0, 1, 2, 3]
    for step, call in enumerate(run.of(run.evaluation)):
        texts = [row["completion"] for row in run.evaluations[step]]
        assert texts == [turn.text for turn in call.turns]


def test_the_streams_of_a_seed_stay_what_they_were(runs: list[Recording]) -> None:
    """A seed's published numbers hang on these names: numpy's SeedSequence over (seed, CRC-32 of the name, step)."""

    def stream(name: str, step: int = 0) -> int:
        words = np.random.SeedSequence([5, zlib.crc32(name.encode()), step]).generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))

    found = seeds(runs[0])
    assert found["train"] == [stream("sample", step) for step in range(3)]
    assert found["eval"] == [stream("eval", step) for step in range(4)]
    assert found["probe"] == [stream("probe")] * 4
