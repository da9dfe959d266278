"""`atesd show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from atesd.cli.progress import silence_libraries


def run_show(recipe: Path, overrides: Sequence[str], ratio: float | None, count: int) -> None:
    """Print the prompts of the first training problems: the student's once, the teacher's at each ratio."""
    from atesd.exposure.reveal import check_ratio
    from atesd.recipe import load_config
    from atesd.train.inspect import show_prompts

    if ratio is not None:
        check_ratio(ratio)
    silence_libraries()
    console = Console(highlight=False)
    shown = None
    for prompt in show_prompts(load_config(recipe, overrides), ratio, count):
        if prompt["problem_id"] != shown:
            shown = prompt["problem_id"]
            title = f"{shown} {prompt['level']}: student"
            console.print(Panel(Text(prompt["student_prompt"]), title=title, title_align="left"))
        title = f"teacher at ratio {prompt['ratio']}"
        console.print(Panel(Text(prompt["teacher_prompt"]), title=title, title_align="left"))
