"""Tasks for a flow student, which makes points instead of text: `ring` and `digits`.

A point has a condition, a vector of numbers about it. The student sees some of it always, or nothing; its teacher is
told some always, and is shown a share of the rest piece by piece, in an order of the point's own. N points of D
dimensions, C numbers of a condition, M pieces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Annotated, ClassVar, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atesd.facts import RunFacts
from atesd.seeds import derive_seed
from atesd.tasks.base import Task, TaskMethod
from atesd.types import UserError

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]
ALWAYS = -1
"""In `Layout.piece_C`: what the teacher is told at every ratio."""
MODES = 8
SPREAD = 0.1
"""Standard deviation of a mode of the ring, whose radius is 1."""
SIDE = 8  # of an image of a digit
GREY = 16  # its brightest pixel


@dataclass(frozen=True, slots=True)
class Points:
    """A set of points: `x_ND`, the label of each, its condition, and the place `rank_NM` at which a piece is shown.

    Points of equal ids are the same points.
    """

    name: str
    ids: tuple[str, ...]
    x_ND: Floats
    label_N: Whole
    condition_NC: Floats
    rank_NM: Whole

    def __len__(self) -> int:
        return len(self.x_ND)


@dataclass(frozen=True, slots=True)
class Layout:
    """Who sees what of a condition: the piece that a number belongs to, and whether the student sees it."""

    piece_C: Whole
    student_C: NDArray[np.bool_]

    @property
    def pieces(self) -> int:
        """M."""
        return int(self.piece_C.max()) + 1

    def shown(self, ratio: float) -> int:
        """Return how many pieces a ratio shows: floor(ratio M)."""
        return floor(ratio * self.pieces + 1e-9)

    def visible(self, rank_BM: Whole, ratios: Sequence[float]) -> NDArray[np.bool_]:
        """Return what the teacher sees of each condition, [B, C]: of larger ratios what smaller ones show, and more."""
        shown_B1 = np.array([[self.shown(ratio)] for ratio in ratios])
        told_C: NDArray[np.bool_] = self.piece_C == ALWAYS
        visible_BC: NDArray[np.bool_] = told_C | (rank_BM[:, np.maximum(self.piece_C, 0)] < shown_B1)
        return visible_BC


@dataclass(frozen=True, slots=True)
class FlowTask:
    """Three disjoint sets of points and the layout of their conditions."""

    name: str
    labels: tuple[str, ...]
    layout: Layout
    train: Points
    probe: Points
    evaluation: Points


class FlowTaskMethod(TaskMethod):
    """Base of their sections. `right` completes "the share of samples that ..."; `looks` says how samples are drawn."""

    is_text: ClassVar[bool] = False
    right: ClassVar[str]
    looks: ClassVar[Literal["points", "images"]]
    declares: ClassVar[tuple[str, ...]] = ("build", "points", "right", "looks")

    def build(self, run: RunFacts) -> Task:  # noqa: ARG002
        """UserError: there are no problems in words."""
        refuse_text(self)

    @abstractmethod
    def points(self, run: RunFacts) -> FlowTask:
        """Return the task."""


def refuse_points(task: TaskMethod) -> None:
    """UserError for a task that is not answered in words."""
    if not task.is_text:
        refuse_text(task)


def refuse_text(task: TaskMethod) -> NoReturn:
    """UserError for what only a task in words can be asked."""
    kind = task.model_dump()["kind"]  # every method has one
    raise UserError(
        f'task.kind = "{kind}" has no texts and no language model: of the commands, train, compare and report serve it'
    )


class RingConfig(FlowTaskMethod):
    """Points of the plane around eight places on a circle (ours, after METHOD 11; every mode is a normal of width .1).

    The condition has five numbers, the pieces: the label's three bits, the coarsest first, and both coordinates of the
    point itself. The student sees none.
    """

    kind: Literal["ring"] = "ring"
    train_size: Annotated[int, Field(ge=1, le=1_000_000)] = 4000
    """Training points, new ones for every seed of a run."""
    probe_size: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Points on which progress is measured: the same for all seeds."""
    eval_size: Annotated[int, Field(ge=2, le=20_000)] = 1024
    """Points that samples are compared with."""

    right: ClassVar[str] = "lie within three standard deviations of one of the eight modes"
    looks: ClassVar[Literal["points", "images"]] = "points"

    def points(self, run: RunFacts) -> FlowTask:
        """Return the task."""

        def draw(name: str, size: int, seed: int) -> Points:
            rng = np.random.default_rng(derive_seed(seed, f"ring {name}"))
            label_N = rng.integers(0, MODES, size)
            x_ND = modes()[label_N] + SPREAD * rng.standard_normal((size, 2))
            bits_N3 = 2.0 * (label_N[:, None] >> np.array([2, 1, 0]) & 1) - 1.0
            rank_NM = np.tile(np.arange(5), (size, 1))
            condition_NC = np.concatenate([bits_N3, x_ND], axis=1)
            ids = tuple(f"{name}-{seed}-{index:05d}" for index in range(size))
            return Points(name, ids, x_ND.astype(np.float32), label_N, condition_NC.astype(np.float32), rank_NM)

        return FlowTask(
            name="ring",
            labels=tuple(f"mode {mode}" for mode in range(MODES)),
            layout=Layout(np.arange(5), np.zeros(5, dtype=bool)),
            train=draw("train", self.train_size, run.seed),
            probe=draw("probe", self.probe_size, 0),
            evaluation=draw("eval", self.eval_size, run.seed),
        )


def modes() -> NDArray[np.float64]:
    """Return the middles of the ring's modes, [8, 2]."""
    angle = 2 * np.pi * np.arange(MODES) / MODES
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


class DigitsConfig(FlowTaskMethod):
    """scikit-learn's 1797 images of digits, 8x8 pixels, brightness scaled to [-1, 1].

    The student sees the class. The teacher is told it too, and is shown a share of the image's patches, in an order
    drawn for each image.
    """

    kind: Literal["digits"] = "digits"
    patch: int = 2
    """Side of a patch in pixels, a divisor of 8: 2 makes 16 patches."""
    train_size: Annotated[int, Field(ge=100, le=1697)] = 1200
    """Training images."""
    probe_size: Annotated[int, Field(ge=0, le=1000)] = 128
    """Images on which progress is measured: the same for all seeds. Those that are left over are held out."""

    right: ClassVar[str] = "are taken for the digit that was asked for by a small classifier"
    looks: ClassVar[Literal["points", "images"]] = "images"

    @model_validator(mode="after")
    def _patches_tile(self) -> DigitsConfig:
        if self.patch not in (1, 2, 4, 8):
            raise ValueError(
                f"task.patch = {self.patch} cuts an image of {SIDE}x{SIDE} pixels into no whole patches, which are "
                "what the teacher is shown: choose 1, 2, 4 or 8"
            )
        return self

    @model_validator(mode="after")
    def _images_are_left(self) -> DigitsConfig:
        if self.train_size + self.probe_size > 1797 - 100:
            raise ValueError(
                f"task.train_size and task.probe_size take {self.train_size + self.probe_size} of 1797 images, and 100 "
                "must be left to compare samples with: lower one"
            )
        return self

    def points(self, run: RunFacts) -> FlowTask:
        """Return the task. UserError where scikit-learn is missing."""
        image_ND, label_N = digits()
        order = np.random.default_rng(derive_seed(0, "digits probe")).permutation(len(image_ND))
        probe, others = order[: self.probe_size], order[self.probe_size :]
        others = np.random.default_rng(derive_seed(run.seed, "digits")).permutation(others)
        across = SIDE // self.patch
        row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
        patch_D = row // self.patch * across + column // self.patch

        def take(name: str, chosen: Whole) -> Points:
            class_NK = np.eye(10)[label_N[chosen]]
            rng = np.random.default_rng(derive_seed(0, f"patches {name}"))
            rank_NM = rng.permuted(np.tile(np.arange(across * across), (len(chosen), 1)), axis=1)
            condition_NC = np.concatenate([class_NK, image_ND[chosen]], axis=1).astype(np.float32)
            ids = tuple(f"image-{index:04d}" for index in chosen.tolist())
            return Points(name, ids, image_ND[chosen].astype(np.float32), label_N[chosen], condition_NC, rank_NM)

        is_class = np.arange(10 + SIDE * SIDE) < 10
        return FlowTask(
            name="digits",
            labels=tuple(f"digit {digit}" for digit in range(10)),
            layout=Layout(np.concatenate([np.full(10, ALWAYS), patch_D]), is_class),
            train=take("train", others[: self.train_size]),
            probe=take("probe", probe),
            evaluation=take("eval", others[self.train_size :]),
        )


def digits() -> tuple[NDArray[np.float64], Whole]:
    """Return all images [1797, 64] in [-1, 1] and their digits. UserError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "task.kind = \"digits\" needs scikit-learn, which holds the images: pip install 'atesd[digits]'"
        ) from None
    found = load_digits()
    return found.data / (GREY / 2) - 1.0, found.target.astype(np.int64)
