"""What is shown while a run trains."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from atesd.cli import progress
from atesd.cli.progress import Pace, RunProgress, accuracy, bar, clock, metrics_table

ROW = {
    "loss/total": 0.25,
    "exposure/ratio": 0.5,
    "reward/mean": 0.75,
    "rollout/length_mean": 31.2,
    "rollout/eos_frac": 0.9375,
    "rollout/truncated": 2.0,
    "time/tokens_per_s": 640.0,
    "memory/peak_mib": 512.0,
}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (200, "3:20"), (7500, "2:05:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_pace_counts_down_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    pace = Pace(num_steps=10)
    pace.see(4)
    assert pace.left() == "?", "a resumed run has no pace before its first step"
    now[0] = 6.0
    pace.see(6)
    assert pace.left() == "12 s"  # 3 s a step, 4 steps missing
    now[0] = 8.0
    assert pace.left() == "10 s"
    now[0] = 100.0
    assert pace.left() == "0 s"


def test_accuracy_is_not_taken_from_an_interval_or_another_metric() -> None:
    row = {"eval/t/avg@4_low": 0.1, "eval/t/pass@4": 0.9, "eval/t/avg@4": 0.5}
    assert accuracy(row) == ("avg@4", 0.5)
    assert accuracy({"eval/t/avg@4_low": 0.1}) is None


def test_plain_lines_hold_every_value_and_come_at_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "monotonic", lambda: 1000.0)
    out = io.StringIO()
    show = RunProgress(50, Console(file=out, soft_wrap=True))
    show({"step": 0, "eval/t/avg@4": 0.5})
    show({"step": 1, **ROW})
    show({"step": 2, **ROW, "eval/t/avg@4": 0.625})
    assert out.getvalue().splitlines() == [
        "step 0/50 avg@4 0.500 left ?",
        "step 2/50 loss 0.2500 exposure 0.50 reward 0.75 length 31 ended 94% truncated 2 tokens/s 640 peak MiB 512 "
        "avg@4 0.625 left 0 s",
    ]


def test_a_bar_is_lines_where_nobody_could_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    out = io.StringIO()
    with bar(Console(file=out), 4) as show:
        for step, seconds in enumerate((4.0, 5.9, 0.2, 0.3), start=1):
            now[0] += seconds
            show(step, 4, 1 / step)
    assert out.getvalue().splitlines() == ["step 3/4  loss 0.333", "step 4/4  loss 0.250"], "ten seconds, and the end"
    seen = io.StringIO()
    with bar(Console(file=seen, width=80, force_terminal=True, color_system=None), 4) as show:
        show(4, 4, 0.25)
    assert "loss 0.250 \u2501" in seen.getvalue()
    assert "100%" in seen.getvalue()
    assert "step 4/4" not in seen.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_the_panel_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    show = RunProgress(1500, Console(file=out, width=width, force_terminal=True, color_system=None))
    with show.shown():
        show({"step": 1499, **ROW, "eval/t/avg@12": 0.625})
    frame = out.getvalue().splitlines()
    assert any("1499/1500" in line for line in frame)
    assert any(line.split() == ["0.2500", "0.50", "0.75", "31", "94%", "2", "640", "512", "0.625"] for line in frame), (
        frame
    )


def test_the_table_puts_accuracy_first_and_the_start_beside_it() -> None:
    metrics = {"eval/t/length_mean": 30.0, "eval/t/avg@4_low": 0.4, "eval/t/avg@4_high": 0.6, "eval/t/avg@4": 0.5}
    out = io.StringIO()
    Console(file=out, width=80).print(metrics_table(metrics, "end", start={"eval/t/avg@4": 0.25}))
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in out.getvalue().splitlines() if "│" in line
    ]
    assert cells == [["avg@4", "0.250", "0.500", "0.400 to 0.600"], ["length_mean", "", "30.000", ""]]


def test_a_metric_whose_name_ends_like_a_bound_is_shown() -> None:
    metrics = {
        f"eval/t/{name}": 0.5 for name in ("trait/aims_low", "level/very_high", "avg@4", "avg@4_low", "avg@4_high")
    }
    out = io.StringIO()
    Console(file=out, width=80).print(metrics_table(metrics, "end"))
    cells = [line.strip("│").split("│")[0].strip() for line in out.getvalue().splitlines() if "│" in line]
    assert cells == ["avg@4", "level/very_high", "trait/aims_low"]
