"""Write worked grade-school problems as JSONL: reasoning-gym's gsm_symbolic, one object a line.

python repro/gsm_symbolic_jsonl.py runs/gsm_symbolic.jsonl 400
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from atesd.tasks.gym import GymConfig


def main(path: Path, count: int) -> None:
    """Write `count` different problems with their solutions and answers."""
    problems = GymConfig(train_size=count, probe_size=0, eval_size=0).build(0).train()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {"id": problem.id, "problem": problem.problem, "solution": problem.solution, "answer": problem.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(problems)} problems in {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 400)
