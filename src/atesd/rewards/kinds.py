"""stub"""
from __future__ import annotations
from typing import Literal
from atesd.types import Config
from atesd.rewards.answer import extract_answer
class ExactConfig(Config):
    kind: Literal["exact"] = "exact"
    def build(self):
        def f(prompts, completions, answer, **_):
            return [None if a is None else float(extract_answer(c) == a) for c, a in zip(completions, answer)]
        return f
RewardConfig = ExactConfig
