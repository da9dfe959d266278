"""The tree: what does not go together is refused with its remedy; what follows from all of it; a run in words."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest

from atesd.cliff import CliffConfig
from atesd.config import RunConfig
from atesd.facts import RunFacts
from atesd.recipe import build_config
from atesd.seeds import derive_seed
from atesd.strength import Constant, Strength
from atesd.types import ContractPoint, Observation, UserError

GROUPS = {"rollout": {"group_size": 2}}
BEYOND = {"target": {"kind": "extrapolate", "lambda_x": 1.5}}
GUARDED = {"target": {"kind": "extrapolate", "lambda_x": 1.5, "guard": True}}
CLIFF = {"routing": {"kind": "cliff"}} | GROUPS | BEYOND
SURROGATE = {"gate": {"kind": "sdar"}}
OVERLAP = {"reveal": {"kind": "overlap"}}
CREDIT = {"rl": {"teacher_credit": {}}}
COMPILED = {"model": {"compile": True}}
PACED = {"loss": {"prompt_weight": "paced"}}


def routed(kind: str, **fields: Any) -> dict[str, Any]:
    return GROUPS | {"routing": {"kind": kind, **fields}}


def error_of(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build_config(tree)
    return str(caught.value).removeprefix("config: ")


# ---- what is refused, and what beside it is not -------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("temperature", {"rollout": {"temperature": 0}},
     "rollout.temperature = 0 cannot be trained with, as it divides the logits: raise it", {}),
    ("a reward beside an environment's own",
     {"env": {"kind": "doors"}, "task": {"kind": "doors"}, "reward": {"kind": "exact"}},
     'env.kind = "doors" grades attempts itself, so [reward] would have no effect: leave it out',
     {"env": {"kind": "single_turn"}, "reward": {"kind": "exact"}}),
    ("updates", {"step": {"problems": 32, "updates_per_batch": 3}},
     "step.problems = 32 cannot be split into step.updates_per_batch = 3 equal parts: choose a divisor",
     {"step": {"problems": 32, "updates_per_batch": 4}}),
    *[(f"{kind} alone", {"routing": {"kind": kind}},
       f'routing.kind = "{kind}" compares completions of a group, but rollout.group_size is 1: set it to at least 2',
       routed(kind)) for kind in ("rl", "both", "hdpo", "retire")],
    ("cliff alone", {"routing": {"kind": "cliff"}} | BEYOND, "set it to at least 2 (8 is usual)", CLIFF),
    ("student temperature", routed("rl") | {"loss": {"temperature_student": 0.9}},
     'routing.kind = "rl" needs the probabilities that were sampled from: remove loss.temperature_student = 0.9 or '
     "set it to rollout.temperature", routed("rl") | {"loss": {"temperature_student": 1.1}}),
    ("shared", routed("hdpo") | {"rl": {"aggregate": "sequence"}},
     'routing.kind = "hdpo" divides both losses by one count, but rl.aggregate = "sequence" and loss.aggregate = '
     '"token" count differently: set them alike', routed("both") | {"rl": {"aggregate": "sequence"}}),
    ("shared aligned", routed("aligned") | {"loss": {"aggregate": "sequence"}}, "count differently: set them alike",
     {"routing": {"kind": "aligned", "otherwise": "skip"}, "loss": {"aggregate": "sequence"}}),
    ("shared cliff", CLIFF | {"loss": {"aggregate": "sequence"}}, "count differently: set them alike",
     CLIFF | {"loss": {"aggregate": "sequence"}, "rl": {"aggregate": "sequence"}}),
    *[(f"teacher credit {kind}", routed(kind, **fields) | CREDIT,
       "rl.teacher_credit asks the teacher about reinforced completions, which routing.kind = "
       f'"{kind}" does not show it: set routing = {{kind = "both", coef = 0}}, or remove rl.teacher_credit',
       routed("both", coef=0.0) | CREDIT) for kind, fields in (("rl", {}), ("hdpo", {}), ("distil", {}))],
    ("teacher's success", routed("retire", every=2),
     "routing.every = 2 says how often successes are measured, which nothing asks for: set routing.teacher_share",
     routed("retire", every=2, teacher_share=0.9)),
    ("teacher's completions from a server",
     {"routing": {"kind": "retire", "teacher_share": 0.9},
      "rollout": {"group_size": 2, "engine": {"kind": "vllm"}}},
     'routing.teacher_share needs completions of the teacher, and rollout.engine.kind = "vllm" samples from the '
     'student alone: set rollout.engine.kind = "hf", or remove routing.teacher_share',
     routed("retire", teacher_share=0.9)),
    ("surrogate paint", SURROGATE | {"target": {"kind": "paint"}},
     'so target.kind = "paint" would have no effect', {"target": {"kind": "paint"}}),
    ("paced hdpo", routed("hdpo") | PACED,
     'loss.prompt_weight = "paced" gives weight 0 to problems of equal rewards, and router "hdpo" distils what has no '
     "other use: remove either", routed("both") | PACED),
    ("paced cliff", CLIFF | PACED, 'and router "cliff" distils what has no other use',
     CLIFF | PACED | {"routing": {"kind": "cliff", "uniform": "skip"}}),
    ("paced alone", PACED,
     'loss.prompt_weight = "paced" needs pass rates, but rollout.group_size is 1, so every weight would '
     "be 0: set it to at least 2", PACED | GROUPS),
    ("cliff without lambda", routed("cliff"),
     'routing.kind = "cliff" weighs how far the target is extrapolated, but here it is not: set target = {kind = '
     '"extrapolate", lambda_x = 1.25}', CLIFF),
    ("cliff at lambda 1", CLIFF | {"target": {"kind": "extrapolate", "lambda_x": 1.0}}, "but here it is not", CLIFF),
    ("closed form without lambda", {"exposure": {"kind": "closed_form"}},
     'exposure.kind = "closed_form" weighs how far the target is extrapolated, but here it is not',
     {"exposure": {"kind": "closed_form"}} | BEYOND),
    ("guard without lambda", {"target": {"kind": "extrapolate", "lambda_x": 1.0, "guard": True}},
     "target.guard = true caps how far the target is extrapolated, but here it is not: set target.lambda_x above 1",
     GUARDED),
    ("cliff and guard", CLIFF | GUARDED, 'routing.kind = "cliff" caps lambda itself where it must: remove target.guard',
     routed("hdpo") | GUARDED),
    *[(f"{name} and aligned target", tree | {"target": {"kind": "extrapolate", "lambda_x": 1.5, "aligned": True}},
       f'{name}.kind = "{tree[name]["kind"]}" weighs how far the target is extrapolated, which target.aligned = true '
       "moves: remove target.aligned", tree | BEYOND)
      for name, tree in (("routing", CLIFF), ("exposure", {"exposure": {"kind": "closed_form"}}))],
    ("surrogate and target", SURROGATE | BEYOND,
     'has the same gradient whatever the target, so target.kind = "extrapolate" would have no effect: set '
     'target.kind = "plain", or set gate.target = "divergence"',
     {"gate": {"kind": "sdar", "target": "divergence"}} | BEYOND),
    ("surrogate and target at lambda 1", SURROGATE | {"target": {"kind": "extrapolate", "lambda_x": 1.0}},
     "whatever the target", {"target": {"kind": "extrapolate", "lambda_x": 1.0}}),
    ("surrogate and clip", SURROGATE | {"loss": {"clip": "token"}},
     "so loss.clip would have no effect: remove it, or set gate.target", {"loss": {"clip": "token"}}),
    ("surrogate and top_k", SURROGATE | {"loss": {"top_k": 5}}, "so loss.top_k would have no effect",
     {"gate": {"kind": "sdar", "target": "divergence"}, "loss": {"top_k": 5}}),
    ("surrogate and sampled", SURROGATE | {"loss": {"divergence": {"kind": "sampled"}}},
     "so loss.divergence would have no effect", SURROGATE | {"loss": {"divergence": {"kind": "reverse_kl"}}}),
    *[(f"{kind} and {name}", routed(kind) | tree, f'routing.kind = "{kind}" distils nothing: remove {name}, which has '
       "no effect", GROUPS | tree) for kind in ("rl", "sft") for name, tree in (
           ("gate", SURROGATE), ("selection", {"selection": {"kind": "tip", "ratio": 1.0}}), ("target", GUARDED),
           ("target", {"target": {"kind": "residual"}}), ("loss.prompt_weight", PACED), ("reveal", OVERLAP),
           ("reveal", {"reveal": {"kind": "retention"}}),
           ("exposure", {"exposure": {"kind": "beta"}}), ("exposure", {"exposure": {"kind": "difficulty"}}),
           ("exposure", {"exposure": {"kind": "paired"}}), ("exposure", {"exposure": {"kind": "influence"}}),
           ("target", {"exposure": {"kind": "closed_form"}} | BEYOND))],
    *[(f"{kind} and loss.{name}", routed(kind) | {"loss": {name: value, **more}},
       f'routing.kind = "{kind}" distils nothing: remove loss.{name}, which has no effect', routed("both") | {
           "loss": {name: value, **more}}) for kind in ("rl", "sft") for name, value, more in (
               ("clip", "token", {}), ("clip", "pointwise", {}), ("clip_tau", 0.06, {}), ("top_k", 5, {}),
               ("temperature_teacher", 2.0, {}), ("divergence", {"kind": "reverse_kl"}, {}))],
    ("warm-up", {"step": {"num_steps": 3, "updates_per_batch": 2}, "optim": {"warmup_steps": 7}},
     "optim.warmup_steps = 7 outlasts the run's 6 updates, so that optim.lr is never reached: lower it",
     {"step": {"num_steps": 3, "updates_per_batch": 2}, "optim": {"warmup_steps": 6}}),
    ("empty contract", {"cliff": {"contract": {"box": " "}}}, "cliff.contract.box is an empty pattern",
     {"cliff": {"contract": {"box": "="}}}),
    ("no contract", {"cliff": {"contract": {}, "eos": False}}, "name at least one forced form",
     {"cliff": {"contract": {}}}),
    ("decay", {"optim": {"lr": 0.5, "weight_decay": 2.0}},
     "optim.weight_decay = 2 takes lr times as much, a share of 1, from every weight in one update, which leaves none: "
     "lower it below 1 / lr = 2", {"optim": {"lr": 0.5, "weight_decay": 1.9}}),
    *[(f"{kind} of no hint", {"prompt": {"hint": "none"}, "exposure": {"kind": kind}},
       f'prompt.hint = "none" shows nothing at any ratio, so exposure.kind = "{kind}" steers nothing: set exposure = '
       '{kind = "fixed"}', {"prompt": {"hint": "none"}, "exposure": {"kind": "linear"}})
      for kind in ("beta", "paired", "influence")],
    ("overlap of no hint", OVERLAP | {"prompt": {"hint": "none"}},
     'prompt.hint = "none" shows nothing at any ratio, so reveal.kind = "overlap" has no effect: remove',
     {"reveal": {"order": "suffix"}, "prompt": {"hint": "none"}}),
    ("overlap with another problem", OVERLAP | {"prompt": {"hint": "wrong_problem"}},
     'reveal.kind = "overlap" compares with the own solution, but prompt.hint = "wrong_problem" shows another: set '
     'reveal.kind = "segments"', {"prompt": {"hint": "wrong_problem"}, "exposure": {"kind": "beta"}}),
    ("overlap and cliff", OVERLAP | CLIFF,
     'reveal.kind = "overlap" settles the exposure only after the rollout, but lambda* needs it before: set '
     'reveal.kind = "segments", or remove target.guard and the cliff router', OVERLAP | BEYOND),
    ("overlap and guard", OVERLAP | GUARDED, "but lambda* needs it before", OVERLAP | routed("hdpo")),
    *[(f"compiled {name}", COMPILED | tree,
       f"model.compile = true compiles layers as they are, and {name} reads or changes what they make: remove either",
       COMPILED) for name, tree in (
           ("[codes]", {"codes": {}}), ('reveal.kind = "retention"', {"reveal": {"kind": "retention"}}),
           ('gradient.kind = "longact"', {"gradient": {"kind": "longact"}}))],
    ("one attempt", {"exposure": {"kind": "difficulty"}},
     'exposure.kind = "difficulty" tells problems apart by their pass rates, but with rollout.group_size = 1 these '
     'know two difficulties, right and wrong: raise the group size, or set exposure.by = "reference_ppl"',
     {"exposure": {"kind": "difficulty", "by": "reference_ppl"}}),
    ("failures only", routed("hdpo") | {"exposure": {"kind": "difficulty"}},
     'routing.kind = "hdpo", which distils failed groups alone, leaves one bin: set exposure.by = "reference_ppl"',
     routed("both") | {"exposure": {"kind": "difficulty"}}),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message", "legal"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_does_not_go_together_is_refused_with_its_remedy(
    tree: dict[str, Any], message: str, legal: dict[str, Any]
) -> None:
    assert message in error_of(tree)
    build_config(legal)


def placed(key: str, value: Any, **beside: Any) -> dict[str, Any]:
    """Return a tree of one dotted key, with others beside it in its section."""
    section, _, name = key.rpartition(".")
    tree = {name: value} | beside
    for part in reversed(section.split(".")):
        tree = {part: tree}
    return tree


@pytest.mark.parametrize(("key", "low", "high", "beside"), [
    ("loss.temperature_student", 1e-3, 1e3, {}),
    ("loss.temperature_teacher", 1e-3, 1e3, {}),
    ("rollout.temperature", 1e-3, 1e3, {}),
    ("eval.temperature", 1e-3, 1e3, {}),
    ("exposure.temperature", 1e-3, 1e3, {"kind": "influence"}),
    ("target.lambda_x", 1e-6, 100, {"kind": "extrapolate"}),
    ("target.scale", 1e-6, 100, {"kind": "residual"}),
    ("target.bound", 1e-6, 1e6, {"kind": "residual"}),
    ("gate.beta", 0, 1e6, {"kind": "sdar"}),
    ("rl.kl_coef", 0, 1e6, {}),
    ("rl.eps_high", 1e-9, 1e6, {}),
    ("rl.dual_clip", 1.1, 1e6, {}),
    ("rl.importance_clip", 1, 1e6, {}),
    ("loss.divergence.importance_clip", 1.1, 1e6, {"kind": "sampled"}),
    ("optim.lr", 1e-30, 10, {}),
    ("optim.eps", 1e-30, 1, {}),
    ("model.lora.alpha", 1e-9, 1e6, {}),
    ("threads", 0, 4096, {}),
])  # fmt: skip
def test_settings_that_can_only_end_in_broken_numbers_are_refused(
    key: str, low: float, high: float, beside: dict[str, Any]
) -> None:
    """Both ends of the range are legal, and beyond them is a line that names the key."""
    for value in (low, high):
        build_config(placed(key, value, **beside) if "." in key else {key: int(value)})
    above = high * 2 if "." in key else int(high) + 1
    message = error_of(placed(key, above, **beside) if "." in key else {key: above})
    assert key.rpartition(".")[2] in message
    if low in (1e-3, 1e-6) or key == "optim.eps":
        assert key.rpartition(".")[2] in error_of(placed(key, low / 2, **beside))


@pytest.mark.parametrize("kind", ["both", "retire"])
def test_the_coefficient_of_a_router_is_bounded(kind: str) -> None:
    assert f"routing.{kind}.coef: Input should be less than or equal to 1000000" in error_of(routed(kind, coef=1e38))
    build_config(routed(kind, coef=1e6))


@pytest.mark.parametrize("exposure", ["fixed", "linear", "cosine", "random"])
@pytest.mark.parametrize("router", ["rl", "sft"])
def test_an_exposure_that_is_not_learned_may_stand_in_a_run_without_a_teacher(router: str, exposure: str) -> None:
    build_config(routed(router) | {"exposure": {"kind": exposure}, "reveal": {"unit": "line"}})


@pytest.mark.parametrize("exposure", ["beta", "paired", "influence", "random", "linear"])
def test_every_exposure_bounds_overlap(exposure: str) -> None:
    build_config(OVERLAP | {"exposure": {"kind": exposure}})


def test_reinforcement_samples_untruncated_unless_it_is_set() -> None:
    reinforced = build_config(routed("rl"))
    assert (reinforced.rollout.top_p, reinforced.rollout.top_k) == (1.0, 0)
    assert reinforced.rollout.model_fields_set == {"group_size"}, "what is filled in does not count as set"
    own = build_config({"routing": {"kind": "rl"}, "rollout": {"group_size": 2, "top_p": 0.9, "top_k": 5}})
    assert (own.rollout.top_p, own.rollout.top_k) == (0.9, 5)
    half = build_config({"routing": {"kind": "rl"}, "rollout": {"group_size": 2, "top_p": 0.9}})
    assert (half.rollout.top_p, half.rollout.top_k) == (0.9, 0)
    assert build_config({}).rollout.top_p == 0.95


# ---- what follows -------------------------------------------------------------------------------------------------


def test_facts_of_a_run() -> None:
    tree = {
        "seed": 3, "step": {"num_steps": 7, "problems": 4}, "teacher": {"weights": "ema"},
        "cliff": {"every": 2, "c": 3.0}, **GUARDED,
    }  # fmt: skip
    run = build_config(tree).facts(["a", "b"])
    assert run == RunFacts(
        seed=3, total_steps=7, problems_per_step=4, problem_ids=["a", "b"], teacher_frozen=False, strength=1.5,
        cliff=CliffConfig(every=2, c=3.0), c=3.0,
    )  # fmt: skip
    assert run.seed_for("exposure") == derive_seed(3, "exposure")
    assert run.seed_for("exposure") != run.seed_for("order")
    plain = RunConfig().facts()
    assert (plain.teacher_frozen, plain.strength, plain.c, plain.problem_ids) == (True, 1.0, 5.0, ())
    assert not build_config({"teacher": {"weights": "live"}}).facts().teacher_frozen


def test_the_clip_behind_lambda_is_the_sections_own_or_that_of_the_loss() -> None:
    sampled = {"loss": {"divergence": {"kind": "sampled", "importance_clip": 2.0}}}
    assert build_config({}).cliff_c == 5.0
    assert build_config(sampled).cliff_c == 2.0
    old = [build_config(tree).reads_old for tree in ({}, sampled, routed("rl"), routed("hdpo"))]
    assert old == [False, True, True, True], (
        "a loss that weighs sampled tokens reads the weights that a step began with"
    )
    assert build_config(sampled | {"cliff": {"c": 1.2}}).cliff_c == 1.2


@pytest.mark.parametrize(
    ("tree", "needs"),
    [
        ({}, False),
        (BEYOND, True),
        ({"target": {"kind": "extrapolate", "lambda_x": 1.0}}, False),
        ({"target": {"kind": "anchor_mix"}}, True),
        ({"target": {"kind": "anchor_mix", "anchor": "answer"}}, False),
        (routed("rl"), False),
        (routed("rl") | {"rl": {"kl_coef": 0.1}}, True),
        ({"rl": {"kl_coef": 0.1}}, False),
        (CLIFF, True),
    ],
)
def test_the_base_is_needed_where_it_is_read(tree: dict[str, Any], needs: bool) -> None:
    assert build_config(tree).needs_base is needs


def strength(tree: dict[str, Any]) -> Strength:
    config = build_config(tree)
    found = config.strength(config.facts())
    sharp = {"eos": ContractPoint(0.9999, 0.5, 99)}  # lambda* = 1.17
    found.observe(Observation(0, measured=dict.fromkeys(found.wants(0), sharp)))
    return found


@pytest.mark.parametrize("tree", [BEYOND, routed("both") | BEYOND, BEYOND | {"exposure": {"kind": "closed_form"}}])
def test_lambda_is_constant_where_neither_target_nor_router_caps_it(tree: dict[str, Any]) -> None:
    assert isinstance(strength(tree), Constant)
    assert strength(tree).at(1.0, capped=False) == 1.5


def test_lambda_is_capped_always_by_the_target_and_by_the_router_where_it_asks() -> None:
    for tree in (GUARDED, routed("hdpo") | GUARDED, CLIFF):
        assert 1.1 < strength(tree).at(1.0, capped=True) < 1.2
    assert strength(GUARDED).at(1.0, capped=False) < 1.2
    assert strength(CLIFF).at(1.0, capped=False) == 1.5


# Values of METHOD, by the section that is left at its defaults.
PUBLISHED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("OPSD", {}, "optim",
     {"lr": 5e-6, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.1}),
    ("OPSD", {"model": {"lora": {}}}, "model.lora", {"r": 64, "alpha": 128, "targets": (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}),
    ("OPSD", {}, "loss", {"divergence": {"kind": "forward_kl"}, "temperature_student": None, "clip_tau": 0.05}),
    ("OPSD", {}, "eval", {"k": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 0}),
    ("ATESD", {"exposure": {"kind": "paired"}}, "exposure", {"delta": 0.15}),
    ("ATESD", {}, "probe", {"max_tokens": 512}),
    ("SDAR", SURROGATE, "gate", {"score": "gap", "beta": 5.0, "centered": False, "target": "surrogate"}),
    ("SDAR", routed("both"), "routing", {"coef": 0.01}),
    ("G-OPD", {"target": {"kind": "extrapolate"}}, "target", {"lambda_x": 1.25}),
    ("G-OPD", {"loss": {"divergence": {"kind": "sampled"}}}, "loss.divergence", {"importance_clip": 5.0}),
    ("Cliff", {}, "cliff", {"kappa": 0.9, "every": 25, "min_hits": 32, "hysteresis": 0.02}),
    ("GRPO", {}, "rl", {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": 3.0, "kl_coef": 0.0, "aggregate": "token"}),
    ("RLSD", routed("both") | CREDIT, "rl.teacher_credit", {"share": 0.5, "clip": 0.2}),
    ("TIP", {"selection": {"kind": "tip"}}, "selection", {"score": "soft_or", "ratio": 0.5, "percentile": 0.98}),
    ("SU-01", {"curriculum": {"kind": "reverse_ppl"}}, "curriculum", {"rescore": "epoch"}),
    ("LongAct", {"gradient": {"kind": "longact"}}, "gradient", {"ratio": 0.3}),
    ("Make Each Token Count", {"reveal": {"kind": "retention"}}, "reveal",
     {"hidden": 512, "bias": 10.0, "learning_rate": 2e-4, "weight_decay": 0.01, "ntp": 1.0, "cap": 1.0}),
    ("DLR", {"codes": {}}, "codes", {"count": 32, "chunk": 4, "draws": 8, "router_coef": 0.5, "prior_coef": 0.1}),
    ("PAINT", OVERLAP, "reveal", {"n": 8, "extra": 1}),
    ("AR-OPD", {"target": {"kind": "residual"}}, "target", {"scale": 0.6, "bound": 5.0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "tree", "place", "expected"), PUBLISHED)
def test_defaults_are_those_of_the_method(
    method: str, tree: dict[str, Any], place: str, expected: dict[str, Any]
) -> None:
    section = attrgetter(place)(build_config(tree)).model_dump()
    assert {name: section[name] for name in expected} == expected, method


# ---- in words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"exposure": {"kind": "fixed", "ratio": 1.0}}, "the whole solution (OPSD)"),
        ({"exposure": {"kind": "fixed", "ratio": 0.0}}, "the final answer only"),
        ({"exposure": {"kind": "fixed", "ratio": 0.25}}, "the first 25 % of the solution, always"),
        ({"exposure": {"kind": "random"}}, "a random share between 0 % and 100 %, kept for 5 steps"),
        ({"exposure": {"kind": "linear", "end": 0.3}}, "a share moving from 100 % to 30 % (linear)"),
        ({"exposure": {"kind": "cosine", "start": 0.5}}, "a share moving from 50 % to 0 % (cosine)"),
        (
            {"exposure": {"kind": "steps", "values": [1.0, 0.5], "boundaries": [4]}},
            "shares set in advance: 100 %, then 50 %",
        ),
        (
            {"exposure": {"kind": "beta"}},
            "a learned share: a Beta policy, rewarded for the student's progress (ATESD)",
        ),
        (
            GROUPS | {"exposure": {"kind": "difficulty", "bins": 4}},
            "learned shares: a Beta policy for each of 4 difficulties of problems",
        ),
        (
            {"exposure": {"kind": "influence"}},
            "a learned share: candidates mixed by what their gradients would do to the probe",
        ),
        (
            {"exposure": {"kind": "influence", "play": "best"}},
            "a learned share: candidates chosen by what their gradients would do to the probe",
        ),
        (
            {"exposure": {"kind": "influence", "reference": "reward"}},
            "a learned share: candidates chosen by what their gradients would do to the reward of graded rollouts",
        ),
        (
            {"exposure": {"kind": "paired"}},
            "a learned share: moved to the better of two virtual steps, with more and with less (paired credit)",
        ),
        (
            BEYOND | {"exposure": {"kind": "closed_form"}},
            "the largest share at which the target's λ is safe by the measured λ*",
        ),
        (OVERLAP, "each completion its own share: the solution up to where the completion still follows it (PAINT)"),
        (
            OVERLAP | {"exposure": {"kind": "linear"}},
            "each completion its own share: the solution up to where the completion still follows it (PAINT), at most "
            "a share moving from 100 % to 0 % (linear)",
        ),
        (routed("sft"), "nothing: no teacher, the student trains on the reference solutions themselves"),
        (routed("rl"), "nothing: no teacher, the student is reinforced by the rewards of its own completions"),
    ],
)
def test_what_the_teacher_sees_in_words(tree: dict[str, Any], words: str) -> None:
    assert build_config(tree).about()["exposure"] == words


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"target": {"kind": "extrapolate", "lambda_x": 1.0}}, None),
        ({"target": {"kind": "extrapolate"}}, "The target goes beyond the teacher: λ 1.25"),
        (GUARDED, "The target goes beyond the teacher: λ 1.5, capped by the measured λ*"),
        (
            {"target": {"kind": "extrapolate", "lambda_x": 0.5}},
            "The target stays between the step-0 weights and the teacher: λ 0.5",
        ),
        (
            {"target": {"kind": "anchor_mix", "weight": 0.4, "anchor": "answer"}},
            "The target mixes 40 % of the teacher with a teacher who sees the answer alone",
        ),
        (
            {"target": {"kind": "anchor_mix"}},
            "The target mixes 50 % of the teacher with the step-0 weights without a hint",
        ),
        (
            {"target": {"kind": "residual"}},
            "The target adds 60 % of what full exposure would add, at most 5 nats a token",
        ),
        (
            {"target": {"kind": "paint", "weight": 0.25}},
            "The target is drawn 25 % of the way to the student at tokens whose entropies differ by at least 0.5 nats "
            "(PAINT)",
        ),
        (
            {"target": {"kind": "avsd"}},
            "The target is what three teachers agree on, who see the share in force, the whole solution and the answer "
            "alone, and a gated part of what they do not (AVSD)",
        ),
        ({"selection": {"kind": "tip", "ratio": 1.0}}, None),
        (
            {"selection": {"kind": "tip", "ratio": 0.2, "score": "entropy"}},
            "Of the tokens 20 % are distilled, those of high student entropy (TIP)",
        ),
        (
            {"gate": {"kind": "sdar", "target": "divergence"}},
            "Every token's divergence is weighed by a gate: the sigmoid of 5 times the log-probability gap between "
            "teacher and student (SDAR)",
        ),
        (
            {"gate": {"kind": "sdar", "beta": 2.0, "score": "entropy", "centered": True}},
            "Every token's log-probability gap is weighed by a gate: the sigmoid of 2 times the student's entropy, "
            "less 1/2 (SDAR)",
        ),
        (routed("both"), "Every group is reinforced and distilled, the distillation loss times 0.01"),
        (routed("hdpo"), "Groups without any success are distilled, the others reinforced"),
        (
            routed("retire", coef=0.5),
            "Groups are reinforced and distilled (times 0.5) until the mismatch stops shrinking, then only reinforced",
        ),
        (
            routed("retire", teacher_share=0.8),
            "Groups are reinforced and distilled (times 1) until the mismatch stops shrinking and the student reaches "
            "80 % of the teacher's success, then only reinforced",
        ),
        (
            {"curriculum": {"kind": "reverse_ppl", "rescore": "once"}},
            "Hardest problems first, by the perplexity of the reference, scored before the first step",
        ),
        (
            {"curriculum": {"kind": "forward_ppl"}},
            "Easiest problems first, by the perplexity of the reference, scored before every epoch",
        ),
        (
            {"task": {"kind": "doors"}, "env": {"kind": "doors", "limit": 5}},
            "The student opens a row of doors whose locks only a look shows, in at most 5 turns",
        ),
        (
            {"rollout": {"engine": {"kind": "vllm"}}},
            "Completions come from a vLLM server, log-probabilities of the sampler included",
        ),
        (PACED | GROUPS, "Problems weigh p (1 - p) by their pass rate p (PACED)"),
        (routed("sft"), None),
        (routed("rl"), None),
        ({}, None),
    ],
)
def test_controls_in_words_and_neutral_ones_left_out(tree: dict[str, Any], words: str | None) -> None:
    assert build_config(tree).about()["controls"] == ([] if words is None else [words])


def test_what_the_teacher_does_to_advantages_in_words() -> None:
    rlsd = {"rl": {"teacher_credit": {"share": 0.5, "clip": 0.2}}}
    words = "The teacher scales every reinforced token's advantage between 0.9 and 1.1 (RLSD)"
    assert build_config(routed("both", coef=0) | rlsd).about()["controls"][1:] == [words]


def test_the_controls_of_a_composed_run_come_in_the_order_of_a_step() -> None:
    tree = CLIFF | {
        "selection": {"kind": "tip"}, "gate": {"kind": "sdar", "target": "divergence"},
        "curriculum": {"kind": "reverse_ppl"}, "loss": {"prompt_weight": "paced"},
        "routing": {"kind": "cliff", "uniform": "skip"},
    }  # fmt: skip
    controls = build_config(tree).about()["controls"]
    starts = ("The target", "Of the tokens", "Every token", "Problems weigh", "Groups are distilled while", "Hardest")
    assert [words.startswith(start) for words, start in zip(controls, starts, strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("kind", "distils", "reinforces"),
    [("distil", True, False), ("rl", False, True), ("both", True, True), ("sft", False, False)],
)
def test_about_says_whether_a_run_distils_and_reinforces(kind: str, distils: bool, reinforces: bool) -> None:
    about = build_config(routed(kind)).about()
    assert (about["distils"], about["reinforces"]) == (distils, reinforces)
    assert set(about) == {"exposure", "controls", "distils", "reinforces"}
