"""What a plan says: bytes and seconds by hand for a small model, real peaks, remedies, and that no weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, Qwen3Config

from atesd.cli.plan import assumptions
from atesd.config import RunConfig
from atesd.recipe import build_config, load_config, with_overrides
from atesd.train.batch import micro_batches
from atesd.train.plan import DEVICES, GIB, Device, Lengths, lower_until_it_fits, make_plan
from atesd.train.traced import activations, skeleton
from atesd.types import UserError

from support.peaks import measured_sampling, measured_update, planned, small_config

ROOM = Device("test", 4 * GIB, 1e12, 1e11, share=0.5, context=7.0)


def write_config(folder: Path, **settings: Any) -> Path:
    """Write a config.json, and nothing else."""
    tiny = {
        "vocab_size": 1000,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "tie_word_embeddings": True,
    }
    Qwen3Config(**(tiny | settings)).save_pretrained(folder)
    return folder


def recipe(folder: Path, **sections: Any) -> RunConfig:
    sections["model"] = {"path": str(folder), **sections.get("model", {})}
    return build_config(sections)


# Of the model above. A layer: q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 16; two norms of 8, two of 2.
LINEAR = 2 * 64 + 2 * 32 + 3 * 128
WEIGHTS = 1000 * 8 + 3 * (LINEAR + 2 * 8 + 2 * 2) + 8


def test_weights_copies_and_optimizer_by_hand(tmp_path: Path) -> None:
    plan = make_plan(recipe(write_config(tmp_path)), ROOM, Lengths(10, 20))
    assert plan.parameters == plan.trained == WEIGHTS == 9796
    assert plan.always == {"libraries": 7.0, "weights": 4 * 9796, "teacher copies": 4 * 9796, "optimizer": 8 * 9796}
    live = make_plan(recipe(tmp_path, teacher={"weights": "live"}), ROOM, Lengths(10, 20))
    assert live.always["teacher copies"] == 0
    # In bfloat16 the optimizer holds masters beside its two averages, all in float32, as is the teacher's average.
    half = recipe(tmp_path, model={"dtype": "bfloat16"}, teacher={"weights": "ema"})
    assert make_plan(half, ROOM, Lengths(10, 20)).always == {
        "libraries": 7.0,
        "weights": 2 * 9796,
        "teacher copies": 4 * 9796,
        "optimizer": 12 * 9796,
    }
    # Adapters of rank 2 on seven projections: 2 (in + out) each, in float32; the base in bfloat16; no copy.
    adapters = 3 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    lora = recipe(tmp_path, model={"lora": {"r": 2}, "dtype": "bfloat16"})
    plan = make_plan(lora, ROOM, Lengths(10, 20))
    assert plan.trained == adapters == 768
    assert plan.always["weights"] == 2 * 9796 + 4 * 768
    assert (plan.always["teacher copies"], plan.always["optimizer"]) == (0, 8 * 768)
    ema = with_overrides(lora, ['teacher.weights="ema"'])
    assert make_plan(ema, ROOM, Lengths(10, 20)).always["teacher copies"] == 4 * 768
    four = with_overrides(lora, ['model.quantization="4bit"'])
    shrunk = make_plan(four, ROOM, Lengths(10, 20)).always["weights"]
    assert shrunk == pytest.approx(2 * 9796 + 4 * 768 - 3 * LINEAR * (2 - 0.516))


def test_cache_and_logits_of_sampling_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(
        write_config(tmp_path),
        step={"problems": 6},
        rollout={"max_new_tokens": 30, "group_size": 2, "batch_tokens": 200, "engine": {"kind": "hf", "guess": 0}},
    )
    # 200 // (10 + 30) = 5 of the 12 rows at a time; cache: 40 positions x 3 layers x (key + value) x 2 heads x 2 x 4 B.
    sampling = make_plan(config, ROOM, Lengths(10, 20)).phases["sampling"]
    assert sampling["key-value cache"] == 5 * 40 * 3 * 2 * 2 * 2 * 4
    assert sampling["logits"] == 5 * 1000 * (4 + 16)
    guessing = with_overrides(config, ["rollout.engine.guess=8"])
    assert make_plan(guessing, ROOM, Lengths(10, 20)).phases["sampling"]["logits"] == 5 * 9 * 1000 * (4 + 16)
    monkeypatch.setattr("atesd.train.plan.LARGEST_LOGITS", 7_500)
    assert make_plan(guessing, ROOM, Lengths(10, 20)).phases["sampling"]["logits"] == 7 * 1000 * (4 + 16)
    monkeypatch.setattr("atesd.train.plan.LARGEST_LOGITS", 500)
    assert make_plan(guessing, ROOM, Lengths(10, 20)).phases["sampling"]["logits"] == 5 * 1000 * (4 + 16)
    # One pass over 5 prompts of 10: three rows of the widest layer, 16, and four of H = 8 a position.
    assert sampling["reading prompts"] == 5 * 10 * (3 * 16 + 4 * 8) * 4
    whole = make_plan(config, ROOM, Lengths(10, 20))
    assert (
        whole.rows,
        make_plan(with_overrides(config, ["step.updates_per_batch=3"]), ROOM, Lengths(10, 20)).rows,
    ) == (
        12,
        4,
    ), "micro-batches hold rows of one update"
    wide = with_overrides(config, ["rollout.batch_tokens=100000"])
    assert make_plan(wide, ROOM, Lengths(10, 20)).phases["sampling"]["logits"] == 12 * 1000 * 20
    evaluated = make_plan(with_overrides(config, ["eval.problems=1", "eval.k=3"]), ROOM, Lengths(10, 20))
    assert evaluated.phases["evaluation"]["logits"] == 3 * 1000 * 20


def test_references_are_not_sampled(tmp_path: Path) -> None:
    config = recipe(write_config(tmp_path), routing={"kind": "sft"})
    plan = make_plan(config, ROOM, Lengths(10, 20))
    assert (list(plan.phases), "sampling" in plan.seconds) == (["update", "evaluation"], False)
    assert "sampling" in make_plan(recipe(tmp_path), ROOM, Lengths(10, 20)).phases


def test_passes_beforehand_cost_what_the_students_and_the_teachers_do(tmp_path: Path) -> None:
    """TIP chooses over the batch by both; several updates keep the old log-probabilities, a KL term those of step 0."""
    write_config(tmp_path)
    few = {"step": {"problems": 4}, "rollout": {"max_new_tokens": 30, "group_size": 2}}

    def beforehand(**sections: Any) -> tuple[float, float]:
        config = recipe(tmp_path, **few | sections)
        plan = make_plan(config, ROOM, Lengths(10, 20))
        student = (plan.seconds["update"] - 2 * 9796 * 8 * 39 / (1e12 * 0.5)) / 2  # a third of forward and backward
        return plan.seconds["scores beforehand"] / student, plan.seconds["teacher"] / student

    assert beforehand()[0] == 0
    score, teacher = beforehand(selection={"kind": "tip"})
    assert score == pytest.approx(1 + teacher)
    several = {"step": {"problems": 4, "updates_per_batch": 2}}
    assert beforehand(**several)[0] == 0, "a divergence reads no old log-probabilities"
    assert beforehand(**several, loss={"divergence": {"kind": "sampled"}})[0] == pytest.approx(1)
    assert beforehand(**several, routing={"kind": "rl"}, rl={"kl_coef": 0.1})[0] == pytest.approx(2)


def test_gpt2s_layers_count_as_products(tmp_path: Path) -> None:
    """q, k and v 8 x 24, o 8 x 8, up 8 x 32, down 32 x 8; a forward pass over n positions takes 2 n times as many."""
    GPT2Config(vocab_size=1000, n_embd=8, n_layer=3, n_head=4, n_positions=64).save_pretrained(tmp_path)
    config = recipe(tmp_path, step={"problems": 4}, rollout={"max_new_tokens": 30})
    body = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 32)
    forward = 4 * 59 * (2 * body + 2 * 59 * 3 * 4 * 2) + 4 * 30 * 2 * 1000 * 8
    assert make_plan(config, ROOM, Lengths(10, 20)).seconds["teacher"] == pytest.approx(forward / (1e12 * 0.5))


def test_seconds_of_an_update_by_hand(tmp_path: Path) -> None:
    config = recipe(write_config(tmp_path), step={"problems": 4}, rollout={"max_new_tokens": 30})
    plan = make_plan(config, ROOM, Lengths(10, 20))
    rate, body, head = 1e12 * 0.5, 3 * LINEAR, 2 * 1000 * 8

    def forward(length: int) -> float:  # 4 rows; attention: 4 heads of 2, 3 layers, causal half of 4
        return 4 * length * (2 * body + 2 * length * 3 * 4 * 2) + 4 * 30 * head

    assert plan.seconds["teacher"] == pytest.approx(forward(59) / rate)
    assert plan.seconds["update"] == pytest.approx((2 * forward(39) + 2 * 9796 * 4 * 39) / rate)
    again = with_overrides(config, ["model.gradient_checkpointing=true"])
    assert make_plan(again, ROOM, Lengths(10, 20)).seconds["update"] == pytest.approx(
        (3 * forward(39) + 2 * 9796 * 4 * 39) / rate
    )
    # Decoding: 4 rows are few, so that reading weights and half of the cache bounds it.
    read = 4 * (body + 1000 * 8) + 4 * (10 + 15) * 3 * 2 * 2 * 2 * 4
    assert plan.seconds["sampling"] == pytest.approx(
        30 * read / (1e11 * 0.5) + (4 * 10 * (2 * body + 2 * 10 * 24) + 2 * 4 * 8000) / rate
    )
    assert plan.step_s == sum(plan.seconds.values())


def test_activations_grow_with_rows_and_layers_and_eager_keeps_its_matrices(tmp_path: Path) -> None:
    model = skeleton(recipe(write_config(tmp_path / "a")).model)
    kept, layer = activations(model, 2, 16)
    assert activations(model, 4, 16)[0] == pytest.approx(2 * kept, rel=0.02)
    deeper = skeleton(recipe(write_config(tmp_path / "b", num_hidden_layers=6)).model)
    assert activations(deeper, 2, 16)[0] - kept == pytest.approx(3 * layer, rel=0.1)
    # A fused kernel keeps no matrix [2, 4, 16, 16] a layer.
    eager = skeleton(recipe(tmp_path / "a", model={"attn_implementation": "eager"}).model)
    assert activations(eager, 2, 16)[0] > kept + 3 * 4 * (2 * 4 * 16 * 16) / 2


CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights in bfloat16": {"model": {"dtype": "bfloat16"}},
    "adapters in bfloat16, checkpointing": {
        "model": {"lora": {}, "dtype": "bfloat16", "gradient_checkpointing": True},
    },
    "small tiles, several micro-batches": {"loss": {"tile_logits": 200_000}, "step": {"token_budget": 600}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_real_update_is_within_a_fifth(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = small_config(tmp_path / "model", **{**case, "step": {"problems": 8, **case.get("step", {})}})
    assert planned(config, "update") == pytest.approx(measured_update(config), rel=0.2)


def test_the_peak_of_real_sampling_is_within_a_third(tmp_path: Path) -> None:
    config = small_config(tmp_path / "model", step={"problems": 8}, rollout={"engine": {"kind": "hf", "guess": 0}})
    assert planned(config, "sampling") == pytest.approx(measured_sampling(config), rel=0.33)


def test_the_peak_of_sampling_that_guesses_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are guessed as may be, from the first pass on; the plan counts more copies of logits than are alive."""
    monkeypatch.setattr("atesd.rollout.guess._FREE", 10_000)
    config = small_config(tmp_path / "model", step={"problems": 8})
    found = measured_sampling(config)
    assert found <= planned(config, "sampling") <= 2 * found
    assert found > 1.5 * measured_sampling(with_overrides(config, ["rollout.engine.guess=0", "rollout.engine.kind=hf"]))


def test_what_does_not_fit_is_lowered_until_it_does(tmp_path: Path) -> None:
    config = recipe(write_config(tmp_path), step={"problems": 8}, rollout={"max_new_tokens": 30})
    before = make_plan(config, ROOM, Lengths(10, 20))
    assert before.rows == 8
    remedy = lower_until_it_fits(config, ROOM, Lengths(10, 20), 0.75 * before.peak)
    assert remedy.fits
    assert remedy.plan.peak <= 0.75 * before.peak
    assert remedy.plan == make_plan(with_overrides(config, remedy.overrides), ROOM, Lengths(10, 20))
    nothing = lower_until_it_fits(config, ROOM, Lengths(10, 20), 10.0)
    assert not nothing.fits
    assert {key.partition("=")[0] for key in nothing.overrides} >= {"model.lora", "model.quantization"}
    assert lower_until_it_fits(config, ROOM, Lengths(10, 20), before.peak).overrides == ()


def test_no_weight_is_needed_and_a_wrong_config_is_one_line(tmp_path: Path) -> None:
    assert [path.name for path in write_config(tmp_path).iterdir()] == ["config.json"]
    assert next(skeleton(recipe(tmp_path).model).parameters()).is_meta
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match=r"no causal language model can be planned from .*: give a folder with"):
        skeleton(recipe(tmp_path).model)


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_the_papers_recipes_hold_its_settings(size: str) -> None:
    opsd, atesd = load_config(f"qwen3-{size}-opsd"), load_config(f"qwen3-{size}-atesd")
    assert opsd.model.path.lower() == f"qwen/qwen3-{size}"
    assert (opsd.model.lora.r, opsd.model.lora.alpha, len(opsd.model.lora.targets)) == (64, 128, 7)  # type: ignore[union-attr]
    assert (opsd.optim.lr, opsd.optim.max_grad_norm, opsd.optim.weight_decay, opsd.optim.warmup_steps) == (
        5e-6,
        0.1,
        0,
        0,
    )
    rollout = opsd.rollout
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens) == (1.1, 0.95, 20, 1024)
    assert (opsd.step.problems, rollout.group_size, opsd.step.num_steps, opsd.save.every) == (32, 1, 100, 25)
    assert (opsd.prompt.enable_thinking_student, opsd.prompt.enable_thinking_teacher) == (False, True)
    assert (opsd.loss.divergence.kind, opsd.loss.clip, opsd.teacher.weights) == ("forward_kl", "none", "frozen")
    assert (opsd.exposure.kind, opsd.exposure.ratio) == ("fixed", 1.0)  # type: ignore[union-attr]
    beta = atesd.exposure
    assert (beta.kind, beta.hold, beta.look_ahead, beta.gamma) == ("beta", 5, 10, 0.9)  # type: ignore[union-attr]
    others = {"exposure"}
    assert opsd.model_dump(exclude=others) == atesd.model_dump(exclude=others), "they differ in the exposure alone"


def test_the_released_loss_is_a_preset_of_its_own() -> None:
    released, ours = load_config("qwen3-1.7b-opsd-v3"), load_config("qwen3-1.7b-opsd")
    assert (released.loss.clip, released.loss.clip_tau) == ("pointwise", 0.05)
    assert released.model_dump(exclude={"loss"}) == ours.model_dump(exclude={"loss"})


def test_known_devices_say_what_vendors_say() -> None:
    assert (DEVICES["h100"].flops, DEVICES["h100"].bandwidth) == (989e12, 3350e9)
    assert 79 < DEVICES["h100"].memory / GIB < 80


def test_a_step_0_copy_is_needed_where_the_teacher_is_none_and_it_is_read(tmp_path: Path) -> None:
    weights = 4 * WEIGHTS
    anchored = {"kind": "anchor_mix", "anchor": "base"}
    for teacher, copies in (("live", 1), ("ema", 2), ("frozen", 1)):
        config = recipe(write_config(tmp_path), teacher={"weights": teacher}, target=anchored)
        assert make_plan(config, ROOM, Lengths(10, 20)).always["teacher copies"] == copies * weights
    adapted = with_overrides(config, ['teacher.weights="live"', "model.lora={r=2}"])
    assert make_plan(adapted, ROOM, Lengths(10, 20)).always["teacher copies"] == 0, "the adapter switched off"


def test_a_run_that_distils_nothing_copies_weights_for_a_kl_term_alone(tmp_path: Path) -> None:
    weights, group = 4 * WEIGHTS, {"group_size": 2}
    for sections, copies in (
        ({"routing": {"kind": "sft"}}, 0),
        ({"routing": {"kind": "sft"}, "teacher": {"weights": "ema"}}, 0),
        ({"routing": {"kind": "rl"}, "rl": {"kl_coef": 0.0}, "rollout": group}, 0),
        ({"routing": {"kind": "rl"}, "rl": {"kl_coef": 0.1}, "rollout": group}, 1),
    ):
        config = recipe(write_config(tmp_path), **sections)
        assert make_plan(config, ROOM, Lengths(10, 20)).always["teacher copies"] == copies * weights


def test_the_optimizers_own_moment_on_a_gpu_by_hand(tmp_path: Path) -> None:
    """With one token to learn from, gradients and AdamW's list of as many numbers outweigh all else."""
    config = recipe(write_config(tmp_path), step={"problems": 1}, rollout={"max_new_tokens": 1})
    assert make_plan(config, ROOM, Lengths(2, 2)).phases["update"] == {"gradients": 4 * 9796, "AdamW": 4 * 9796}
    cpu = replace(ROOM, is_gpu=False)
    assert "AdamW" not in make_plan(config, cpu, Lengths(2, 2)).phases["update"]


def test_seconds_of_several_calls_views_and_decoding_bound_by_operations_by_hand(tmp_path: Path) -> None:
    config = recipe(write_config(tmp_path), step={"problems": 4}, rollout={"max_new_tokens": 30})
    rate, body = 1e12 * 0.5, 3 * LINEAR
    # Two calls of two rows each where a call holds 80 // (10 + 30) rows.
    split = make_plan(with_overrides(config, ["rollout.batch_tokens=80"]), ROOM, Lengths(10, 20))
    read = 4 * (body + 1000 * 8) + 2 * (10 + 15) * 3 * 2 * 2 * 2 * 4
    prompts = (2 * 10 * (2 * body + 2 * 10 * 24) + 2 * 2 * 8000) / rate
    assert split.seconds["sampling"] == pytest.approx(2 * (30 * read / (1e11 * 0.5) + prompts))
    # A token at half of the completion: context 25, 4 rows.
    wide = make_plan(config, replace(ROOM, bandwidth=1e20), Lengths(10, 20))
    token = 4 * (2 * body + 2 * 25 * 24) + 2 * 4 * 8000
    assert wide.seconds["sampling"] == pytest.approx(
        30 * token / rate + (4 * 10 * (2 * body + 2 * 10 * 24) + 2 * 4 * 8000) / rate
    )
    mixed = make_plan(with_overrides(config, ['target={kind="anchor_mix"}']), ROOM, Lengths(10, 20))
    one = make_plan(config, ROOM, Lengths(10, 20))
    assert mixed.seconds["teacher"] == pytest.approx(2 * one.seconds["teacher"])
    assert mixed.seconds["update"] == one.seconds["update"]


@pytest.mark.parametrize("routing", ["distil", "sft"])
def test_a_micro_batch_has_the_rows_that_an_update_cuts(routing: str, tmp_path: Path) -> None:
    config = recipe(
        write_config(tmp_path),
        step={"problems": 12, "token_budget": 200},
        rollout={"max_new_tokens": 30},
        routing={"kind": routing},
    )
    student = 10 + 30 - 1
    cut = next(micro_batches([student] * 12, 200))
    assert make_plan(config, ROOM, Lengths(10, 20)).rows == len(cut) == 5


def test_a_teachers_pass_is_bounded_by_the_budget_or_one_row(tmp_path: Path) -> None:
    """Three widest and hidden states a position (2 x 16 + 4 x 8 numbers) of 4 bytes; 8,000-entry tiles are dwarfed."""

    def taught(budget: int, solution: int) -> float:
        sections = {"step": {"problems": 4, "token_budget": budget}, "rollout": {"max_new_tokens": 30}}
        long = write_config(tmp_path, max_position_embeddings=200_000)
        plan = make_plan(recipe(long, **sections), ROOM, Lengths(10, solution))
        return plan.phases["update"]["teacher's pass"]

    scored = 2 * 30 * 8 * 4  # a row's hidden states of both roles
    assert taught(4 * 39, 100_000) == 64 * 4 * 100_039 + 4 * scored
    assert taught(300_000, 100_000) == 64 * 4 * 300_000 + 4 * scored
    assert taught(1_000_000, 100_000) == 64 * 4 * 4 * 100_039 + 4 * scored


def test_what_is_lowered_first_and_to_what(tmp_path: Path) -> None:
    def first(**sections: Any) -> str:
        config = recipe(write_config(tmp_path), eval={"problems": 1, "k": 1} | sections.pop("eval", {}), **sections)
        peak = make_plan(config, ROOM, Lengths(10, 20)).peak
        return lower_until_it_fits(config, ROOM, Lengths(10, 20), peak - 1).overrides[0]

    rollout = {"max_new_tokens": 30}
    # Half of 8 rows, each of 10 + 30 - 1 positions: the update is cut by what the student reads, whoever teaches.
    assert first(step={"problems": 8}, rollout=rollout) == f"step.token_budget={4 * 39}"
    assert first(step={"problems": 8}, rollout=rollout, routing={"kind": "sft"}) == f"step.token_budget={4 * 39}"
    assert first(step={"problems": 1}, rollout=rollout) == "model.gradient_checkpointing=true"
    # Half of 6000 // (10 + 50) rows of evaluation.
    evaluated = {"problems": 64, "k": 64, "max_new_tokens": 50}
    small = {"max_new_tokens": 10, "batch_tokens": 6000}
    assert first(step={"problems": 1}, rollout=small, eval=evaluated) == f"rollout.batch_tokens={50 * 60}"


def test_no_longer_texts_are_planned_than_the_model_reads(tmp_path: Path) -> None:
    asked = Lengths(200, 1000)
    assert asked.within(None, 100) is asked.within(1300, 100) is asked
    assert asked.within(1299, 100) == Lengths(199, 1000)  # 1199 are left: 200 * 1199 / 1200, and the rest
    assert asked.within(148, 100) == Lengths(8, 40)
    assert asked.within(50, 100) == Lengths(1, 0)
    config = recipe(write_config(tmp_path, max_position_embeddings=28), rollout={"max_new_tokens": 8})
    plan = make_plan(config, ROOM, Lengths(20, 20))
    assert plan == make_plan(config, ROOM, Lengths(10, 10))
    said = assumptions(config, ROOM, Lengths(20, 20), plan)
    assert "prompts of 10 tokens, solutions of 10 (cut from 20 and 20: the model reads no more), completions" in said
    assert "solutions of 10, completions" in assumptions(config, ROOM, Lengths(10, 10), plan)
