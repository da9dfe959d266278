"""stub"""
from __future__ import annotations
def extract_answer(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.startswith("#")]
    return lines[-1][1:].strip() if lines else None
