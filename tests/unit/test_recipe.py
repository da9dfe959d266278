"""Recipes: dotted overrides, errors that name file and key, and the recipes of this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.cli.compare import BUILT_IN_ARMS
from atesd.config import RunConfig
from atesd.exposure.beta_controller import BetaConfig
from atesd.exposure.overlap import Overlap
from atesd.exposure.prompt import hint_text
from atesd.exposure.schedules import Fixed, Uniform
from atesd.exposure.segments import Segments
from atesd.recipe import apply_overrides, build_config, load_config, with_overrides
from atesd.types import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
TREE: dict[str, Any] = {"seed": 3, "exposure": {"kind": "fixed", "ratio": 0.25}, "model": {"lora": {"r": 8}}}


def error_of(*overrides: str, tree: dict[str, Any] = TREE) -> str:
    """Return what the user reads about overrides that do not fit."""
    with pytest.raises(UserError) as caught:
        build_config(apply_overrides(tree, overrides), source="some.toml")
    return str(caught.value)


@pytest.mark.parametrize(("override", "expected"), [
    ("a.b=token", "token"),  # a bare word
    ("a.b=runs/x y.jsonl", "runs/x y.jsonl"),
    ("a.b=true", True),
    ("a.b=7", 7),
    ("a.b=-5e-6", -5e-6),
    ('a.b="7"', "7"),
    ("a.b=''", ""),  # an empty text is a value
    ("a.b=x=y", "x=y"),  # the first = divides
    ("a.b=[1, 2]", [1, 2]),
    ('a.b={kind="jsd", beta=0.25}', {"kind": "jsd", "beta": 0.25}),
    (" a.b = 7 ", 7),
])  # fmt: skip
def test_an_override_is_toml_or_a_bare_word(override: str, expected: object) -> None:
    found = apply_overrides({"a": {"b": 1, "c": 2}, "d": 3}, [override])
    assert found == {"a": {"b": expected, "c": 2}, "d": 3}
    assert type(found["a"]["b"]) is type(expected)


def test_an_override_reaches_a_section_that_the_recipe_lacks() -> None:
    assert apply_overrides({}, ["seed=1", "model.lora.r=4"]) == {"seed": 1, "model": {"lora": {"r": 4}}}


def test_an_empty_value_removes_a_key_or_a_whole_section() -> None:
    assert apply_overrides(TREE, ["exposure.ratio="])["exposure"] == {"kind": "fixed"}
    assert apply_overrides(TREE, ["model.lora= "])["model"] == {}
    assert apply_overrides(TREE, ["threads="]) == TREE
    assert apply_overrides({}, ["exposure.ratio="]) == {}, "no section is made to remove a key from"


def test_a_table_replaces_the_whole_section() -> None:
    found = build_config(apply_overrides(TREE, ['exposure={kind="random", hold=2}']))
    assert found.exposure == Uniform(hold=2)


def test_overrides_apply_in_order() -> None:
    overrides = ['exposure={kind="fixed"}', "exposure.ratio=0.5", "exposure.ratio=0.75"]
    assert apply_overrides(TREE, overrides)["exposure"] == {"kind": "fixed", "ratio": 0.75}


def test_the_tree_that_is_overridden_stays_as_it_was() -> None:
    tree = {"model": {"lora": {"r": 8}}}
    apply_overrides(tree, ["model.lora.r=4", "model.lora.alpha=1", "model.path="])
    assert tree == {"model": {"lora": {"r": 8}}}


@pytest.mark.parametrize("override", ["exposure.ratio", "=1", "exposure..ratio=1", ".seed=1", "seed.=1"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert f"override {override!r} is not of the form section.key=value" in error_of(override)


@pytest.mark.parametrize(("override", "name"), [("seed.x=1", "seed"), ("exposure.ratio.x.y=1", "ratio")])
def test_a_key_below_a_value_is_refused(override: str, name: str) -> None:
    assert error_of(override) == f"override {override!r}: {name!r} is a value, not a section"


@pytest.mark.parametrize(
    ("key", "given", "where"),
    [("exposure", "'fixed'", "exposure"), ("reveal", "'line'", "reveal.segments"), ("model.lora", "8", "model.lora")],
)
def test_a_value_in_place_of_a_section_is_refused(key: str, given: str, where: str) -> None:
    message = error_of(f"{key}={given}")
    assert message.startswith(f"some.toml: {where}: Input should be a valid dictionary")
    assert message.endswith(f"(given: {given})")


@pytest.mark.parametrize("text", ["{kind=", "[1, 2", '"open', "'open", "5e", "7b/model"])
def test_broken_toml_is_not_taken_for_a_word(text: str) -> None:
    assert error_of(f"model.path={text}") == (
        f"override model.path: value {text!r} is not valid TOML: quote it, or mend the brackets"
    )


@pytest.mark.parametrize(("override", "expected"), [
    ("exposur.ratio=1", "unknown key 'exposur': did you mean 'exposure'?"),
    ("loss.clipp=token", "unknown key 'loss.clipp': did you mean 'clip'?"),
    # Inside a union the keys of the chosen kind alone are known: `hold` is one of `random`, `ratio` of `fixed`.
    ("exposure.ratoi=1", "unknown key 'exposure.fixed.ratoi': did you mean 'ratio'?"),
    ("exposure.hold=1", "unknown key 'exposure.fixed.hold': known here are kind, ratio; 'hold' belongs to the kind "),
    ('exposure={kind="influence", ratio=1}', "unknown key 'exposure.influence.ratio': known here are by, decay, grid, "
     "hold, kind, play, reference, start, temperature; 'ratio' belongs to the kind 'fixed': replace the section, "
     'exposure={kind="fixed", ratio=...}'),
    ('exposure={kind="steps", values=[1], boundary=[]}', "unknown key 'exposure.steps.boundary': did you mean"),
    ("loss.divergence={kind='jsd', betta=0.5}", "unknown key 'loss.divergence.jsd.betta': did you mean 'beta'?"),
    # A section that may leave its kind out has that kind's keys.
    ("reveal.untit=line", "unknown key 'reveal.segments.untit': did you mean 'unit'?"),
    ('reveal={kind="overlap", order="suffix"}', "unknown key 'reveal.overlap.order': known here are extra, "
     "hidden_marker, kind, n, unit; 'order' belongs to the kind 'segments'"),
    ('reveal={n=5}', "unknown key 'reveal.segments.n': known here are hidden_marker, kind, order, unit"),
    # A kind that is not the first of its section's two.
    ('curriculum={kind="forward_ppl", rescor="once"}', "unknown key 'curriculum.forward_ppl.rescor': did you mean "
     "'rescore'?"),
    ('gradient={kind="none", x=1}', "unknown key 'gradient.none.x': known here are kind"),
    ("model.lora.rank=4", "unknown key 'model.lora.rank': known here are alpha, r, targets"),
    # A key that is nearly one of another kind, and of none of this kind's.
    ('exposure={kind="influence", rati=1}', "unknown key 'exposure.influence.rati': known here are by, decay, grid, "
     "hold, kind, play, reference, start, temperature; 'ratio' belongs to the kind 'fixed': replace the section, "),
    ("exposure.rato=1", "unknown key 'exposure.fixed.rato': did you mean 'ratio'?"),
    ("foo.x=1", "unknown key 'foo': known here are arms, cliff, codes, "),  # not flow
])  # fmt: skip
def test_an_unknown_key_gets_the_nearest_one(override: str, expected: str) -> None:
    assert expected in error_of(override)


def test_a_file_is_not_blamed_alone_for_what_overrides_say(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('model.path = "pico"\ntask.kind = "pico"\n')
    with pytest.raises(UserError, match=r"mine\.toml, with the overrides: unknown key 'step\.numsteps'"):
        load_config(path, ["step.numsteps=3"])
    path.write_text('model.path = "pico"\ntask.kind = "pico"\nstep.numsteps = 3\n')
    with pytest.raises(UserError, match=r"mine\.toml: unknown key"):
        load_config(path)


def test_another_kind_over_the_keys_of_the_old_one_is_refused() -> None:
    assert "unknown key 'exposure.random.ratio'" in error_of("exposure.kind=random")


@pytest.mark.parametrize(("override", "expected"), [
    ("seed=-1", "some.toml: seed: Input should be greater than or equal to 0 (given: -1)"),
    ("optim.lr=fast", "some.toml: optim.lr: Input should be a valid number, unable to parse string as a number "
     "(given: 'fast')"),
    ("optim.lr=nan", "some.toml: optim.lr: Input should be a finite number (given: nan)"),
    ("teacher.ema_decay=0.9", 'some.toml: teacher: teacher.ema_decay has no effect with weights = "frozen": remove it'),
    ("rollout.temperature=0", "some.toml: rollout.temperature = 0 cannot be trained with, as it divides the logits: "
     "raise it"),
])  # fmt: skip
def test_an_error_names_file_key_and_what_was_given(override: str, expected: str) -> None:
    assert error_of(override) == expected


def test_all_errors_are_named_at_once() -> None:
    message = error_of("seed=-1", "optim.lr=0", "exposur.ratio=1")
    assert message.startswith("some.toml: ")
    assert all(key in message for key in ("seed: ", "; optim.lr: ", "; unknown key 'exposur'"))


def test_an_unknown_kind_names_the_nearest_and_lists_the_known_ones() -> None:
    assert error_of("exposure.kind=fixd").startswith(
        "some.toml: exposure.kind = 'fixd' is unknown: did you mean 'fixed'? known are fixed, linear, cosine, steps, "
        "random, beta, "
    )
    assert error_of("exposure.kind=5").startswith("some.toml: exposure.kind = '5' is unknown: known are fixed, linear,")


@pytest.mark.parametrize("section", ["reveal", "gradient", "gate", "selection", "target", "routing", "curriculum"])
def test_an_unknown_kind_of_any_section_is_named(section: str) -> None:
    message = error_of(f'{section}={{kind="nw"}}')
    assert message.startswith(f"some.toml: {section}.kind = 'nw' is unknown: ")
    assert "known are " in message


@pytest.mark.parametrize(("override", "expected"), [
    ("exposure={ratio=0.5}", 'exposure lacks its kind: write exposure = {kind = "fixed"}; known are fixed, linear, '),
    ("routing.coef=0.5", 'routing lacks its kind: write routing = {kind = "distil"}; known are distil, rl, '),
    ("loss.divergence.beta=0.5", 'loss.divergence lacks its kind: write loss.divergence = {kind = "forward_kl"}; known '
     "are forward_kl, reverse_kl, jsd, sampled"),
    ("rollout.engine={}", 'rollout.engine lacks its kind: write rollout.engine = {kind = "hf"}; known are hf, vllm'),
])  # fmt: skip
def test_a_section_without_its_kind_lists_the_known_ones(override: str, expected: str) -> None:
    assert error_of(override).startswith(f"some.toml: {expected}")


def test_a_section_without_its_kind_says_which_kinds_know_its_keys() -> None:
    assert error_of("env.limit=0").endswith(
        "; 'limit' belongs to 'doors', 'textworld', 'textarena', 'gymnasium', 'trl'"
    )


def test_a_word_in_place_of_a_section_is_shown_as_one() -> None:
    message = error_of("env=dors")
    assert message.startswith("some.toml: env: Input should be a valid dictionary")
    assert ': write env = {kind = "doors"}; known are single_turn, doors, textworld' in message
    assert 'write exposure = {kind = "fixed"}; known are fixed, linear' in error_of("exposure=0.5")
    assert "write" not in error_of("model.lora=8")


@pytest.mark.parametrize(("override", "key"), [
    ("optim.lr=true", "optim.lr"),
    ("seed=false", "seed"),
    ("optim.betas=[0.9, true]", "optim.betas"),
    ("loss.top_k=true", "loss.top_k"),  # a number or nothing
    ("model.lora.r=true", "model.lora.r"),
    ('reveal={kind="overlap", n=true}', "reveal.overlap.n"),
    ("loss.divergence={kind='jsd', beta=true}", "loss.divergence.jsd.beta"),
    ("cliff.grid=[0, true]", "cliff.grid"),
])  # fmt: skip
def test_true_and_false_are_no_numbers(override: str, key: str) -> None:
    assert error_of(override).startswith(f"some.toml: {key}: Input should be a number, not true or false (given: ")


def test_whole_numbers_and_numbers_as_text_are_numbers_still() -> None:
    config = build_config(
        apply_overrides(TREE, ["optim.lr=1", 'optim.eps="0.5"', "step.num_steps=7.0", "loss.top_k=9"])
    )
    assert (config.optim.lr, config.optim.eps, config.step.num_steps, config.loss.top_k) == (1.0, 0.5, 7, 9)
    assert build_config({"model": {"gradient_checkpointing": True}}).model.gradient_checkpointing is True


@pytest.mark.parametrize(("tree", "key"), [
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**5000}, "seed"),
    ({"optim": {"lr": 10**400}}, "optim.lr"),
    ({"cliff": {"grid": [0, 10**5000]}}, "cliff.grid"),
])  # fmt: skip
def test_whole_numbers_beyond_64_bits_are_refused(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(tree)
    assert str(caught.value).startswith(f"config: {key}: Input should be a number of at most 64 bits (given: ")
    assert len(str(caught.value)) < 300
    build_config({"seed": 2**63 - 1})


def test_a_long_value_is_cut_in_the_message() -> None:
    assert error_of(f"optim.lr={'x' * 1000}").endswith(f"(given: '{'x' * 196}...)")


@pytest.mark.parametrize(("content", "expected"), [
    (f"seed = {'1' * 5000}\n", "holds a number of thousands of digits"),
    (f"arms = {'[' * 5000}{']' * 5000}\n", "is nested too deeply"),
    (f"[{'.'.join('a' * 3000)}]\n", "is nested too deeply"),
])  # fmt: skip
def test_a_recipe_beyond_all_bounds_is_named(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"recipe {path} {expected}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("override", "expected"), [
    (f"seed={'1' * 5000}", "override seed: value '111"),
    (f"arms={'[' * 5000}{']' * 5000}", "override arms: value '[[["),
    (f"{'.'.join('a' * 21)}=1", "is nested too deeply: no key lies 20 levels deep"),
    (f"{'.'.join('a' * 3000)}=1", "is nested too deeply"),
    ("seed=1\noptim.lr=5", "override seed: value '1\\noptim.lr=5' holds several lines: give one override for each key"),
])  # fmt: skip
def test_an_override_beyond_all_bounds_is_named(override: str, expected: str) -> None:
    assert expected in error_of(override)
    assert len(error_of(override)) < 400


def test_control_characters_of_keys_reach_no_terminal() -> None:
    message = error_of(tree={"arms": {"a\nb\x1b[31m": 5}})
    assert message == "some.toml: arms.a\\nb\\x1b[31m: Input should be a valid tuple (given: 5)"


def test_a_kind_of_another_section_is_sent_there() -> None:
    message = error_of('exposure={kind="overlap", n=5}')
    assert message == (
        'some.toml: exposure.kind = "overlap" is a kind of reveal: write reveal = {kind = "overlap", ...} with its n, '
        'extra and unit, and exposure = {kind = "fixed"}'
    )
    given = build_config(apply_overrides(TREE, ['exposure={kind="fixed"}', 'reveal={kind="overlap", n=5, extra=0}']))
    assert given.reveal == Overlap(n=5, extra=0)


def test_a_reveal_may_leave_its_kind_out() -> None:
    config = build_config({"reveal": {"unit": "line"}})
    assert config.reveal == Segments(unit="line")
    assert config.reveal.model_fields_set == {"unit"}
    assert build_config({"reveal": {}}).reveal == RunConfig().reveal == Segments()
    assert build_config(config.model_dump(mode="json")) == config
    assert with_overrides(config, ["reveal.kind=overlap", "reveal.n=3"]).reveal == Overlap(unit="line", n=3)


def test_with_overrides_changes_what_is_named_and_sets_no_default() -> None:
    config = build_config(TREE)
    changed = with_overrides(config, ["exposure.ratio=0.5", "model.lora.alpha=2"])
    assert changed == build_config(
        {"seed": 3, "exposure": {"kind": "fixed", "ratio": 0.5}, "model": {"lora": {"r": 8, "alpha": 2}}}
    )
    assert changed.model_fields_set == {"seed", "exposure", "model"}
    assert changed.model.lora is not None
    assert changed.model.lora.model_fields_set == {"r", "alpha"}
    assert config == build_config(TREE)


def test_the_defaults_of_the_old_kind_are_no_leftovers() -> None:
    """`ratio` was never set: written out as a default, it would be a key that `random` lacks."""
    config = with_overrides(build_config({"exposure": {"kind": "fixed"}}), ["exposure.kind=random"])
    assert config.exposure == Uniform()


def test_with_overrides_takes_a_kind_by_a_table_and_back() -> None:
    learned = with_overrides(build_config(TREE), ['exposure={kind="beta"}'])
    assert learned.exposure == BetaConfig()
    assert with_overrides(learned, ["exposure="]).exposure == Fixed()


def test_a_wrong_override_of_a_config_is_named() -> None:
    with pytest.raises(UserError, match=r"^override: unknown key 'sed': did you mean 'seed'\?$"):
        with_overrides(RunConfig(), ["sed=1"])


def test_a_recipe_is_read_with_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('seed = 5\n[exposure]\nkind = "fixed"\nratio = 0.25\n', encoding="utf-8")
    assert load_config(path, ["exposure.ratio=0.5"]) == RunConfig(seed=5, exposure=Fixed(ratio=0.5))


@pytest.mark.parametrize(("content", "expected"), [
    (b"seed = 1\nseed = 2\n", " is not TOML: "),
    (b"seed = \xff\n", " cannot be read ("),
    (b"sead = 1\n", ": unknown key 'sead': did you mean 'seed'?"),
])  # fmt: skip
def test_a_recipe_that_is_wrong_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert f"{path}{expected}" in str(caught.value)


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_recipe_that_is_no_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*: give the path of a TOML file") as caught:
        load_config(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_and_each_of_its_arms_loads(path: Path) -> None:
    config = load_config(path)
    for overrides in config.arms.values():
        assert load_config(path, overrides).arms == config.arms


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_arm_means_the_same_over_a_recipe_and_over_its_config(path: Path) -> None:
    """`compare` reads arms over the config, and the runs that it starts read them over the file."""
    config = load_config(path)
    for arm, overrides in config.arms.items():
        assert with_overrides(config, overrides) == load_config(path, overrides), arm


def test_there_are_recipes() -> None:
    assert "pico" in {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    ("arm", "recipe"), [("learned", "atesd"), ("aligned", "aligned"), ("sft", "sft"), ("full", "opsd")]
)
def test_the_arms_of_the_study_on_a_real_model_are_recipes_of_their_own(arm: str, recipe: str) -> None:
    folder = RECIPES[0].parent
    study = load_config(folder / "smollm2-cpu-opsd.toml")
    overrides = {**BUILT_IN_ARMS, **study.arms}[arm]
    own = load_config(folder / f"smollm2-cpu-{recipe}.toml")
    assert with_overrides(study, overrides).model_copy(update={"arms": {}}) == own.model_copy(update={"arms": {}})


def test_every_ratio_of_that_study_shows_another_part() -> None:
    config = load_config(RECIPES[0].parent / "smollm2-cpu-opsd.toml", ["task.train_size=8", "task.eval_size=1"])
    revealer = config.reveal.build(config.facts())
    for problem in config.task.build(config.facts()).train():
        shown = [hint_text(problem, revealer.reveal(problem, r), config.prompt) for r in (0, 0.25, 0.5, 0.75, 1)]
        assert len(set(shown)) == 5
        assert all(f"#### {problem.answer}" in hint for hint in shown)
