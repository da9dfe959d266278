"""Who says whether a sample is right, what it is most like, and how good a set of samples is.

`ring` is judged by its own normals. `digits` has a small classifier, trained on the training images with a seed of its
own, so that it depends on nothing that a run chooses but the images.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from atesd.flow.quality import energy_distance, frechet_distance, mode_coverage
from atesd.tasks.flows import SPREAD, FlowTask, modes

STEPS, BATCH, RATE, WIDTH, FEATURES = 400, 128, 3e-3, 64, 16  # of the classifier


class Judge(Protocol):
    """What a run asks about points [N, D]."""

    def probabilities(self, x_ND: Tensor) -> Tensor:
        """Return of each label how probable it is, [N, K]."""
        ...

    def right(self, x_ND: Tensor, label_N: Tensor) -> Tensor:
        """Tell of each sample whether it is what was asked for."""
        ...

    def quality(self, x_ND: Tensor, label_N: Tensor) -> dict[str, float]:
        """Return numbers about the samples as a set, by name; the first is a distance, and counts for `best`."""
        ...


class RingJudge:
    """Knows the modes."""

    def __init__(self, task: FlowTask) -> None:
        self._middles = torch.as_tensor(modes(), dtype=torch.float32)
        self._data = torch.as_tensor(task.evaluation.x_ND)

    def probabilities(self, x_ND: Tensor) -> Tensor:
        """Return the modes' shares of the density at a point."""
        return (-torch.cdist(x_ND, self._middles).square() / (2 * SPREAD**2)).softmax(-1)

    def right(self, x_ND: Tensor, label_N: Tensor) -> Tensor:  # noqa: ARG002
        """Tell whether a sample lies within three standard deviations of a mode, whichever."""
        return torch.cdist(x_ND, self._middles).min(-1).values <= 3 * SPREAD

    def quality(self, x_ND: Tensor, label_N: Tensor) -> dict[str, float]:
        """Return energy distance to held-out points, and coverage."""
        on_mode = x_ND[self.right(x_ND, label_N)]
        mode_N = torch.cdist(on_mode, self._middles).argmin(-1)
        return {
            "energy_distance": energy_distance(x_ND, self._data),
            "mode_coverage": mode_coverage(mode_N, len(self._middles), len(x_ND)),
        }


class DigitsJudge:
    """A classifier with two hidden layers, the second of which gives the features of the Fréchet distance."""

    def __init__(self, task: FlowTask) -> None:
        random = torch.Generator().manual_seed(0)
        dims = task.train.x_ND.shape[1]
        sizes = [dims, WIDTH, FEATURES, len(task.labels)]
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=random)
            nn.init.zeros_(layer.bias)
        self._body = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU())
        self._head = layers[2]
        x, label = torch.as_tensor(task.train.x_ND), torch.as_tensor(task.train.label_N)
        weights = [*self._body.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=RATE)
        for _ in range(STEPS):
            chosen = torch.randint(0, len(x), (BATCH,), generator=random)
            loss = nn.functional.cross_entropy(self._head(self._body(x[chosen])), label[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for weight in weights:
            weight.requires_grad_(False)
        self._data = self._body(torch.as_tensor(task.evaluation.x_ND))

    def probabilities(self, x_ND: Tensor) -> Tensor:
        """Return the classifier's."""
        found: Tensor = self._head(self._body(x_ND)).softmax(-1)
        return found

    def right(self, x_ND: Tensor, label_N: Tensor) -> Tensor:
        """Tell whether the classifier sees the digit that was asked for."""
        return self.probabilities(x_ND).argmax(-1) == label_N

    def quality(self, x_ND: Tensor, label_N: Tensor) -> dict[str, float]:
        """Return the Fréchet distance of features to those of held-out images, and the agreement of classes."""
        agreement = self.right(x_ND, label_N).double().mean()
        return {
            "frechet_distance": frechet_distance(self._body(x_ND), self._data),
            "class_agreement": float(agreement),
        }


JUDGES: dict[str, type[RingJudge] | type[DigitsJudge]] = {"ring": RingJudge, "digits": DigitsJudge}
