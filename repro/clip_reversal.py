"""Draw docs/clip_reversal.svg: what the pointwise clip does to the example of docs/clip.md.

    python repro/clip_reversal.py [OUTPUT.svg]

Left, gradients to the student's logits under each clip; right, the student's probability of the teacher's favourite
token over 2,000 descent steps. Both come from `atesd.losses.token_streams` in float64; about 10 s on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from atesd.losses.divergence import LossConfig, Scored, token_streams
from atesd.losses.target import Plain

TEACHER, STUDENT = (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)
# Two taus for the token clip: the token's KL of 0.0207 lies below OPSD's 0.05 and above 0.01.
CLIPS = {
    "none": LossConfig(),
    "token, tau 0.01": LossConfig(clip="token", clip_tau=0.01),
    "pointwise, tau 0.05": LossConfig(clip="pointwise", clip_tau=0.05),
}
COLOURS = {"none": "#0072b2", "token, tau 0.01": "#7f7f7f", "pointwise, tau 0.05": "#d55e00"}
STEPS, RATE = 2000, 0.05
WIDTH, HEIGHT = 860, 360


def loss_and_gradient(logits_V: torch.Tensor, config: LossConfig) -> tuple[float, torch.Tensor]:
    """Return the loss of one position and its gradient to the student's logits."""
    hidden = logits_V[None].clone().requires_grad_()
    identity = torch.eye(len(TEACHER), dtype=torch.float64)
    teacher = Scored(torch.tensor([TEACHER], dtype=torch.float64).log(), identity)
    label = torch.zeros(1, dtype=torch.long)
    streams = token_streams(Scored(hidden, identity), [teacher], label, config, target=Plain(), temperature=1.0)
    (gradient,) = torch.autograd.grad(streams.divergence_N.sum(), hidden)
    return streams.divergence_N.item(), gradient[0]


def descend(config: LossConfig) -> list[float]:
    """Return the student's probability of the first token before each step, and after the last."""
    logits_V = torch.tensor(STUDENT, dtype=torch.float64).log()
    path = [logits_V.softmax(-1)[0].item()]
    for _ in range(STEPS):
        logits_V = logits_V - RATE * loss_and_gradient(logits_V, config)[1]
        path.append(logits_V.softmax(-1)[0].item())
    return path


def text(x: float, y: float, content: str, *, anchor: str = "middle", colour: str = "#222222", size: int = 13) -> str:
    """Return one line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{content}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = 'stroke="#222222"') -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def gradient_panel(gradients: dict[str, list[float]]) -> Iterable[str]:
    """Yield grouped bars: one group a token, one bar a clip."""
    left, zero, scale, group, bar = 60.0, 180.0, 560.0, 110.0, 26.0
    yield text(left + 1.5 * group, 28, "Gradient to the student's logits", size=15)
    for tick in (-0.2, -0.1, 0.0, 0.1, 0.2):
        y = zero - tick * scale
        yield line(left, y, left + 3 * group, y, 'stroke="#dddddd"' if tick else 'stroke="#222222"')
        yield text(left - 8, y + 4, f"{tick:+.1f}" if tick else "0", anchor="end", size=12)
    for token in range(3):
        for index, (name, values) in enumerate(gradients.items()):
            height = abs(values[token]) * scale
            x = left + token * group + 16 + index * bar
            y = zero - height if values[token] > 0 else zero
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 4:.1f}" height="{height:.1f}" fill="{COLOURS[name]}"/>'
        label = f"p {TEACHER[token]:g}, q {STUDENT[token]:g}"
        yield text(left + (token + 0.5) * group, 318, label, size=12)
    yield text(left + 1.5 * group, 340, "token: p teacher, q student. Descent moves against the bar", size=12)


def descent_panel(paths: dict[str, list[float]]) -> Iterable[str]:
    """Yield one curve a clip."""
    left, right, bottom, top, most = 480.0, 830.0, 296.0, 52.0, 0.55
    yield text((left + right) / 2, 28, "q of the first token, which the teacher gives 0.5", size=15)
    for tick in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        y = bottom - tick / most * (bottom - top)
        yield line(left, y, right, y, 'stroke="#dddddd"' if tick else 'stroke="#222222"')
        yield text(left - 8, y + 4, f"{tick:.1f}", anchor="end", size=12)
    for tick in range(0, STEPS + 1, 500):
        yield text(left + tick / STEPS * (right - left), 318, str(tick), size=12)
    yield text((left + right) / 2, 340, f"descent steps of {RATE:g} on the logits", size=12)
    for name, path in paths.items():
        points = " ".join(
            f"{left + step / STEPS * (right - left):.1f},{bottom - path[step] / most * (bottom - top):.1f}"
            for step in range(0, STEPS + 1, 10)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>'
        y = bottom - path[-1] / most * (bottom - top)
        yield text(right - 4, y - 7, f"{path[-1]:.3f}", anchor="end", colour=COLOURS[name])


def legend() -> Iterable[str]:
    """Yield a coloured square and a name for every clip, below both panels."""
    for index, name in enumerate(CLIPS):
        x = 220 + index * 170
        yield f'<rect x="{x}" y="360" width="12" height="12" fill="{COLOURS[name]}"/>'
        yield text(x + 18, 371, f"clip {name}", anchor="start")


def draw(gradients: dict[str, list[float]], paths: dict[str, list[float]]) -> str:
    """Return the figure."""
    parts = [*gradient_panel(gradients), *descent_panel(paths), *legend()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 30}" font-family="sans-serif" '
        f'role="img" aria-label="The pointwise clip reverses the gradient">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT + 30}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """Print the numbers and write the figure."""
    start = torch.tensor(STUDENT, dtype=torch.float64).log()
    gradients, paths = {}, {}
    for name, config in CLIPS.items():
        loss, gradient = loss_and_gradient(start, config)
        gradients[name], paths[name] = gradient.tolist(), descend(config)
        shown = ", ".join(f"{value:+.4f}" for value in gradients[name])
        print(f"clip {name:20} loss {loss:+.6f}  gradient ({shown})  q_1 after {STEPS} steps {paths[name][-1]:.4f}")
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "clip_reversal.svg"
    output.write_text(draw(gradients, paths), encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
