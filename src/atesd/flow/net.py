"""The velocity network: an MLP that reads a point, the time, and the visible part of a condition."""

from __future__ import annotations

import json
from math import pi
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FREQUENCIES = 4


class VelocityNet(nn.Module):
    """v(x, t | visible condition). Student and teacher are this same network: they differ in what is visible.

    A hidden entry of the condition is 0, and the mask beside it says that it is hidden.
    """

    octaves: Tensor

    def __init__(self, dims: int, conditions: int, width: int, depth: int) -> None:
        super().__init__()
        self.sizes = {"dims": dims, "conditions": conditions, "width": width, "depth": depth}
        inputs = dims + 2 * FREQUENCIES + 1 + 2 * conditions
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, dims))
        self.register_buffer("octaves", pi * 2.0 ** torch.arange(FREQUENCIES), persistent=False)

    def draw(self, random: torch.Generator) -> None:
        """Draw all weights anew: torch's default for linear layers, from a generator of one's own."""
        with torch.no_grad():
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=random)
                    layer.bias.uniform_(-bound, bound, generator=random)

    def forward(self, x_BD: Tensor, t_B1: Tensor, condition_BC: Tensor, visible_BC: Tensor) -> Tensor:
        """Return velocities [B, D]; `t_B1` is one time a point."""
        angles = t_B1 * self.octaves
        seen = [x_BD, t_B1, angles.sin(), angles.cos(), condition_BC * visible_BC, visible_BC]
        velocity: Tensor = self.layers(torch.cat(seen, dim=-1))
        return velocity

    def save_pretrained(self, folder: Path, **_: object) -> None:
        """Write weights and sizes, as checkpoints and models are written."""
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"kind": "velocity_net", **self.sizes}, indent=2) + "\n")
