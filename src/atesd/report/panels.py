"""The table of the report's figures. A new family of metrics needs a row here, or a quantity in one."""

from __future__ import annotations

from atesd.report import samples, special
from atesd.report.plots import (
    FROM_ZERO,
    Panel,
    Quantity,
    changes,
    leaves_one,
    mean_lines,
    per_run,
    run_lines,
    seed_lines,
)

CURVES = (
    Quantity("loss/total", "Loss"),
    Quantity("divergence/mean", "Mean divergence, nats"),
    Quantity("divergence/p99", "Divergence, 99th percentile, nats"),
    Quantity("mismatch/top1", "Top-1 disagreement"),
    Quantity("mismatch/velocity", "Gap of both velocities, over the teacher's"),
    Quantity("student/entropy", "Student entropy, nats"),
    Quantity("teacher/entropy", "Teacher entropy, nats"),
    Quantity("reward/mean", "Reward of training completions"),
    Quantity("rollout/length_mean", "Length of training completions, tokens"),
    Quantity("optim/grad_norm", "Gradient norm"),
    Quantity("optim/lr", "Learning rate"),
    Quantity("time/step_s", "Seconds a step"),
    Quantity("time/sample_s", "Seconds a step spent in sampling"),
    Quantity("loss/rl", "Policy loss", shown=changes),
    Quantity("reward/uniform_groups", "Groups of equal rewards, which reinforce nothing", shown=changes),
    Quantity("rl/ratio", "Importance ratio of reinforced tokens", shown=changes),
    Quantity("rl/clip_frac", "Share of reinforced tokens held by a clip", shown=changes),
    Quantity("rl/sampler_weight", "Weight that corrects for the sampler", shown=changes),
    Quantity("rl/kl", "KL from the step-0 weights, nats", shown=changes),
    Quantity("route/mismatch_ema", "Mismatch that the teacher's retirement follows", shown=changes),
    Quantity("route/retired", "Whether the teacher has retired, 0 or 1", shown=changes),
    Quantity("exposure/paired_credit", "Paired credit: what more exposure would gain, nats", shown=changes),
    Quantity("exposure/progress", "Progress of a hold window", shown=changes),
    Quantity("exposure/bandit_best", "Ratio that the regression finds best", shown=changes),
    Quantity("codes/gain", "Gain by the chosen latent codes, nats a token", shown=changes),
    Quantity("codes/searched", "Gain of the chosen code sequences over those drawn, nats a token", shown=changes),
    Quantity("codes/entropy", "Entropy of the latent codes' router, nats", shown=changes),
    Quantity("codes/size", "Size of what latent codes add, over what they are added to", shown=changes),
    Quantity("cliff/b/{}", "Base's probability of the forced token, {}"),
    Quantity("cliff/p/{}", "Teacher's probability of the forced token, {}"),
)

PANELS = (
    Panel(
        "accuracy",
        "accuracy",
        "Average@{k} over training steps",
        "Mean over seeds; the band holds 95 % of what resampling seeds and problems gives. "
        "Step 0 is the model before training.",
        special.accuracy_bands,
    ),
    Panel(
        "quality",
        "quality",
        "Numbers about all samples over training steps",
        "One number about all samples of an evaluation, mean over seeds. Distances are better when smaller. The noise "
        "that samples begin with is the same at every evaluation.",
        mean_lines(Quantity("quality/{}", "{}"), **FROM_ZERO),
    ),
    Panel(
        "samples",
        "samples",
        "Samples before training and after",
        "What the student makes of the same noise before training and at the last evaluation.",
        samples.sample_figures,
        most=12,  # images are large
    ),
    Panel(
        "levels", "levels", "Final Average@{k} by level", "Final accuracy with 95 % intervals.", special.level_intervals
    ),
    Panel(
        "exposure",
        "exposure",
        "Exposure ratio over training steps",
        "The share of the solution that the teacher saw in every step with a teacher.",
        seed_lines(Quantity("exposure/ratio", "exposure ratio"), range=[-0.03, 1.03]),
    ),
    Panel(
        "density",
        "exposure",
        "Density of the learned exposure policy over steps",
        "Where the learned policy puts its next draw: strong colour is likely. The line is the ratio that was drawn.",
        per_run(special.densities),
        special.binned_policies,
        most=12,  # heat maps are the largest figures
    ),
    Panel(
        "credits",
        "exposure",
        "Credit of candidate ratios over training steps",
        "To first order, how well a step of distillation at each candidate ratio would serve the probe or graded "
        "rollouts: a moving average where candidates are mixed, else all windows' credit over its standard error.",
        run_lines(Quantity("exposure/credit/{}", "ratio {}"), "credit", zeroline=True, zerolinecolor="@axis"),
    ),
    Panel(
        "arms",
        "exposure",
        "Mean probability of candidate ratios under the router over training steps",
        "What the router of exposure draws from, mean over the problems of its latest step.",
        run_lines(Quantity("exposure/arm/{}", "ratio {}"), "probability", **FROM_ZERO),
    ),
    Panel(
        "routes",
        "controls",
        "Share of groups by route over training steps",
        "How the groups of each step were trained.",
        special.route_stacks,
        special.plain_arms,
    ),
    Panel(
        "codes",
        "controls",
        "Share of chunks by latent code over training steps",
        "How often each latent code is the most probable of a chunk, and steers it when the student samples.",
        run_lines(Quantity("codes/share/{}", "code {}"), "share of chunks", tickformat=".0%", **FROM_ZERO),
    ),
    Panel(
        "gates",
        "controls",
        "Weights of distilled tokens over training steps",
        "How strongly distilled tokens listen to the teacher, mean over seeds. The weight is selection times gate: "
        "1 everywhere in plain distillation.",
        mean_lines(
            Quantity("gate/mean", "Mean weight of distilled tokens", shown=leaves_one),
            Quantity("gate/kept_frac", "Share of distilled tokens that are selected", True, leaves_one),
            Quantity("gate/open_frac", "Share of distilled tokens whose gate is above 1/2", True, leaves_one),
            Quantity("gate/gap", "Mean gap, teacher minus student log-probability, nats", shown=leaves_one),
            Quantity("gate/gap_negative", "Share of distilled tokens with a negative gap", True, leaves_one),
            **FROM_ZERO,
        ),
    ),
    Panel(
        "cliff",
        "controls",
        "λ* and the λ in force over training steps",
        "λ* is how far the target may reach beyond the teacher before the student would leave the clip's safe region; "
        "gaps are steps in which any λ is safe. "
        "While the cliff router reinforces, groups of equal rewards are distilled at a capped λ, or skipped.",
        per_run(special.cliff_lines),
    ),
    Panel(
        "mismatch",
        "mismatch",
        "top-1 disagreement against exposure ratio",
        "How often the most probable tokens of teacher and student differ; one point a step.",
        special.clouds(Quantity("mismatch/top1", "top-1 disagreement", percent=True)),
    ),
    Panel(
        "tail",
        "mismatch",
        "divergence, 99th percentile, nats against exposure ratio",
        "The largest divergences: one token in a hundred lies above. The dark line joins medians, with quartiles. "
        "Both also change as training goes on, and arms differ in that: "
        "read them together with the training curves.",
        special.clouds(Quantity("divergence/p99", "divergence, 99th percentile, nats")),
    ),
    Panel(
        "rewards",
        "reward",
        "Reward of the exposure controller and its terms",
        "A decision is scored after its look-ahead. The two terms are shown before their coefficient and "
        "normalisation, each on its own scale.",
        per_run(special.reward_rows),
    ),
    Panel(
        "traits",
        "behaviour",
        "Share of completions with a trait over steps",
        "Share of held-out completions with the trait, mean over seeds.",
        special.trait_lines,
    ),
    Panel(
        "curves",
        "curves",
        "Logged quantities over training steps",
        "What every step logged, mean over seeds.",
        mean_lines(*CURVES),
        most=None,
    ),
)
