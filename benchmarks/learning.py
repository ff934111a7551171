"""Train small models over several seeds, and test claims that compare the results of different commands.

    python benchmarks/learning.py RECIPE[/CLAIM] ... --work FOLDER [--seeds N] [--arms ARM ...] [--digest]

RECIPE is a file `learning/RECIPE.yaml` (toy models) or `real/RECIPE.yaml` (SmolLM2-135M-Instruct); without
CLAIM all its claims run. A claim has

    arms        lists of commands whose results are compared
    measures    figures that are read from the files of each arm
    tests       "arm A is lower than arm B by more than a bound"; arms of one seed are paired, and a test
                holds if Student's 95 % interval of the differences is above the bound
    curves      fields of an arm's events, printed as means over the seeds
    seeds       with fewer seeds every test is undecided
    budget_s    no seed starts after so many processor seconds
    start       an arm and the range of its figure for the first seed; outside it no other arm runs
    registered  digest of the claim's text and commands (`--digest`); a claim with another digest is refused

A command may also be `python SCRIPT`, or the path of a program in a setup's folder. A killed benchmark
continues after the last completed command.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from command_lines import PROGRAMS
from measurement import read_child_cpu_s
from seeds import compute_half_width

FOLDERS = [Path(__file__).with_name(name) for name in ("learning", "real")]
CURVE_POINTS = 8
PLACEHOLDER = re.compile(r"\{([a-z]\w*)\}")
"""Name of a shared word, a folder or the seed in a command."""


class Recipe:
    """The claims of one file."""

    def __init__(self, file: Path) -> None:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.name = file.stem
        self.scripts = {file.parent.name: str(file.parent)}
        self.claims: dict[str, dict[str, Any]] = raw["claims"]
        self.words: dict[str, str] = raw.get("words", {})
        self.setup: dict[str, list[str]] = raw.get("setup", {})

    def fill_words(self, command: str) -> str:
        """Return a command with all shared words filled in, including words within words."""
        filled = PLACEHOLDER.sub(lambda match: self.words.get(match[1], match[0]), command)
        return command if filled == command else self.fill_words(filled)

    def commands(self) -> Iterator[str]:
        """Yield every command with all shared words filled in."""
        command_lists = list(self.setup.values())
        for claim in self.claims.values():
            command_lists += [claim.get("base", []), *claim["arms"].values()]
        for commands in command_lists:
            yield from map(self.fill_words, commands)

    def compute_digest(self, name: str) -> str:
        """Return the first 16 digits of the SHA-256 of a claim and its setups, with all words filled in."""
        claim = {key: value for key, value in self.claims[name].items() if key != "registered"}
        setups = {setup: self.setup[setup] for setup in self.list_setups(name)}
        text = self.fill_words(json.dumps([claim, setups], sort_keys=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_registration(self, name: str) -> None:
        """Raise SystemExit if a claim's text differs from its registered text."""
        registered, digest = self.claims[name].get("registered"), self.compute_digest(name)
        if registered not in (None, digest):
            raise SystemExit(f"{self.name}/{name}: registered as {registered}, but its text now has the "
                             f"digest {digest}; undo the edit, or register a new claim")

    def list_setups(self, name: str) -> list[str]:
        """Return the setups that a claim depends on, dependencies first."""
        claim = self.claims[name]
        waiting = [*claim.get("base", []), *(c for arm in claim["arms"].values() for c in arm)]
        required: set[str] = set()
        while waiting:
            missing = set(PLACEHOLDER.findall(self.fill_words(waiting.pop()))) & self.setup.keys() - required
            required |= missing
            waiting += [command for setup in missing for command in self.setup[setup]]
        return [setup for setup in self.setup if setup in required]


def run_commands(folder: Path, commands: Sequence[str], places: Mapping[str, str]) -> None:
    """Run the incomplete commands of a folder, each on one thread.

    Args:
        folder: working folder; its file `done` has the number of completed commands.
        commands: commands; `> FILE` at the end redirects the output.
        places: placeholder -> its value in the commands.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {**places, "here": str(folder)}
    completed_file = folder / "done"
    num_completed = int(completed_file.read_text()) if completed_file.exists() else 0
    for number in range(num_completed, len(commands)):
        words = [PLACEHOLDER.sub(lambda match: values[match[1]], word)
                 for word in shlex.split(commands[number])]
        target = ""
        if ">" in words[-2:-1]:
            words, target = words[:-2], words[-1]
        with open(folder / "log", "ab") as log, open(target or os.devnull, "wb") as out:
            command = words
            if words[0] in PROGRAMS:
                command = [sys.executable, "-P", "-W", "ignore", "-m", PROGRAMS[words[0]], *words[1:]]
            elif words[0] == "python":
                command = [sys.executable, *words[1:]]
            begin_cpu_s = read_child_cpu_s()
            code = subprocess.run(command, stdout=out if target else log, stderr=log, cwd=folder, check=False,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"{folder / 'log'}: {shlex.join(words[:3])} ended with exit code {code}")
        (folder / "seconds").write_text(str(read_seconds(folder) + read_child_cpu_s() - begin_cpu_s))
        completed_file.write_text(str(number + 1))


def read_seconds(folder: Path) -> float:
    """Return the processor seconds of all commands that have completed in a folder and its subfolders."""
    return sum(float(file.read_text()) for file in folder.rglob("seconds"))


def read_figure(folder: Path, measure: Mapping[str, str]) -> float:
    """Return a figure of an arm: the mean of the values at the path `value` of a JSON or JSONL file, in which
    `*` selects all items. With `event` only the last event of that kind counts."""
    text = (folder / measure["file"]).read_text(encoding="utf-8")
    if measure["file"].endswith(".jsonl"):
        values = [json.loads(line) for line in text.split("\n") if line]
    else:
        values = [json.loads(text)]
    if "event" in measure:
        values = [row for row in values if row.get("event") == measure["event"]][-1:]
    for key in measure["value"].split("/"):
        if key == "*":
            items = [value.values() if isinstance(value, dict) else value for value in values]
            values = list(itertools.chain.from_iterable(items))
        else:
            values = [value[int(key) if isinstance(value, list) else key] for value in values]
    return fmean(values)


def read_curve(folder: Path, curve: Mapping[str, str]) -> list[float]:
    """Return the field `value` of all events of the kind `event` in a run, in order."""
    lines = (folder / curve.get("file", "run/events.jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == curve["event"]]
    for key in curve["value"].split("/"):
        rows = [row[key] for row in rows]
    return rows


def print_curve(name: str, curves_of_arms: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Print the mean over seeds of each arm's curve at `CURVE_POINTS` evenly spaced events.

    Args:
        name: label of the curve.
        curves_of_arms: arm -> the curve of each seed.
    """
    print(f"  {name}, from the first event to the last")
    for arm, curves in curves_of_arms.items():
        means = [fmean(values) for values in zip(*curves, strict=False)]
        places = sorted({round(i * (len(means) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
        print(f"    {arm:<12} {' '.join(f'{means[place]:8.4f}' for place in places)}")


def compute_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean, or None for fewer than two values."""
    if len(differences) < 2:
        return None
    mean, half = fmean(differences), compute_half_width(differences)
    return mean - half, mean + half


def decide(differences: Sequence[float], bound: float, num_seeds: int, may_be_equal: bool = False) -> str:
    """Decide a test: "holds", "does not hold" or "undecided".

    Args:
        differences: difference between the two arms for each seed.
        bound: bound of the test.
        num_seeds: number of seeds that the claim requires; with fewer the test is undecided.
        may_be_equal: accept seeds with equal differences, which occur at a ceiling. Otherwise the figure does
            not depend on the seed, and the test is undecided.
    """
    interval = compute_interval(differences)
    are_equal = max(differences) - min(differences) < 1e-9
    if interval is None or len(differences) < num_seeds or (are_equal and not may_be_equal):
        return "undecided"
    if interval[0] > bound:
        return "holds"
    return "does not hold" if interval[1] <= bound else "undecided"


def run_claim(recipe: Recipe, name: str, work: Path, num_seeds: int | None,
              only: Collection[str] = ()) -> None:
    """Run the incomplete arms of a claim, and print their figures, curves and tests.

    Args:
        recipe: recipe with the claim.
        name: name of the claim.
        work: folder of the recipe's runs.
        num_seeds: number of seeds to run; None: the number that the claim requires.
        only: arms to run; empty: all.
    """
    recipe.check_registration(name)
    claim = recipe.claims[name]
    arms = [arm for arm in claim["arms"] if not only or arm in only]
    places = dict(recipe.scripts)
    for setup in recipe.list_setups(name):
        folder = work / "setup" / setup
        run_commands(folder, [recipe.fill_words(command) for command in recipe.setup[setup]], places)
        places[setup] = str(folder)
    folders = []
    for seed in range(num_seeds or claim["seeds"]):
        folder = work / name / f"seed-{seed}"
        if seed and read_seconds(work / name) > claim.get("budget_s", math.inf):
            break
        seed_places = {**places, "seed": str(seed), "base": str(folder / "base")}
        for part in ("base", *arms):
            commands = claim.get("base", []) if part == "base" else claim["arms"][part]
            run_commands(folder / part, [recipe.fill_words(command) for command in commands], seed_places)
            if not seed and part == claim.get("start", {}).get("arm"):
                check_start(claim, folder / part)
        folders.append(folder)
    print(f"\n{recipe.name}/{name}: {len(folders)} of {claim['seeds']} seeds, registered as "
          f"{claim.get('registered', 'nothing')}, {read_seconds(work / name) / 3600:.2f} processor hours")
    print_claim(claim, arms, folders)


def print_claim(claim: Mapping[str, Any], arms: Sequence[str], folders: Sequence[Path]) -> None:
    """Print the figures, curves and tests of a claim's arms; `folders`: a folder for each seed."""
    print(f"  {claim['says'].strip()}")
    figures: dict[str, dict[str, list[float]]] = {}
    for measure, source in claim["measures"].items():
        print(f"  {source['unit']}")
        figures[measure] = {arm: [read_figure(folder / arm, source) for folder in folders] for arm in arms}
        for arm, of_seeds in figures[measure].items():
            print(f"    {arm:<12} {', '.join(f'{figure:.4f}' for figure in of_seeds)}")
    for curve in claim.get("curves", {}).values():
        print_curve(curve["unit"], {arm: [read_curve(folder / arm, curve) for folder in folders]
                                    for arm in arms if arm not in curve.get("not", [])})
    for test in claim["tests"]:
        if {test["lower"], test["higher"]} <= {*arms}:
            print_test(test, figures[test["measure"]], claim["seeds"])


def check_start(claim: Mapping[str, Any], folder: Path) -> None:
    """Raise SystemExit if the figure of the start leaves no room for the claim's arms."""
    start = claim["start"]
    figure = read_figure(folder, claim["measures"][start["measure"]])
    if not start["floor"] <= figure <= start["ceiling"]:
        raise SystemExit(f"{folder}: {start['measure']} of the start is {figure:.3f}, and the claim needs "
                         f"{start['floor']} to {start['ceiling']}; no other arm ran")


def find_recipes() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in folder.glob("*.yaml"))


def print_test(test: Mapping[str, Any], figures: Mapping[str, Sequence[float]], num_seeds: int) -> None:
    """Print whether one arm exceeds another by more than the bound of a test."""
    differences = [a - b for a, b in zip(figures[test["higher"]], figures[test["lower"]], strict=True)]
    bound, interval = test.get("more_than", 0.0), compute_interval(differences)
    range_text = f", 95 %: {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    outcome = decide(differences, bound, num_seeds, test.get("may_be_equal", False))
    print(f"  {test['lower']} < {test['higher']} in {test['measure']}, bound {bound:g}: {outcome}, "
          f"{fmean(differences):+.4f}{range_text}")


def main() -> None:
    """Run the requested claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("claims", nargs="+", metavar="RECIPE[/CLAIM]",
                        help=f"recipes: {', '.join(file.stem for file in find_recipes())}")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of all runs")
    parser.add_argument("--digest", action="store_true", help="print the claims' digests, and run nothing")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the claim's)")
    parser.add_argument("--arms", nargs="+", default=[], help="arms to run (default: all)")
    args = parser.parse_args()
    selected: list[tuple[Recipe, str]] = []
    for argument in args.claims:
        name, _, claim = argument.partition("/")
        files = [file for file in find_recipes() if file.stem == name]
        if not files:
            parser.error(f"{name}: no recipe of this name in {', '.join(folder.name for folder in FOLDERS)}")
        recipe = Recipe(files[0])
        if claim and claim not in recipe.claims:
            parser.error(f"{argument}: no claim of {files[0]}; it has {', '.join(recipe.claims)}")
        selected += [(recipe, name) for name in ([claim] if claim else recipe.claims)]
    for recipe, claim in selected:
        if args.digest:
            print(f"{recipe.name}/{claim} {recipe.compute_digest(claim)}")
            continue
        run_claim(recipe, claim, args.work.absolute() / recipe.name, args.seeds, args.arms)


if __name__ == "__main__":
    main()
