"""Look at a recipe or a model without training: exact prompts, and an evaluation on its own."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.config import RunConfig
from atesd.evaluate.kept import Progress, evaluate_kept
from atesd.evaluate.runner import Evaluation, Write, evaluate
from atesd.exposure.prompt import student_messages
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.seals import MANIFEST, seal
from atesd.sections import ModelConfig
from atesd.seeds import derive_seed
from atesd.tasks.texts import unread
from atesd.train.admit import answerable, refuse_hostile, shown_instead
from atesd.train.hints import Hints
from atesd.train.hub import commit_of, fetched
from atesd.train.model import context_length, decide_dtype, load, resolve, set_threads
from atesd.train.resume import digests_of_code
from atesd.train.setup import for_evaluation, make_renderer, sampling_side
from atesd.train.tokens import load_tokenizer
from atesd.types import Problem, Trajectory, Turn, UserError

SHOWN_RATIOS = (0.0, 0.5, 1.0)


class Silent:
    """No engine: what is shown is not sampled."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],  # noqa: ARG002
        sampling: SamplingConfig,  # noqa: ARG002
        *,
        seed: int,  # noqa: ARG002
    ) -> list[Turn]:
        """Never asked."""
        raise AssertionError("nothing is sampled here")

    def sync(self, weights: Weights) -> None:
        """Take nothing over."""


def show_prompts(config: RunConfig, ratio: float | None, count: int) -> list[dict[str, str]]:
    """Return the exact prompts of the first training problems, at one ratio or at 0, 0.5 and 1.

    In an environment they are the whole conversations of both roles, with the expert's replies in the student's place.
    """
    renderer = make_renderer(
        config,
        load_tokenizer(*fetched(resolve(config.model.path), config.model.revision), config.prompt.chat_template),
    )
    facts = config.facts()
    problems = config.task.build(facts).train()
    hints = Hints(config.prompt, config.reveal.build(facts), renderer, shown_instead(config, problems))
    ratios: Sequence[float] = SHOWN_RATIOS if ratio is None else (ratio,)
    driver = Driver(
        sampler=Silent(),
        renderer=renderer,
        environment=config.env.build(facts),
        student_messages=lambda problem: student_messages(problem, config.prompt),
        reward=lambda **columns: [None] * len(columns["prompts"]),
    )
    played = {
        problem.id: driver.replay([problem])[0].trajectories[0]
        for problem in problems[:count]
        if config.env.limit > 1 and problem.expert
    }

    def whole(prompt: tuple[int, ...], attempt: Trajectory | None) -> str:
        last = () if attempt is None else attempt.told(attempt.final) + attempt.final.completion_ids
        return renderer.prompt_text(prompt + last)

    def student(problem: Problem) -> tuple[int, ...]:
        attempt = played.get(problem.id)
        return hints.student_ids(problem) if attempt is None else attempt.turns[0].prompt_ids

    def teacher(problem: Problem, shown: float) -> tuple[int, ...]:
        attempt = played.get(problem.id)
        return hints.teacher_ids(problem, shown, "" if attempt is None else attempt.opening)

    return [
        {
            "problem_id": problem.id,
            "level": problem.level,
            "ratio": f"{shown:g}",
            "hint": hints.hint(problem, shown).text,
            "student_prompt": whole(student(problem), played.get(problem.id)),
            "teacher_prompt": whole(teacher(problem, shown), played.get(problem.id)),
        }
        for problem in problems[:count]
        for shown in ratios
    ]


@dataclass(frozen=True, slots=True)
class Keep:
    """Where an evaluation keeps its samples, and how it goes on."""

    folder: Path
    show: Callable[[Progress], None]
    say: Callable[[str], object]
    think: bool = False
    """Whether the model is asked to think where its chat template knows how."""
    fit: bool = False
    """Whether completions may be cut to what the context of the model holds."""


def evaluate_model(
    config: RunConfig, model: str | Path, keep: Keep | None = None, *, write: Write | None = None
) -> Evaluation:
    """Evaluate a model folder (or hub id) on the recipe's held-out problems, as a run would at its step 0.

    With `keep` the samples are kept in parts, each with a seed of its own, and an earlier evaluation goes on. `write`
    gets all samples, one row each, before anything is computed from them.
    """
    set_threads(config.threads)
    config = decide_dtype(config)
    chosen, merges = _model_to_evaluate(config, str(model)), config.rollout.engine.samples_in_place
    loaded, tokenizer = load(chosen, 0, config.prompt.chat_template, merges=merges)
    if keep is not None and keep.think and "enable_thinking" in str(tokenizer.chat_template):
        prompt = config.prompt.model_copy(update={"enable_thinking_student": True})
        config = config.model_copy(update={"prompt": prompt})
    driver, renderer, task = sampling_side(config, loaded, tokenizer)
    driver = for_evaluation(driver, config)
    problems = task.evaluation()[: config.eval.problems]
    refuse_hostile(config, renderer, task, {"evaluation": problems})
    missing = unread(problems, renderer.unknown)
    if missing:
        warnings.warn(missing, stacklevel=2)
    sampling, seed = config.eval.sampling(config.rollout), derive_seed(config.seed, "eval")
    if keep is None or not keep.fit:
        problems = answerable(config, renderer, problems, context_length(loaded))
    if keep is None:
        return evaluate(task.name, problems, driver, sampling, seed=seed, traits=task.traits, write=write)
    if keep.fit:
        longest = max((len(renderer.student_ids(driver.student_messages(each))) for each in problems), default=0)
        sampling = _fitted(sampling, context_length(loaded), longest, keep.say)
    commit = commit_of(resolve(str(model)), chosen.revision)
    settings = _settings(config, str(model) if commit is None else f"{model}@{commit}", sampling, problems)
    keep.say(
        f"{len(problems)} problems, {sampling.group_size} samples each: temperature {sampling.temperature:g}, top_p "
        f"{sampling.top_p:g}, top_k {sampling.top_k or 'off'}, at most {sampling.max_new_tokens} tokens; kept in "
        f"{keep.folder}"
    )
    return evaluate_kept(
        keep.folder,
        settings,
        task.name,
        problems,
        driver,
        sampling,
        seed=seed,
        traits=task.traits,
        show=keep.show,
        write=write,
    )


def _fitted(sampling: SamplingConfig, context: int | None, prompt: int, say: Callable[[str], object]) -> SamplingConfig:
    """Shorten completions to what the context leaves, and say so."""
    if context is None or prompt + sampling.max_new_tokens <= context:
        return sampling
    if prompt >= context:
        raise UserError(f"the longest prompt has {prompt} tokens, and the model's context {context}: use another model")
    say(f"completions have at most {context - prompt} tokens: the model's context is {context}")
    return sampling.model_copy(update={"max_new_tokens": context - prompt})


def _settings(config: RunConfig, model: str, sampling: SamplingConfig, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return what the numbers of an evaluation depend on; models, problems and the user's code by digest."""
    texts = [[problem.id, problem.problem, problem.answer] for problem in problems]
    chosen = {name: config.model_dump(mode="json")[name] for name in ("task", "reward", "prompt", "env", "seed")}
    return {
        "model": _digest(_weights(Path(resolve(model)))) if Path(resolve(model)).is_dir() else model,
        **{name: getattr(config.model, name) for name in ("dtype", "quantization", "attn_implementation")},
        "code": digests_of_code(config) or None,  # as in folders that do not know of it
        **sampling.model_dump(mode="json"),
        **chosen,
        "engine": config.rollout.engine.model_dump(mode="json"),
        "problems": _digest(texts),
    }


def _weights(folder: Path) -> dict[str, Any]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json", ".jinja")]
    return {path.name: seal(path) for path in files if path.name != MANIFEST}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _model_to_evaluate(config: RunConfig, path: str) -> ModelConfig:
    """Return the recipe's model section for another model: a revision is one of the recipe's own."""
    revision = config.model.revision if path == config.model.path else None
    return config.model.model_copy(update={"path": path, "lora": None, "revision": revision})
