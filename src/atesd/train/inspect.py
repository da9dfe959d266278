"""Look at a recipe or a model without training: exact prompts, and an evaluation on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atesd.config import RunConfig
from atesd.evaluate.runner import Evaluation, evaluate
from atesd.sections import ModelConfig
from atesd.seeds import derive_seed
from atesd.train.hints import Hints
from atesd.train.model import decide_dtype, load, resolve, set_threads
from atesd.train.setup import for_evaluation, make_renderer, refuse_hostile, sampling_side, shown_instead
from atesd.train.tokens import load_tokenizer

SHOWN_RATIOS = (0.0, 0.5, 1.0)


def show_prompts(config: RunConfig, ratio: float | None, count: int) -> list[dict[str, str]]:
    """Return the exact prompts of the first training problems, at one ratio or at 0, 0.5 and 1."""
    renderer = make_renderer(
        config, load_tokenizer(resolve(config.model.path), config.model.revision, config.prompt.chat_template)
    )
    facts = config.facts()
    problems = config.task.build(facts).train()
    hints = Hints(config.prompt, config.reveal.build(facts), renderer, shown_instead(config, problems))
    ratios: Sequence[float] = SHOWN_RATIOS if ratio is None else (ratio,)
    return [
        {
            "problem_id": problem.id,
            "level": problem.level,
            "ratio": f"{shown:g}",
            "hint": hints.hint(problem, shown).text,
            "student_prompt": renderer.prompt_text(hints.student_ids(problem)),
            "teacher_prompt": renderer.prompt_text(hints.teacher_ids(problem, shown)),
        }
        for problem in problems[:count]
        for shown in ratios
    ]


def evaluate_model(config: RunConfig, model: str | Path) -> Evaluation:
    """Evaluate a model folder (or hub id) on the recipe's held-out problems, as a run would at its step 0."""
    set_threads(config.threads)
    config = decide_dtype(config)
    loaded, tokenizer = load(_model_to_evaluate(config, str(model)), 0, config.prompt.chat_template)
    driver, renderer, task = sampling_side(config, loaded, tokenizer)
    problems = task.evaluation()[: config.eval.problems]
    refuse_hostile(config, renderer, task, {"evaluation": problems})
    return evaluate(
        task.name,
        problems,
        for_evaluation(driver, config),
        config.eval.sampling(config.rollout),
        seed=derive_seed(config.seed, "eval"),
        traits=task.traits,
    )


def _model_to_evaluate(config: RunConfig, path: str) -> ModelConfig:
    """Return the recipe's model section for another model: a revision is one of the recipe's own."""
    revision = config.model.revision if path == config.model.path else None
    return config.model.model_copy(update={"path": path, "lora": None, "revision": revision})
