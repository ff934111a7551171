"""Run recipes of small models over seeds: their arms, their curves, and which orderings of the arms hold.

    python benchmarks/learning.py RECIPE[/CLAIM] ... --work FOLDER [--seeds N] [--arms ARM ...]

RECIPE is a file `learning/RECIPE.yaml`; without CLAIM all its claims run.  A claim has arms as ordinary
commands, the figure that is read of each arm, and tests of the form "this arm lies below that one by more
than a bound".  Arms of one seed are paired; a test holds if Student's 95 % interval of the differences lies
above the bound.  `curves` are fields of an arm's events, printed as means over the seeds.  With fewer seeds
than the claim asks for every test is undecided.  A killed command goes on after the last command that ended.
"""

from __future__ import annotations

import argparse
import json
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
from seeds import half_width

RECIPES = Path(__file__).with_name("learning")
CURVE_POINTS = 8
PROGRAMS = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
PLACE = re.compile(r"\{([a-z]\w*)\}")
"""A shared word, a folder or the seed in a command."""


class Recipe:
    """The claims of one file."""

    def __init__(self, file: Path) -> None:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.name = file.stem
        self.claims: dict[str, dict[str, Any]] = raw["claims"]
        self.words: dict[str, str] = raw.get("words", {})
        self.setup: dict[str, list[str]] = raw.get("setup", {})

    def spell(self, command: str) -> str:
        """Return a command with the shared words, and those in these, written out."""
        while (spelled := PLACE.sub(lambda place: self.words.get(place[1], place[0]), command)) != command:
            command = spelled
        return command

    def commands(self) -> Iterator[str]:
        """Yield every command with the shared words written out."""
        claims = self.claims.values()
        lists = [*self.setup.values(), *(c.get("base", []) for c in claims),
                 *(arm for c in claims for arm in c["arms"].values())]
        yield from (self.spell(command) for commands in lists for command in commands)

    def needed(self, name: str) -> list[str]:
        """Return the setups that a claim depends on, dependencies first."""
        claim = self.claims[name]
        waiting = [*claim.get("base", []), *(c for arm in claim["arms"].values() for c in arm)]
        found: set[str] = set()
        while waiting:
            named = set(PLACE.findall(self.spell(waiting.pop()))) & self.setup.keys() - found
            found |= named
            waiting += [command for setup in named for command in self.setup[setup]]
        return [setup for setup in self.setup if setup in found]


def run_commands(folder: Path, commands: Sequence[str], places: Mapping[str, str]) -> None:
    """Run the commands of a folder that have not ended yet, each of one thread; `> FILE` takes its output."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    for number in range(int(done.read_text()) if done.exists() else 0, len(commands)):
        words = [PLACE.sub(lambda place: {**places, "here": str(folder)}[place[1]], word)
                 for word in shlex.split(commands[number])]
        words, target = (words[:-2], words[-1]) if ">" in words[-2:-1] else (words, "")
        with open(folder / "log", "ab") as log, open(target or os.devnull, "wb") as out:
            command = [sys.executable, "-P", "-W", "ignore", "-m", PROGRAMS[words[0]], *words[1:]]
            code = subprocess.run(command, stdout=out if target else log, stderr=log, cwd=folder, check=False,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"{folder / 'log'}: {shlex.join(words[:3])} ended with exit code {code}")
        done.write_text(str(number + 1))


def read_figure(folder: Path, measure: Mapping[str, str]) -> float:
    """Return the figure of an arm: the mean of the values at the path `value`; `*` selects all items."""
    text = (folder / measure["file"]).read_text(encoding="utf-8")
    is_lines = measure["file"].endswith(".jsonl")
    rows = [json.loads(line) for line in text.split("\n") if line] if is_lines else [json.loads(text)]
    if "event" in measure:
        rows = [row for row in rows if row.get("event") == measure["event"]][-1:]
    for key in measure["value"].split("/"):
        rows = [inner for row in rows for inner in (
            (row.values() if isinstance(row, dict) else row) if key == "*"
            else [row[int(key) if isinstance(row, list) else key]])]
    return fmean(rows)


def read_curve(folder: Path, curve: Mapping[str, str]) -> list[float]:
    """Return a field of all events of one kind of a run, in order."""
    lines = (folder / curve.get("file", "run/events.jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == curve["event"]]
    for key in curve["value"].split("/"):
        rows = [row[key] for row in rows]
    return rows


def print_curve(name: str, of_arms: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Print the mean over seeds of a curve of each arm, at places that lie evenly in it.

    Args:
        name: what the curve shows.
        of_arms: arm -> for each seed, the values in order.
    """
    print(f"  {name}, from the first to the last")
    for arm, curves in of_arms.items():
        means = [fmean(values) for values in zip(*curves, strict=False)]
        places = sorted({round(i * (len(means) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
        print(f"    {arm:<12} {' '.join(f'{means[place]:8.4f}' for place in places)}")


def interval_of(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of a mean; None of fewer than two values."""
    if len(differences) < 2:
        return None
    mean, half = fmean(differences), half_width(differences)
    return mean - half, mean + half


def verdict(differences: Sequence[float], bound: float, num_seeds: int, may_be_equal: bool = False) -> str:
    """Return whether a test holds.

    Args:
        differences: of the two arms, one for each seed.
        bound: of the test.
        num_seeds: how many the claim asks for; fewer decide nothing.
        may_be_equal: whether differences that are all the same decide: at a ceiling, and not in a figure that
            draws no lots.
    """
    interval = interval_of(differences)
    are_equal = max(differences) - min(differences) < 1e-9
    if interval is None or len(differences) < num_seeds or (are_equal and not may_be_equal):
        return "undecided"
    return "holds" if interval[0] > bound else "does not hold" if interval[1] <= bound else "undecided"


def run_claim(recipe: Recipe, name: str, work: Path, num_seeds: int | None,
              only: Collection[str] = ()) -> None:
    """Run the arms of a claim that have not run yet, and print their figures, curves and tests.

    Args:
        recipe: the file of the claim.
        name: of the claim.
        work: folder of the recipe's runs.
        num_seeds: how many seeds to run; None: as many as the claim asks for.
        only: the arms to run; empty: all.
    """
    claim = recipe.claims[name]
    arms = [arm for arm in claim["arms"] if not only or arm in only]
    places = {"learning": str(RECIPES)}
    for setup in recipe.needed(name):
        folder = work / "setup" / setup
        run_commands(folder, [recipe.spell(command) for command in recipe.setup[setup]], places)
        places[setup] = str(folder)
    folders = []
    for seed in range(num_seeds or claim["seeds"]):
        folder = work / name / f"seed-{seed}"
        own = {**places, "seed": str(seed), "base": str(folder / "base")}
        run_commands(folder / "base", [recipe.spell(command) for command in claim.get("base", [])], own)
        for arm in arms:
            run_commands(folder / arm, [recipe.spell(command) for command in claim["arms"][arm]], own)
        folders.append(folder)
    print(f"\n{recipe.name}/{name}: {len(folders)} seeds\n  {claim['says'].strip()}")
    found = {measure: {arm: [read_figure(folder / arm, what) for folder in folders] for arm in arms}
             for measure, what in claim["measures"].items()}
    for measure, of_arms in found.items():
        print(f"  {claim['measures'][measure]['unit']}")
        for arm, figures in of_arms.items():
            print(f"    {arm:<12} {', '.join(f'{figure:.4f}' for figure in figures)}")
    for curve in claim.get("curves", {}).values():
        print_curve(curve["unit"], {arm: [read_curve(folder / arm, curve) for folder in folders]
                                    for arm in arms if arm not in curve.get("not", [])})
    for test in (test for test in claim["tests"] if {test["lower"], test["higher"]} <= {*arms}):
        print_test(test, found[test["measure"]], claim["seeds"])


def print_test(test: Mapping[str, Any], figures: Mapping[str, Sequence[float]], num_seeds: int) -> None:
    """Print whether an arm lies above another one by more than the bound of a test."""
    differences = [a - b for a, b in zip(figures[test["higher"]], figures[test["lower"]], strict=True)]
    bound, interval = test.get("more_than", 0.0), interval_of(differences)
    written = f", 95 %: {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
    outcome = verdict(differences, bound, num_seeds, test.get("may_be_equal", False))
    print(f"  {test['lower']} < {test['higher']} in {test['measure']}, bound {bound:g}: {outcome}, "
          f"{fmean(differences):+.4f}{written}")


def main() -> None:
    """Run the requested claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("claims", nargs="+", metavar="RECIPE[/CLAIM]",
                        help=f"recipes: {', '.join(sorted(file.stem for file in RECIPES.glob('*.yaml')))}")
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, help="how many (default: as many as a claim asks for)")
    parser.add_argument("--arms", nargs="+", default=[], help="arms to run (default: all)")
    args = parser.parse_args()
    asked_for: list[tuple[Recipe, str]] = []
    for asked in args.claims:
        name, _, claim = asked.partition("/")
        if not (file := RECIPES / f"{name}.yaml").is_file():
            parser.error(f"{name}: {RECIPES} has no recipe of this name")
        recipe = Recipe(file)
        if claim and claim not in recipe.claims:
            parser.error(f"{asked}: no claim of {file}; it has {', '.join(recipe.claims)}")
        asked_for += [(recipe, one) for one in ([claim] if claim else recipe.claims)]
    for recipe, claim in asked_for:
        run_claim(recipe, claim, args.work.absolute() / recipe.name, args.seeds, args.arms)


if __name__ == "__main__":
    main()
