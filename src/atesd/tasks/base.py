"""stub"""
from __future__ import annotations
from typing import Protocol
class Task(Protocol): ...
