"""Mutation score of the core: mutate a seeded sample, run the tests that reach it, count the mutants that die.

`make mutants` runs this and rewrites `results.json`. What the core is and which tests run stands under `[tool.mutmut]`
in pyproject.toml. Mutants that no test could tell from the original stand in `equivalent.toml`, with the reason; the
score leaves them out.

1. The sample is stratified by file, in proportion to the number of mutants. Within a file the mutants with the smallest
   hash of (seed, what is changed) are taken: another commit keeps the sample of every function that it leaves alone.
2. A mutant that runs into its time limit counts as killed: a test's limit is processor time (mutant_worker.py), the
   tool's own is wall time and generous. One whose process died in another way is an error and counts as alive.
   So does one whose killer fails without a mutant as well: every killer is tried in a process of the same making.
3. The tool does not mutate decorated functions (properties, validators, context managers), nor code of modules and
   classes outside functions.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SRC = Path("src/atesd")
COPY = ROOT / "mutants"
RESULTS = HERE / "results.json"
EQUIVALENT = HERE / "equivalent.toml"
CONTROL = "control.x_none__mutmut_0"
STATUSES = ("killed", "timeout", "survived", "no tests", "error")
# Exit codes of pytest and of the tool: 33 is its "no test reaches this"; SIGXCPU is its limit, SIGPROF that of a test.
STATUS_OF_EXIT = {0: "survived", 1: "killed", 33: "no tests", -signal.SIGXCPU: "timeout", -signal.SIGPROF: "timeout"}


@dataclass(frozen=True)
class Change:
    """What a mutant changes; the same in another commit that leaves the function alone. File below src/atesd."""

    file: str
    function: str
    original: str
    mutated: str


@dataclass(frozen=True)
class Mutant:
    name: str
    """The tool's own name, as in `mutmut show NAME`."""
    change: Change
    line: int
    order: int
    """Which of the equal changes of its function it is."""

    def rank(self, seed: int) -> str:
        return hashlib.sha256(repr((seed, self.change, self.order)).encode()).hexdigest()


@dataclass
class Tally:
    mutants: int
    sampled: int = 0
    equivalent: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, int]:
        counts = {status.replace(" ", "_"): self.counts[status] for status in STATUSES}
        return {"mutants": self.mutants, "sampled": self.sampled, "equivalent": self.equivalent, **counts}


def prepare() -> None:
    """Set what the tool and its children inherit: one thread, and the mutated copy before any installed one."""
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTEST_ADDOPTS="-p mutant_worker")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(COPY / "src"), str(HERE)])
    shutil.rmtree(COPY, ignore_errors=True)


def generate(workers: int) -> list[Path]:
    """Write the mutated copy of the sources and return the files that were mutated, relative to the root."""
    from mutmut import __main__ as tool
    from mutmut.configuration import config

    files = sorted(tool.walk_mutatable_files())
    for pattern in config().only_mutate:
        if not any(fnmatch.fnmatch(str(path), pattern) for path in files):
            print(f"note: no file matches {pattern} ([tool.mutmut] in pyproject.toml)")
    COPY.mkdir()
    with tool.CatchOutput():
        tool.copy_src_dir()
        tool.copy_also_copy_files()
        tool.setup_source_paths()
        tool.create_mutants(workers)
    return files


def functions(source: str) -> dict[str, int]:
    """Map the dotted name of every function and method to the line of its `def`."""
    lines: dict[str, int] = {}

    def visit(body: Iterable[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines[prefix + node.name] = node.lineno
            elif isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return lines


def difference(original: list[str], mutated: list[str]) -> tuple[int, str, str]:
    """Return where two texts begin to differ, and the differing lines of each as one line."""
    start = next((i for i, pair in enumerate(zip(original, mutated, strict=False)) if pair[0] != pair[1]), 0)
    end = 0
    while end < min(len(original), len(mutated)) - start and original[-1 - end] == mutated[-1 - end]:
        end += 1
    old, new = original[start : len(original) - end], mutated[start : len(mutated) - end]
    return start, " ".join(map(str.strip, old)), " ".join(map(str.strip, new))


def mutants_of(path: Path) -> list[Mutant]:
    """Read the mutants of a file back from the mutated copy, as text: to parse them all takes minutes."""
    from mutmut.mutation.data import MutantLineSpans, SourceFileMutationData
    from mutmut.mutation.diff_apply import generated_function_names
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    data = SourceFileMutationData(path=path)
    data.load()
    spans = MutantLineSpans.load(path)
    if spans is None:
        return []
    names = [name for pair in map(generated_function_names, data.exit_code_by_key) for name in pair]
    unique = list(dict.fromkeys(names))
    texts = {
        name: text.replace(f"def {name}(", "def (", 1).split("\n")
        for name, text in zip(unique, spans.read_function_sources(unique), strict=True)
    }
    lines = functions(path.read_text(encoding="utf-8"))
    seen: Counter[Change] = Counter()
    mutants = []
    for name in data.exit_code_by_key:
        original, mutated = (texts[part] for part in generated_function_names(name))
        start, old, new = difference(original, mutated)
        function, owner = orig_function_and_class_names_from_key(name)
        dotted = f"{owner}.{function}" if owner else function
        head = next(i for i, line in enumerate(original) if line.lstrip().startswith(("def (", "async def (")))
        change = Change(str(path.relative_to(SRC)), dotted, old, new)
        mutants.append(Mutant(name, change, lines[dotted] + start - head, seen[change]))
        seen[change] += 1
    return mutants


def shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Split a total in proportion to the sizes by largest remainder, at least 1 and at most all of each."""
    everything = sum(sizes.values())
    total = min(total, everything)
    exact = {key: total * size / everything for key, size in sizes.items() if size}
    split = {key: max(1, math.floor(share)) for key, share in exact.items()}
    for key in sorted(exact, key=lambda key: (math.floor(exact[key]) - exact[key], key)):
        if sum(split.values()) < total and split[key] < sizes[key]:
            split[key] += 1
    return split


def draw(mutants: list[Mutant], total: int, seed: int) -> list[Mutant]:
    """Draw the stratified sample."""
    by_file: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_file[mutant.change.file].append(mutant)
    split = shares({file: len(members) for file, members in by_file.items()}, total)
    return [
        mutant
        for file, members in sorted(by_file.items())
        for mutant in sorted(members, key=lambda mutant: mutant.rank(seed))[: split[file]]
    ]


def read_equivalent(mutants: list[Mutant], files: list[Path]) -> set[Change]:
    """Read the judged mutants; an entry that fits no mutant of the files at hand is refused, for it is out of date."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", [])
    assert all(entry.pop("reason").strip() for entry in entries)
    judged = {Change(**entry) for entry in entries}
    at_hand = {str(path.relative_to(SRC)) for path in files}
    stale = {change for change in judged if change.file in at_hand} - {mutant.change for mutant in mutants}
    gone = {change for change in judged if not (ROOT / SRC / change.file).exists()}
    for change in sorted(stale | gone, key=repr):
        print(f"{EQUIVALENT.name}: no such mutant any more: {change}")
    if stale | gone:
        raise SystemExit(f"mend or remove {len(stale | gone)} entries of {EQUIVALENT.relative_to(ROOT)}")
    return judged


def read_notes() -> dict[str, dict[str, Any]]:
    """Read what mutant_worker.py wrote, by mutant; the last note of each."""
    path = COPY / "notes.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {note["mutant"]: note for note in map(json.loads, lines)}


def execute(sample: list[Mutant], workers: int) -> dict[str, str]:
    """Let the tool test the sample; return the status of each mutant by name."""
    from mutmut.mutation.data import SourceFileMutationData

    tool = Path(sys.executable).with_name("mutmut")
    command = [str(tool), "run", "--max-children", str(workers), *(mutant.name for mutant in sample)]
    log = COPY / "log.txt"
    start = time.monotonic()
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            tested = len(read_notes().keys() - {""})
            done = f"{tested} of {len(sample)} tested" if tested else "first all tests run twice without a mutant"
            print(f"  {(time.monotonic() - start) / 60:.0f} min: {done}", flush=True)
    if process.returncode:
        print(f"the test that failed before any mutant, if one did: {read_notes().get('', {}).get('test')}")
        raise SystemExit(f"the tool ended with {process.returncode}, its words: {log}")
    statuses: dict[str, str] = {}
    for file in {mutant.change.file for mutant in sample}:
        data = SourceFileMutationData(path=SRC / file)
        data.load()
        statuses |= {name: STATUS_OF_EXIT.get(code, "error") for name, code in data.exit_code_by_key.items()}
    killer = {name: note["test"] for name, note in read_notes().items() if statuses.get(name) == "killed"}
    false = false_killers(set(killer.values()))
    killed = {name for name, status in statuses.items() if status == "killed"}
    return statuses | {name: "error" for name in killed if killer.get(name) in {None, *false}}


def control(tests: set[str]) -> str | None:
    """Run tests in a process forked like a mutant's, with no mutant in it; return the first that fails."""
    from mutmut.workers.isolation import get_mutant_runner

    runner = get_mutant_runner(1)
    runner.startup()
    runner.submit(CONTROL, sorted(tests), cpu_time_limit=3600, estimated_time=0)
    runner.signal_work_complete()
    code = runner.wait_for_result().exit_code
    runner.shutdown()
    note = read_notes()[CONTROL]
    assert (code == 0) == (note["test"] is None), f"the control ended with {code}"
    return note["test"]


def false_killers(killers: set[str]) -> set[str]:
    """Return the tests that fail without a mutant too: what they killed is not known to be dead."""
    false: set[str] = set()
    while killers - false and (failed := control(killers - false)):
        print(f"fails without a mutant in the process of a mutant: {failed}", flush=True)
        false.add(failed)
    return false


def wilson(killed: int, judged: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share, Wilson's."""
    z = 1.96
    share, room = killed / judged, z * z / judged
    half = z * math.sqrt(share * (1 - share) / judged + room / judged / 4)
    return (share + room / 2 - half) / (1 + room), (share + room / 2 + half) / (1 + room)


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "tests", ":!tests/mutation/results.json")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")


def summary(
    mutants: list[Mutant], sample: list[Mutant], statuses: dict[str, str], judged: set[Change]
) -> dict[str, Any]:
    """Count by file, and list what was not killed."""
    tallies = {file: Tally(count) for file, count in Counter(mutant.change.file for mutant in mutants).items()}
    listed: dict[str, list[dict[str, Any]]] = {"timeouts": [], "alive": []}
    for mutant in sample:
        tally, status = tallies[mutant.change.file], statuses[mutant.name]
        tally.sampled += 1
        if mutant.change in judged:
            tally.equivalent += 1
            continue
        tally.counts[status] += 1
        if status != "killed":
            group = "timeouts" if status == "timeout" else "alive"
            listed[group].append({"status": status, "line": mutant.line, **vars(mutant.change)})
    rows = {file: tally.row() for file, tally in sorted(tallies.items())}
    total = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
    killed, counted = total["killed"] + total["timeout"], total["sampled"] - total["equivalent"]
    return {
        "score": round(killed / counted, 4),
        "interval_95": [round(end, 4) for end in wilson(killed, counted)],
        "total": total,
        "files": rows,
        **listed,
    }


def table(results: dict[str, Any]) -> str:
    """Write the counts as text, one line a file."""
    keys = list(results["total"])
    rows = [["file", *(key.replace("_", " ") for key in keys), "score"]]
    for file, row in [*results["files"].items(), ("all", results["total"])]:
        counted = row["sampled"] - row["equivalent"]
        score = f"{(row['killed'] + row['timeout']) / counted:.0%}" if counted else "-"
        rows.append([file, *(str(row[key]) for key in keys), score])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation score of the core.")
    parser.add_argument("--sample", type=int, default=300, help="number of mutants to test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="mutants tested side by side")
    parser.add_argument("--only", default="*", help="pattern of files below src/atesd; results.json is left alone")
    parser.add_argument(
        "--alive", action="store_true", help="only the mutants listed as alive; results.json left alone"
    )
    args = parser.parse_args()

    start, tested = time.monotonic(), commit()
    prepare()
    files = [path for path in generate(args.workers) if fnmatch.fnmatch(str(path.relative_to(SRC)), args.only)]
    mutants = [mutant for path in files for mutant in mutants_of(path)]
    judged = read_equivalent(mutants, files)
    if args.alive:
        listed = json.loads(RESULTS.read_text(encoding="utf-8"))["alive"]
        wanted = {Change(**{key: entry[key] for key in Change.__annotations__}) for entry in listed}
        sample = [mutant for mutant in mutants if mutant.change in wanted]
    else:
        sample = draw(mutants, args.sample, args.seed)
    if not sample:
        raise SystemExit("no mutant to test")
    print(f"{len(sample)} of {len(mutants)} mutants", flush=True)
    statuses = execute(sample, args.workers)
    results = summary(mutants, sample, statuses, judged)
    for entry in results["alive"]:
        print(
            f"{SRC / entry['file']}:{entry['line']} {entry['status']}\n  - {entry['original']}\n  + {entry['mutated']}"
        )
    print(table(results))
    low, high = results["interval_95"]
    minutes = round((time.monotonic() - start) / 60, 1)
    print(f"score {results['score']:.1%}, 95 % interval {low:.1%} to {high:.1%}, {minutes} minutes")
    if args.only == "*" and not args.alive:
        made = {"tool": f"mutmut {version('mutmut')}", "python": sys.version.split()[0], "torch": version("torch")}
        made |= {"commit": tested, "seed": args.seed, "minutes": minutes}
        RESULTS.write_text(json.dumps({**made, **results}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
