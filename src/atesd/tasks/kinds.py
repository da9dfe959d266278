"""stub"""
from __future__ import annotations
from typing import Literal
from atesd.types import Config
from atesd.rewards.kinds import ExactConfig
from atesd.tasks.synthetic import pico
class _T:
    name = "pico"
    default_reward = ExactConfig()
    def train(self): return pico.problems("train", 4096, 0)
    def probe(self): return pico.problems("probe", 32, 0)
    def evaluation(self): return pico.problems("eval", 128, 0)
    def traits(self, p, t): return {"answers_early": pico.answers_early(p, t)}
class PicoConfig(Config):
    kind: Literal["pico"] = "pico"
    def build(self, seed): return _T()
TaskConfig = PicoConfig
