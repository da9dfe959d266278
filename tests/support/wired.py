"""Recipes that together use every control in its wiring: tiny runs on the packaged model, a second each."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 32, "group_size": 2}
BASE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 24, "probe_size": 3, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "reveal": {"unit": "line"},
    "exposure": {"kind": "fixed", "ratio": 0.5},
    "rollout": SAMPLING,
    "optim": {"lr": 1e-3, "max_grad_norm": 0.1},
    "step": {"num_steps": 2, "problems": 4},
    "eval": {"every": 100, "k": 1, "max_new_tokens": 4},
    "save": {"every": 100, "rollouts_every": 1, "rollouts": 1000},
}
PARTIAL: dict[str, Any] = {"kind": "python", "function": f"{Path(__file__).with_name('partial_credit.py')}:score"}
GROUPS = SAMPLING | {"group_size": 3, "max_new_tokens": 48, "temperature": 1.5}
CONTRACT: dict[str, Any] = {
    "contract": {"product": r"[*]\d=(\d)", "label": r"(?:^|\n)([a-j])"},
    "eos": True,
    "every": 1,
    "min_hits": 2,
    "c": 1.2,
}
# The multiplier at a steepness at which no gate of a selected token rounds to 0 in the run directory.
MULTIPLIER: dict[str, Any] = {"kind": "sdar", "target": "divergence", "beta": 0.5}

RECIPES: dict[str, dict[str, Any]] = {
    # Schedules of exposure and rate, weight decay, suffix reveals, a clip of the divergence, mean over sequences.
    "schedules": {
        "exposure": {"kind": "linear", "start": 0.25, "end": 0.75},
        "reveal": {"unit": "line", "order": "suffix"},
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.05},
        "loss": {"clip": "pointwise", "clip_tau": 0.05, "aggregate": "sequence"},
        "step": {"num_steps": 3, "problems": 4, "updates_per_batch": 2},
        "probe": {"log_every": 2, "log_references": True},
    },
    # A guarded lambda under exposures that differ within a step.
    "guard": {
        "exposure": {
            "kind": "difficulty",
            "bins": 3,
            "policy": {
                "kind": "beta",
                "hold": 1,
                "look_ahead": 1,
                "progress_metric": "probe_accuracy",
                "gt_target": "answer",
            },
        },
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "target": {"kind": "extrapolate", "lambda_x": 3.0, "guard": True},
        "cliff": CONTRACT | {"kappa": 0.8, "every": 2},
        "loss": {"divergence": {"kind": "reverse_kl"}},
        "rollout": GROUPS | {"group_size": 2, "temperature": 1.2},
        "step": {"num_steps": 3, "problems": 6},
        "probe": {"sampling_k": 2},
    },
    # TIP beside reinforcement: the selection is the distillation's alone.
    "tip_both": {
        "reward": PARTIAL,
        "selection": {"kind": "tip", "score": "soft_or", "ratio": 0.4},
        "gate": MULTIPLIER,
        "routing": {"kind": "both", "coef": 0.3},
        "rl": {"kl_coef": 0.05},
        "rollout": GROUPS | {"max_new_tokens": 40},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2, "truncated": "mask"},
    },
    # SDAR as published, its teacher live; Dr.GRPO's divisor and scale.
    "sdar": {
        "reward": PARTIAL,
        "gate": {"kind": "sdar", "beta": 2.0, "centered": True},
        "teacher": {"weights": "live"},
        "routing": {"kind": "both", "coef": 0.5},
        "rl": {"aggregate": "constant", "scale": "none", "importance_clip": None, "kl_coef": 0.2},
        "rollout": GROUPS,
    },
    # The exposure that lambda allows; the importance clip of the loss is what bounds it.
    "closed_form": {
        "exposure": {"kind": "closed_form", "hold": 1},
        "target": {"kind": "extrapolate", "lambda_x": 1.1},
        "loss": {"divergence": {"kind": "sampled", "importance_clip": 1.2}},
        "cliff": {"contract": {"product": r"[*]\d=(\d)"}, "min_hits": 2, "every": 1},
        "rollout": SAMPLING,
        "step": {"num_steps": 2, "problems": 2},
        "probe": {"sampling_k": 3},
    },
    # The cliff router over exposures that are drawn anew in every step.
    "cliff": {
        "seed": 2,
        "exposure": {"kind": "random", "hold": 1},
        "target": {"kind": "extrapolate", "lambda_x": 1.1},
        "gate": MULTIPLIER,
        "routing": {"kind": "cliff"},
        "cliff": CONTRACT | {"min_stay": 2, "hysteresis": 0.01, "every": 2, "contract": {"product": r"[*]\d=(\d)"}},
        "rollout": GROUPS | {"temperature": 1.2},
        "step": {"num_steps": 8, "problems": 2},
        "probe": {"sampling_k": 2},
    },
    # HDPO with fractional rewards, ungradable groups, a selection and one divisor for both losses.
    "hdpo": {
        "reward": PARTIAL,
        "routing": {"kind": "hdpo"},
        "selection": {"kind": "tip", "score": "entropy", "ratio": 0.5},
        "rl": {"ratio": "sequence", "eps_low": 0.01, "eps_high": 0.02},
        "rollout": GROUPS,
        "step": {"num_steps": 2, "problems": 6, "updates_per_batch": 3},
    },
    # The sampled-token loss, two updates a batch, the student's temperature its own.
    "sampled": {
        "loss": {"divergence": {"kind": "sampled", "importance_clip": 1.05}, "temperature_student": 0.8},
        "target": {"kind": "extrapolate", "lambda_x": 1.4},
        "rollout": SAMPLING | {"temperature": 1.4, "top_k": 20},
        "optim": {"lr": 3e-3, "max_grad_norm": 1.0},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2},
    },
    # A moving teacher, what full exposure adds, JSD, a gate by entropy.
    "ema": {
        "teacher": {"weights": "ema", "ema_decay": 0.6},
        "target": {"kind": "residual", "scale": 0.7, "bound": 2.0},
        "loss": {"divergence": {"kind": "jsd", "beta": 0.3}},
        "gate": {"kind": "sdar", "target": "divergence", "score": "entropy", "beta": 2.0},
        # Nothing is guessed: torch's attention is less exact for several positions, which these weights magnify.
        "rollout": SAMPLING | {"engine": {"kind": "hf", "guess": 0}},
        "step": {"num_steps": 3, "problems": 4, "updates_per_batch": 2},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.1},
    },
    # An anchor that sees the answer, PACED weights, a temperature for each role, the top entries and the rest.
    "anchor": {
        "reward": PARTIAL,
        "target": {"kind": "anchor_mix", "anchor": "answer", "weight": 0.7},
        "loss": {
            "prompt_weight": "paced",
            "temperature_student": 1.1,
            "temperature_teacher": 0.7,
            "top_k": 4,
            "tail": True,
        },
        "rollout": GROUPS,
    },
    # The teacher retires; the extrapolated target reads the base by adapters switched off.
    "retire": {
        "reward": PARTIAL,
        "routing": {"kind": "retire", "patience": 2, "min_fall": 10.0, "coef": 0.4},
        "target": {"kind": "extrapolate", "lambda_x": 1.3},
        "model": {"path": "pico", "lora": {"r": 4, "alpha": 8}},
        "rollout": GROUPS,
        "step": {"num_steps": 4, "problems": 3},
        "optim": {"lr": 5e-3, "max_grad_norm": 1.0},
    },
    # The second condition of retirement, by completions of a teacher that moves; it weighs tokens until it retires.
    "retire_share": {
        "reward": PARTIAL,
        "routing": {"kind": "retire", "patience": 1, "min_fall": 10.0, "coef": 0.3, "teacher_share": 0.19, "every": 1},
        "rl": {"teacher_credit": {"share": 0.9, "clip": 0.5}},
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "probe": {"sampling_k": 3},
        "rollout": GROUPS,
        "step": {"num_steps": 6, "problems": 3},
        "optim": {"lr": 2e-3, "max_grad_norm": 1.0},
    },
    # RLSD: the teacher is read for the size of advantages alone, against the weights that the step began with.
    "rlsd": {
        "seed": 3,  # with which every update holds rewards that differ
        "reward": PARTIAL,
        "routing": {"kind": "both", "coef": 0.0},
        "rl": {"teacher_credit": {"share": 0.8, "clip": 0.3}, "kl_coef": 0.1, "eps_low": 0.05, "dual_clip": 1.2},
        "exposure": {"kind": "fixed", "ratio": 1.0},
        "rollout": GROUPS,
        "optim": {"lr": 5e-3, "max_grad_norm": 1.0},
        "step": {"num_steps": 2, "problems": 6, "updates_per_batch": 3},
    },
    # Targets that read the student, whose own part is constant, in updates between which it moves.
    "paint": {
        "target": {"kind": "paint", "weight": 0.4, "mismatch": 0.1},
        "teacher": {"weights": "ema", "ema_decay": 0.6},
        "loss": {"divergence": {"kind": "reverse_kl"}, "temperature_teacher": 0.8},
        "gate": MULTIPLIER,
        "optim": {"lr": 3e-3, "max_grad_norm": 0.1},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2},
    },
    "avsd": {
        "target": {"kind": "avsd"},
        "teacher": {"weights": "ema", "ema_decay": 0.6},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.1},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2},
    },
    "avsd_sampled": {
        "target": {"kind": "avsd"},
        "loss": {"divergence": {"kind": "sampled", "importance_clip": 1.1}},
        "exposure": {"kind": "fixed", "ratio": 0.25},
        "optim": {"lr": 3e-3, "max_grad_norm": 1.0},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2},
    },
    # Rows of salient dimensions, under both losses with teachers' passes between, before the gradient is clipped.
    "longact": {
        "reward": PARTIAL,
        "gradient": {"kind": "longact", "ratio": 0.4, "layers": [1]},
        "routing": {"kind": "both", "coef": 0.3},
        "target": {"kind": "residual"},
        "rl": {"kl_coef": 0.1},
        "rollout": GROUPS,
        "optim": {"lr": 2e-3, "max_grad_norm": 0.05},
        "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2, "token_budget": 200},
    },
    # Reinforcement alone, far enough off-policy for its clips to act.
    "rl": {
        "reward": PARTIAL,
        "routing": {"kind": "rl"},
        "rl": {
            "aggregate": "sequence",
            "zero_variance": "drop",
            "kl_coef": 0.1,
            "eps_low": 0.05,
            "eps_high": 0.1,
            "dual_clip": 1.2,
            "importance_clip": 1.2,
        },
        "rollout": GROUPS,
        "optim": {"lr": 1e-2, "max_grad_norm": 1.0},
        "step": {"num_steps": 2, "problems": 6, "updates_per_batch": 3},
    },
    "sft": {"routing": {"kind": "sft"}, "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2}},
    # A draw by entropy alone.
    "multinomial": {
        "selection": {
            "kind": "tip",
            "score": "multinomial",
            "ratio": 0.1,
            "entropy_power": 2.0,
            "divergence_power": 0.0,
        },
        "loss": {"clip": "token", "clip_tau": 0.1, "top_k": 8},
        "rollout": SAMPLING | {"temperature": 1.4},
    },
    # Credit by gradients: every part of the loss that it must see, and none that it must not.
    "influence": {
        "exposure": {"kind": "influence", "grid": [0.0, 0.5, 1.0], "hold": 1, "start": 0.5, "temperature": 1.0},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.1, "eps": 1e-4},
        "target": {"kind": "extrapolate", "lambda_x": 1.5, "guard": True},
        "cliff": CONTRACT,
        "gate": {"kind": "sdar", "target": "divergence", "beta": 2.0},
        "probe": {"credit_parameters": "all", "credit_problems": 2},
        "step": {"num_steps": 4, "problems": 4},
    },
    "influence_last": {
        "exposure": {"kind": "influence", "grid": [0.0, 1.0], "hold": 1, "start": 0.25},
        "gate": {"kind": "sdar", "beta": 1.0},
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "probe": {"credit_parameters": "last_layer", "credit_problems": 3},
        "rollout": SAMPLING | {"temperature": 1.3},
        "step": {"num_steps": 3, "problems": 4},
    },
    # Credit by virtual steps under a bound of the gradient that holds.
    "paired": {
        "exposure": {"kind": "paired", "start": 0.5, "delta": 0.25, "hold": 1, "rate": 0.2},
        "gate": {"kind": "sdar", "target": "divergence", "beta": 2.0},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.02, "schedule": "linear", "weight_decay": 1.0, "betas": [0.8, 0.95]},
        "probe": {"credit_problems": 2},
        "step": {"num_steps": 4, "problems": 4},
    },
    # What graded rollouts say of every level: a ratio, a route and a gate, under a bound of the gradient that holds.
    "aligned": {
        "task": {"kind": "pico", "train_size": 54, "probe_size": 3, "eval_size": 1},
        "reward": PARTIAL,
        "exposure": {
            "kind": "influence",
            "reference": "reward",
            "by": "level",
            "grid": [0.0, 0.5, 1.0],
            "hold": 1,
            "start": 0.25,
            "decay": 0.6,
        },
        "routing": {"kind": "aligned", "margin": 0.5, "grid": [0.0, 1.0], "every": 2, "decay": 0.5},
        "gate": {"kind": "aligned", "beta": 4.0},
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.01, "eps": 1e-4},
        "probe": {"credit_parameters": "last_layer", "credit_problems": 6, "credit_steps": 2},
        "rollout": SAMPLING | {"group_size": 3, "max_new_tokens": 40},
        "step": {"num_steps": 6, "problems": 9},
    },
    # The same of lambda, and of one ratio for all, by single attempts, on all weights and without a bound.
    "aligned_lambda": {
        "seed": 2,
        "reward": PARTIAL,
        "task": {"kind": "pico", "train_size": 30, "probe_size": 3, "eval_size": 1},
        "exposure": {"kind": "influence", "reference": "reward", "grid": [0.0, 1.0], "hold": 2, "start": 0.5},
        "target": {"kind": "extrapolate", "lambda_x": 1.5, "aligned": True},
        "gate": {"kind": "aligned", "beta": 3.0},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.0},
        "probe": {"credit_parameters": "all", "credit_problems": 3},
        "rollout": SAMPLING | {"group_size": 1, "max_new_tokens": 40},
        "step": {"num_steps": 6, "problems": 5},
    },
    # Virtual steps compared by the reward of earlier completions.
    "paired_reward": {
        "reward": PARTIAL,
        "exposure": {"kind": "paired", "reference": "reward", "start": 0.5, "delta": 0.25, "hold": 1},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.02},
        "probe": {"credit_problems": 2, "credit_steps": 2},
        "rollout": SAMPLING | {"group_size": 3, "max_new_tokens": 40},
        "step": {"num_steps": 4, "problems": 3},
    },
    # The learned policy rewarded by the credit of what it drew.
    "beta_aligned": {
        "reward": PARTIAL,
        "exposure": {"kind": "beta", "reward": "aligned", "hold": 1, "decisions_per_update": 2},
        "probe": {"credit_problems": 2, "credit_steps": 2},
        "rollout": SAMPLING | {"group_size": 3, "max_new_tokens": 40},
        "step": {"num_steps": 5, "problems": 3},
    },
    # The learned policy: draws stretched between bounds; a frozen teacher's grounded term from a table.
    "beta": {
        "exposure": {
            "kind": "beta",
            "hold": 1,
            "look_ahead": 2,
            "decisions_per_update": 3,
            "bounds": "affine",
            "alpha_min": 0.2,
            "alpha_max": 0.6,
            "gt_target": "hidden_only",
            "gt_grid": [0.0, 0.4, 1.0],
            "entropy_start": 0.0,
            "warm_start": {"mean": 0.4, "concentration": 5.0},
            "ema_decay": 0.7,
            "features": [
                "progress",
                "ratio_ema",
                "loss_ema",
                "mismatch_ema",
                "probe_ema",
                "confidence",
                "improvement",
                "reward_margin",
            ],
        },
        "step": {"num_steps": 7, "problems": 3},
        "rollout": SAMPLING | {"max_new_tokens": 24},
    },
    # Nothing differs between the first two steps but the selection's seed: greedy samples, the same problems, no rate.
    "still": {
        "task": {"kind": "pico", "train_size": 4, "probe_size": 2, "eval_size": 1},
        "curriculum": {"kind": "forward_ppl", "rescore": "once"},
        "exposure": {
            "kind": "difficulty",
            "by": "reference_ppl",
            "bins": 2,
            "policy": {"kind": "beta", "hold": 2, "look_ahead": 2, "lambda_gt": 0.0},
        },
        "selection": {"kind": "tip", "score": "multinomial", "ratio": 0.3, "entropy_power": 0.5},
        "optim": {"lr": 1e-12},
        "rollout": SAMPLING | {"top_k": 1, "group_size": 1},
        "step": {"num_steps": 3, "problems": 4},
    },
    # The learned policy with a moving teacher, whose grounded term must be measured as it goes.
    "beta_ema": {
        "exposure": {
            "kind": "beta",
            "hold": 2,
            "look_ahead": 2,
            "gamma": 0.8,
            "probe_every": 1,
            "gt_target": "solution",
            "progress_metric": "probe_kl",
        },
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "step": {"num_steps": 5, "problems": 3},
        "rollout": SAMPLING | {"max_new_tokens": 24},
    },
}
# How far the recorder bends the sampler's log-probabilities, where the correction of that is looked at.
SKEWS = {"tip_both": 0.3, "sdar": 0.3, "hdpo": 0.3, "rl": 0.4, "rlsd": 0.3}


def recipe(name: str, **sections: Any) -> dict[str, Any]:
    """Return a recipe's tree, some of its sections replaced."""
    return deepcopy(BASE | RECIPES[name] | sections)
