"""`atesd show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from atesd.cli.progress import make_console, silence_libraries
from atesd.tasks.flows import refuse_points


def run_show(recipe: Path, overrides: Sequence[str], ratio: float | None, count: int) -> None:
    """Print the prompts of the first training problems: the student's once, the teacher's at each ratio."""
    silence_libraries()
    from atesd.exposure.reveal import check_ratio
    from atesd.recipe import load_config
    from atesd.train.inspect import show_prompts

    if ratio is not None:
        check_ratio(ratio)
    console = make_console()
    shown = None
    config = load_config(recipe, overrides)
    refuse_points(config.task)
    for prompt in show_prompts(config, ratio, count):
        if prompt["problem_id"] != shown:
            shown = prompt["problem_id"]
            title = " ".join(f"{shown} {prompt['level']}".split())
            show_text(console, f"{title}: student", prompt["student_prompt"])
        show_text(console, f"{shown}: teacher at ratio {prompt['ratio']}", prompt["teacher_prompt"])


def show_text(console: Console, title: str, text: str) -> None:
    """Print a text in a frame, or bare between lines where no terminal shows it; escape characters become visible."""
    text = text.replace("\x1b", "\u241b")
    if console.is_terminal:
        console.print(Panel(Text(text), title=Text(title), title_align="left"), soft_wrap=False)
    else:
        console.print(f"--- {title} ---\n{text}\n")
