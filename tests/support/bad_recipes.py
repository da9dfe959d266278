"""Bad recipes by the hundred: mutations of this repository's own, the same ones in every run.

Each is a file's bytes and overrides. `certain` ones must be refused; the others (a letter lost from a text, say) may
happen to be a recipe still.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
COUNT = 250

NUMBERS = (
    "optim.lr", "optim.eps", "optim.weight_decay", "optim.max_grad_norm", "rollout.temperature", "rollout.top_p",
    "eval.temperature", "loss.clip_tau", "loss.temperature_student", "rl.eps_low", "rl.kl_coef", "cliff.kappa",
)  # fmt: skip
WHOLE = (
    "seed", "threads", "step.num_steps", "step.problems", "step.token_budget", "rollout.max_new_tokens",
    "rollout.group_size", "rollout.top_k", "eval.k", "eval.every", "save.keep", "probe.max_tokens", "loss.top_k",
    "optim.warmup_steps", "cliff.min_hits", "loss.tile_logits",
)  # fmt: skip
WORDS = (
    "loss.clip", "teacher.weights", "optim.schedule", "step.overlong", "step.truncated", "rl.scale", "prompt.hint",
    "model.dtype", "loss.aggregate",
)  # fmt: skip
TABLES = ("optim", "step", "rollout", "eval", "save", "loss", "prompt", "teacher", "cliff", "rl", "probe", "model")
KINDS = (
    "task", "exposure", "target", "selection", "gate", "routing", "curriculum", "gradient", "env", "reward",
    "loss.divergence", "rollout.engine",
)  # fmt: skip

NO_NUMBER = (
    "true", "false", "nan", "-nan", "inf", "-inf", "1e999", "-1", '"many"', "fast", "[]", "[1]", "{}", "{a=1}",
    "1979-05-27", "07:32:00", "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000, "''", "½", "\u202e1", "{", "[",
)  # fmt: skip
NO_WHOLE = (*NO_NUMBER, "0.5", "1e-3", "-7.25")
NO_WORD = ("true", "5", "nan", "[]", "{}", "nonsense", '"none "', "NONE", "''", '"\\u0000"', "1979-05-27", "💥")
NO_TABLE = ("5", "true", "nan", '"text"', "word", "[]", "[[]]", "[{}]", "[1, 2]", "1979-05-27", "{x = 1}", '{"" = {}}')
NO_KIND = (
    "{}", '{kind = ""}', '{kind = "nonsense"}', "{kind = 5}", "{kind = true}", "{kind = []}", "{kind = {}}",
    "{kind = nan}", '{kind = "\\u001b[31m"}', '{kind = "plain", kind2 = 1}', '{Kind = "fixed"}', '{kind = ["fixed"]}',
    f'{{kind = "{"x" * 2000}"}}',
)  # fmt: skip
NO_KEY = (
    "x",
    "sead",
    "optim.lrr",
    "exposure.fixd.ratio",
    "a.b.c.d",
    "step.num_steps.x",
    "arms.0.1",
    "kind",
    "Optim.lr",
)
NO_OVERRIDE = (
    "", "=", "optim.lr", "=1", ".=1", "a..b=1", "optim.=1", "optim.lr=1\nseed=2", "optim.lr={", "seed=[1,", "seed='x",
    ".".join("a" * 40) + "=1", ".".join("ab" * 2000) + "=1", f"arms={'[' * 3000}{']' * 3000}", f"task={'{a=' * 3000}",
    "optim=5", "arms={a = [1]}", "arms={a = {b = []}}", 'arms={"\\n" = 5}', "reveal=line", "reveal={kind=[]}",
    "model.lora=5", "model.lora.targets=[]", "model.lora.targets=[5]", "optim.betas=[0.9]",
    "optim.betas=[0.9, 0.9, 0.9]", "optim.warmup_steps=10000000", "optim.betas=[true, false]", "optim.betas=0.9",
    "cliff.contract={a = 5}", 'cliff.contract={a = "("}',
    'cliff.contract={a = ""}', "cliff.grid=[]", "cliff.grid=[1, 0]", "step.updates_per_batch=1000",
    "rollout.temperature=1e-30", "optim.weight_decay=1e10", 'target={kind="extrapolate", lambda_x=1e38}',
    'routing={kind="both", coef=1e38}', "eval.top_p=0", 'exposure={kind="beta", alpha_min=0.5, alpha_max=0.5}',
    'exposure={kind="steps", values=[], boundaries=[]}', 'exposure={kind="steps", values=[2.0], boundaries=[]}',
    'exposure={kind="overlap"}', 'exposure={kind="fixed", ratio=[1]}', "exposure.kind.x=1",
)  # fmt: skip
JUNK = (
    "\x00",
    "\x1b[2J",
    "\ufeff",
    "\u2028",
    "\u202e",
    "é",
    "💥",
    "'",
    '"',
    "[",
    "]",
    "{",
    "}",
    "=",
    ",",
    ".",
    "#",
    "\\",
    "\r",
)


@dataclass(frozen=True, slots=True)
class BadRecipe:
    """A recipe's bytes and overrides, and whether they are surely wrong."""

    name: str
    content: bytes
    overrides: tuple[str, ...] = ()
    certain: bool = True


def bad_recipes(count: int = COUNT, seed: int = 0) -> list[BadRecipe]:
    """Return so many bad recipes, of every way to be bad in turn."""
    rng = random.Random(seed)
    ways = [
        _wrong_values(rng, NUMBERS, NO_NUMBER),
        _wrong_values(rng, WHOLE, NO_WHOLE),
        _wrong_values(rng, WORDS, NO_WORD),
        _wrong_values(rng, TABLES, NO_TABLE),
        _wrong_values(rng, KINDS, NO_KIND),
        _wrong_values(rng, NO_KEY, ("1", '"x"', "{}", "[1]", "true")),
        _wrong_overrides(rng),
        _edited(rng, "letter", _lose_a_letter),
        _edited(rng, "junk", _put_junk),
        _edited(rng, "cut", _cut),
        _edited(rng, "header", _spoil_a_header, certain=True),
        _edited(rng, "twice", _repeat_a_line),
        _edited(rng, "appended", _append, certain=True),
        _edited(rng, "bytes", lambda rng, text: text.encode() + bytes([rng.randrange(0x80, 0xC0)]), certain=True),
    ]
    turn = (recipe for row in zip(*ways, strict=False) for recipe in row)
    return list(islice(turn, count))


def _wrong_values(rng: random.Random, keys: tuple[str, ...], values: tuple[str, ...]) -> Iterator[BadRecipe]:
    """Yield overrides of a key by a value that it cannot have; a table of nothing replaces a table by its defaults."""
    while True:
        key, value, path = rng.choice(keys), rng.choice(values), rng.choice(RECIPES)
        yield BadRecipe(
            f"{path.stem} {key}={value[:30]}", path.read_bytes(), (f"{key}={value}",), certain=_certain(key, value)
        )


def _certain(key: str, value: str) -> bool:
    """Tell whether a value is surely wrong: 0 or -1 may be right somewhere, and an empty one only takes a key away."""
    optional = key in ("loss.top_k", "loss.temperature_student")
    return not (optional or value in ("-1", "{}", "''", "NONE", "[]"))


def _wrong_overrides(rng: random.Random) -> Iterator[BadRecipe]:
    while True:
        for override in rng.sample(NO_OVERRIDE, len(NO_OVERRIDE)):
            path = rng.choice(RECIPES)
            yield BadRecipe(f"{path.stem} {override[:40]!r}", path.read_bytes(), (override,), certain=False)


def _edited(
    rng: random.Random, name: str, edit: Callable[[random.Random, str], str | bytes], *, certain: bool = False
) -> Iterator[BadRecipe]:
    number = 0
    while True:
        path = rng.choice(RECIPES)
        text = edit(rng, path.read_text(encoding="utf-8"))
        number += 1
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        yield BadRecipe(f"{path.stem} {name} {number}", content, certain=certain)


def _lose_a_letter(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + text[place + 1 :]


def _put_junk(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(JUNK) + text[place:]


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(len(text))]


def _spoil_a_header(rng: random.Random, text: str) -> str:
    """Make a table a list of tables, a table of another table, or one of an unknown name."""
    lines = text.splitlines()
    headers = [index for index, line in enumerate(lines) if line.startswith("[") and "." not in line]
    index = rng.choice(headers)
    name = lines[index].split("]")[0].strip("[]")
    lines[index] = rng.choice([f"[[{name}]]", f"[{name}s]", f"[seed.{name}]", f"[{name}.{name}.x]", f"[{name}"])
    return "\n".join(lines)


def _repeat_a_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "\n".join(lines)


def _append(rng: random.Random, text: str) -> str:
    """Add a section that no recipe has."""
    return text + rng.choice([
        "\n[nonsense]\nx = 1\n", "\n[optim.x]\ny = 1\n", "\n[[step]]\n", f"\n[{'.'.join('a' * 2000)}]\n", "\nx = nan\n",
        f"\n[unknown]\nx = {'[' * 2000}{']' * 2000}\n", f"\n[unknown]\nx = {'1' * 5000}\n",
        '\n["\\u001b[31m"]\nx = 1\n',
        "\n[seed]\n", "\n[arms.x]\ny = 1\n", '\n["a\\nb".c]\n', "\n[exposure.kind]\nx = 1\n",
    ])  # fmt: skip
