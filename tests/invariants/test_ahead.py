"""Sampling while the step before updates: from which weights, how that is corrected, and that nothing is lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Interrupted, Trainer
from atesd.train.resume import _check_longer
from atesd.train.teacher import trained_tensors
from atesd.types import UserError

from support.fake_vllm import FakeVllm
from support.vllm_runs import TREE, killed_in_step_2, outcome, started

pytestmark = [
    pytest.mark.filterwarnings("ignore:the vLLM server at:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning"),
]
CLIP = 1.05
# The limits of the gap are such that completions of older weights would end the run, were they judged.
AHEAD: dict[str, Any] = TREE | {
    "loss": {"divergence": {"kind": "sampled", "importance_clip": CLIP}},
    "rl": {"importance_clip": 1.2},
    "optim": {"lr": 0.5, "max_grad_norm": 0},
    "rollout": TREE["rollout"] | {"ahead": 1, "gap_warning": 1e-3, "gap_limit": 1e-3},
}


def logprobs(model: Any, row: Any) -> torch.Tensor:
    """Log-probabilities of a row's completion, in one pass of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*row.prompt, *row.completion]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(row.completion)[:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run, with what each update read, and the log-probabilities under the weights then and one update before."""
    run = tmp_path_factory.mktemp("whole") / "run"
    seen: list[Any] = []
    with FakeVllm() as fake:
        trainer = started(fake, run, AHEAD)
        model, optimize = trainer.parts.model, trainer.parts.stepper.optimize
        weights: list[dict[str, torch.Tensor]] = []

        def watching(rows: Any, *given: Any, **named: Any) -> Any:
            model.eval()
            weights.append({name: each.detach().clone() for name, each in trained_tensors(model).items()})
            now = [logprobs(model, row) for row in rows]
            before = weights[max(0, len(weights) - 2)]
            put(model, before)
            older = [logprobs(model, row) for row in rows]
            put(model, weights[-1])
            result = optimize(rows, *given, **named)
            seen.append((rows, now, older, result))
            return result

        trainer.parts.stepper.optimize = watching  # type: ignore[method-assign]
        trainer.train()
        asked = [(body["model"].rpartition("-")[2], body["seed"]) for body in fake.asked if body["n"] == 2]
        assert fake.adapters.keys() == {trainer.parts.driver.sampler._adapters.current.name}  # type: ignore[attr-defined]
    return seen, asked, outcome(run)


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, each in trained_tensors(model).items():
            each.copy_(weights[name])


def test_completions_are_of_the_weights_before_the_last_update(watched: Any) -> None:
    """Two problems a step: steps 1 and 2 are asked for from theta_0, step 3 from theta_1."""
    seen, asked, (rows, *_) = watched
    assert [version for version, _ in asked] == ["v0", "v0", "v0", "v0", "v1", "v1"]
    assert len({seed for _, seed in asked}) == len(asked), "no step samples with the seeds of another"
    assert [row["rollout/lag"] for row in rows[1:]] == [0.0, 1.0, 1.0]
    for read, _, older, _ in seen:
        for row, expected in zip(read, older, strict=True):
            assert list(row.sampler_logprobs) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-3)
    assert rows[1]["rollout/logprob_gap"] < 1e-4
    assert min(row["rollout/logprob_gap"] for row in rows[2:]) > 1e-3, "weights moved, or this shows nothing"


def test_losses_weigh_tokens_by_truncated_ratios_of_both_policies(watched: Any) -> None:
    """w = min(p_old / p_sampler, clip), each from a pass of its own."""
    seen, _, (rows, *_) = watched
    assert any(row["rollout/ratio_clipped"] > 0 for row in rows[2:]), "no clip was met"
    for step, (read, now, older, result) in enumerate(seen, 1):
        ratios = [(new - old).exp() for new, old in zip(now, older, strict=True)]
        every = torch.cat(ratios)
        assert rows[step]["rollout/ratio"] == pytest.approx(float(every.mean()), abs=1e-5)
        assert rows[step]["rollout/ratio_clipped"] == pytest.approx(float((every > CLIP).double().mean()))
        for index, ratio in enumerate(ratios):
            found = result.rows[index].weight_T.double()
            torch.testing.assert_close(found, ratio.clamp(max=CLIP), rtol=0, atol=1e-5)
        reinforced = [ratio for row, ratio in zip(read, ratios, strict=True) if "rl" in row.components]
        if "rl/sampler_weight" in rows[step]:
            expected = float(torch.cat(reinforced).clamp(max=1.2).mean())
            assert rows[step]["rl/sampler_weight"] == pytest.approx(expected, abs=1e-5)


def test_a_run_goes_on_bit_for_bit_with_what_was_under_way(watched: Any, tmp_path: Path) -> None:
    run, stop = tmp_path / "run", 1
    with FakeVllm() as fake:
        trainer = started(fake, run, AHEAD)

        def listen(row: dict[str, Any]) -> None:
            if row["step"] == stop:
                trainer.stop()

        trainer.listener = listen
        with pytest.raises(Interrupted):
            trainer.train()
    state = json.loads((run / "checkpoints" / f"step_{stop:06d}" / "state.json").read_text())
    assert [len(group) for group in state["ahead"]["attempts"]] == [2, 2]
    with FakeVllm() as other:
        Trainer.resume(run, [f"rollout.engine.url={other.url}"]).train()
    assert outcome(run) == watched[2]
    held = list(RunDir.open(run).metrics())[2]
    assert held["time/ahead_s"] == 0, "nobody sampled"
    assert "time/tokens_per_s" not in held, "nor at what speed"


def test_a_server_that_is_killed_meanwhile_and_started_again_loses_nothing(watched: Any, tmp_path: Path) -> None:
    with FakeVllm() as fake:
        trainer = started(fake, tmp_path / "run", AHEAD)
        killed = killed_in_step_2(fake, trainer)
        optimize = trainer.parts.stepper.optimize

        def behind(*given: Any, **named: Any) -> Any:
            """Update step 2 once the server is gone: when it goes is chance otherwise, and so is what it forgets."""
            assert trainer.step < 1 or killed.wait(timeout=100)
            return optimize(*given, **named)

        trainer.parts.stepper.optimize = behind  # type: ignore[method-assign]
        trainer.train()
        loaded = [path.rpartition("-v")[2] for path in fake.paths]
        assert sorted(loaded) == ["0", "1", "1", "2", "3"]
    assert outcome(tmp_path / "run") == watched[2]


def test_requests_are_under_way_while_the_trainer_updates_and_keep_their_adapter(tmp_path: Path) -> None:
    """The second step's answers are held back until the first step is over, sync included."""
    over, known = threading.Event(), []
    with FakeVllm() as fake:
        trainer = started(fake, tmp_path / "run", AHEAD | {"step": {"num_steps": 2, "problems": 2}})

        def held(server: FakeVllm, answer: Any) -> Any:
            known.append((over.wait(timeout=100), answer["model"] in server.adapters, len(server.adapters)))
            return answer

        def listen(row: dict[str, Any]) -> None:
            if row["step"] == 0:
                fake.faults += [lambda _, answer: answer] * 2 + [held] * 2
            if row["step"] == 1:
                over.set()

        trainer.listener = listen
        # The checkpoint behind step 1 waits for them, as step 2 would: they are over by then.
        trainer.train()
    assert known == [(True, True, 2)] * 2
    rows = list(RunDir.open(tmp_path / "run").metrics())
    assert rows[2]["time/ahead_s"] > 0
    assert "time/ahead_s" not in rows[1]


def test_a_run_that_fails_gives_up_what_is_under_way(tmp_path: Path) -> None:
    with FakeVllm() as fake:
        trainer = started(fake, tmp_path / "run", AHEAD)
        trainer.parts.stepper.optimize = lambda *_, **__: (_ for _ in ()).throw(UserError("no"))  # type: ignore[method-assign]
        with pytest.raises(UserError, match="no"):
            trainer.train()
        assert not trainer._ahead


def test_a_longer_run_would_have_been_another() -> None:
    config = build_config(AHEAD | {"rollout": AHEAD["rollout"] | {"engine": {"kind": "vllm"}}})
    with pytest.raises(UserError, match=r"rollout\.ahead = 1 depends on the length of the run"):
        _check_longer("here", config, 2, 3)


VLLM = {"engine": {"kind": "vllm"}, "ahead": 1}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"rollout": {"ahead": 1}}, 'rollout.engine.kind = "hf" can only do one after the other'),
        ({"rollout": VLLM | {"ahead": 2}}, "less than or equal to 1"),
        ({"rollout": VLLM, "routing": {"kind": "sft"}}, 'has no effect, as routing.kind = "sft" samples nothing'),
        (
            {"rollout": VLLM, "task": {"kind": "doors"}, "env": {"kind": "doors"}, "reveal": {"kind": "turns"}},
            'asks for single replies, and env.kind = "doors" answers them',
        ),
        (
            {"rollout": VLLM, "task": {"kind": "doors"}, "env": {"kind": "doors", "limit": 1}},
            'asks for single replies, and env.kind = "doors" answers them',
        ),
        (
            {"rollout": VLLM, "loss": {"temperature_student": 0.5, "divergence": {"kind": "sampled"}}},
            "remove loss.temperature_student = 0.5",
        ),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        build_config(changed)
