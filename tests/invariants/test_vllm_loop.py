"""A run over a vLLM server: what a server does on the way changes nothing, and what was sampled is what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.types import UserError

from support.fake_vllm import PICO, FakeVllm, sends
from support.vllm_runs import TREE, killed_in_step_2, outcome, started

pytestmark = [
    pytest.mark.filterwarnings("ignore:the vLLM server at:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning"),
]
TURNS: dict[str, Any] = {
    **TREE,
    "model": {"path": "pico-doors", "lora": {"r": 2, "alpha": 8}},
    "task": {"kind": "doors", "train_size": 6, "probe_size": 1, "eval_size": 2},
    "env": {"kind": "doors"},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n{answer}"},
    "reveal": {"kind": "turns"},
    "rollout": TREE["rollout"] | {"max_new_tokens": 3},
    "step": {"num_steps": 1, "problems": 2},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("whole") / "run"
    with FakeVllm() as fake:
        started(fake, run).train()
        versions = [path.rpartition("-v")[2] for path in fake.paths]
    assert versions == ["0", "1", "2", "3"], "one adapter an update"
    return outcome(run)


def test_what_the_server_sampled_is_what_the_trainer_scores(undisturbed: Any) -> None:
    """Were one version of the adapter skipped, the weights that moved by 2e-2 would show."""
    steps = [row for row in undisturbed[0] if row["step"]]
    assert len(steps) == 3
    assert max(row["rollout/logprob_gap"] for row in steps) < 1e-4
    weights = [row["rl/sampler_weight"] for row in steps if "rl/sampler_weight" in row]
    assert weights == pytest.approx([1.0] * len(weights), abs=1e-4)


def test_a_server_that_is_killed_in_a_step_and_started_again_loses_nothing(undisturbed: Any, tmp_path: Path) -> None:
    with FakeVllm() as fake:
        trainer = started(fake, tmp_path / "run")
        killed_in_step_2(fake, trainer)
        trainer.train()
        assert [path.rpartition("-v")[2] for path in fake.paths] == ["0", "1", "1", "2", "3"]
    assert outcome(tmp_path / "run") == undisturbed


def test_a_run_whose_server_stays_away_ends_in_one_line_and_resumes(undisturbed: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with FakeVllm() as fake:
        trainer = started(fake, run, wait_s=1.0)

        def listen(row: dict[str, Any]) -> None:
            if row["step"] == 1:
                fake.faults += [sends((503, {}))] * 50

        trainer.listener = listen
        with pytest.raises(UserError, match=r"did not answer for 1 s .*continue with atesd train --resume"):
            trainer.train()
        fake.faults.clear()
    with FakeVllm() as other:  # somewhere else, too
        Trainer.resume(run, [f"rollout.engine.url={other.url}", "rollout.engine.wait_s=120.0"]).train()
    assert outcome(run) == undisturbed


def test_an_environment_of_several_turns_works_over_it(tmp_path: Path) -> None:
    with FakeVllm(folder=PICO.with_name("pico-doors")) as fake:
        started(fake, tmp_path / "run", TURNS).train()
        asked = [tuple(body["prompt"]) for body in fake.asked]
    (row,) = [row for row in RunDir.open(tmp_path / "run").metrics() if row["step"] == 1]
    assert row["rollout/turns_mean"] > 1
    assert row["rollout/logprob_gap"] < 1e-4
    later = [prompt for prompt in asked if any(prompt != first and prompt[: len(first)] == first for first in asked)]
    assert later, "a later turn's prompt begins with an earlier one's"


@pytest.mark.parametrize("is_probed", [True, False])
@pytest.mark.parametrize(("section", "longest"), [("rollout", 30), ("eval", 40)])
def test_a_context_too_small_for_some_prompt_is_refused_before_anything_is_sampled(
    section: str, longest: int, is_probed: bool, tmp_path: Path
) -> None:
    """Not in the step that draws that problem. The context is that which the text takes that names the model."""
    tree = TREE | {name: TREE[name] | {"max_new_tokens": 8} for name in ("rollout", "eval")}
    tree |= {section: TREE[section] | {"max_new_tokens": longest}}
    if not is_probed:
        tree |= {"task": TREE["task"] | {"probe_size": 0}, "exposure": {"kind": "fixed"}}
    with FakeVllm(max_length=127) as fake:
        tree = tree | {
            "prompt": TREE["prompt"] | {"student": "{problem}" + "+1" * 45, "evaluation": "{problem}" + "+1" * 45}
        }
        why = rf"a prompt of \d+ tokens plus a completion of up to {longest} .* context of 127: start it with a larger"
        with pytest.raises(UserError, match=why):
            started(fake, tmp_path / "run", tree)
        assert fake.asked == []
    assert not (tmp_path / "run").exists()


def test_an_episode_ends_where_the_servers_context_does(tmp_path: Path) -> None:
    """The model's own has room for more."""
    with FakeVllm(folder=PICO.with_name("pico-doors"), max_length=150) as fake:
        trainer = started(fake, tmp_path / "run", TURNS)
        assert trainer.parts.driver.room == 150


def test_full_weights_are_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    tree = TREE | {"model": {"path": "pico"}}
    with FakeVllm() as fake:
        with pytest.raises(UserError, match="here all weights train, which vLLM takes over no route"):
            started(fake, tmp_path / "run", tree)
        assert fake.asked == []
    assert not (tmp_path / "run").exists()
