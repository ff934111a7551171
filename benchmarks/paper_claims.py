"""The claims of published roads as small ordinary stages over seeds: which orderings hold.

    python benchmarks/paper_claims.py --work FOLDER --claims ROAD/NAME ... > benchmarks/results/reproduce.txt

A file `claims/ROAD.yaml` has the paper's sentences, the arms of each as commands, the figure that is read of
each arm, and tests of the form "this arm lies below that one by more than a bound". Arms of one seed are
paired; a test holds if Student's 95 % interval of the differences lies above the bound. A killed command goes
on after the last command that ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from megatron_sov.eval.statistics import CONFIDENCE, student_quantile

CLAIMS = Path(__file__).with_name("claims")
PROGRAMS = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
PLACE = re.compile(r"\{([a-z]\w*)\}")
"""A shared word, a folder or the seed in a command."""


class ClaimFile:
    """The claims of one road."""

    def __init__(self, file: Path) -> None:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.claims: dict[str, dict[str, Any]] = raw["claims"]
        self.words: dict[str, str] = raw.get("words", {})
        self.setup: dict[str, list[str]] = raw.get("setup", {})

    def spell(self, command: str) -> str:
        """Return a command with the shared words written out."""
        return PLACE.sub(lambda place: self.words.get(place[1], place[0]), command)

    def commands(self) -> Iterator[str]:
        """Yield every command with the shared words written out."""
        claims = self.claims.values()
        lists = [*self.setup.values(), *(c.get("base", []) for c in claims),
                 *(arm for c in claims for arm in c["arms"].values())]
        yield from (self.spell(command) for commands in lists for command in commands)

    def needed(self, name: str) -> list[str]:
        """Return the setups that a claim reads, each after those that it reads itself."""
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
    """Return the figure of an arm: the mean of what the keys of `value` lead to, `*` to all."""
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


def interval_of(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of a mean; None of fewer than two values."""
    if len(differences) < 2:
        return None
    half = (student_quantile((1 + CONFIDENCE) / 2, len(differences) - 1) * stdev(differences)
            / len(differences) ** 0.5)
    return fmean(differences) - half, fmean(differences) + half


def verdict(differences: Sequence[float], bound: float, num_seeds: int) -> str:
    """Return what the paired differences of a test say; fewer seeds than the claim asks for decide nothing,
    nor do differences that are all the same."""
    interval = interval_of(differences)
    if interval is None or len(differences) < num_seeds or max(differences) - min(differences) < 1e-9:
        return "undecided"
    return "holds" if interval[0] > bound else "does not hold" if interval[1] <= bound else "undecided"


def run_claim(road: str, name: str, work: Path) -> None:
    """Run what is missing of a claim, and print its arms and tests."""
    claims = ClaimFile(CLAIMS / f"{road}.yaml")
    claim = claims.claims[name]
    places = {"claims": str(CLAIMS)}
    for setup in claims.needed(name):
        folder = work / road / "setup" / setup
        run_commands(folder, [claims.spell(command) for command in claims.setup[setup]], places)
        places[setup] = str(folder)
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(claim["seeds"]):
        folder = work / road / name / f"seed-{seed}"
        own = {**places, "seed": str(seed), "base": str(folder / "base")}
        run_commands(folder / "base", [claims.spell(command) for command in claim.get("base", [])], own)
        for arm, commands in claim["arms"].items():
            run_commands(folder / arm, [claims.spell(command) for command in commands], own)
        found.append({arm: {measure: read_figure(folder / arm, what)
                            for measure, what in claim["measures"].items()} for arm in claim["arms"]})
    print(f"\n{road}/{name}: {len(found)} seeds\n  {claim['says'].strip()}")
    for measure, what in claim["measures"].items():
        print(f"  {what['unit']}")
        for arm in claim["arms"]:
            print(f"    {arm:<12} {', '.join(f'{figures[arm][measure]:.4f}' for figures in found)}")
    for test in claim["tests"]:
        differences = [figures[test["higher"]][test["measure"]] - figures[test["lower"]][test["measure"]]
                       for figures in found]
        bound, interval = test.get("more_than", 0.0), interval_of(differences)
        said = f", 95 %: {interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ""
        print(f"  {test['lower']} < {test['higher']} in {test['measure']}, bound {bound:g}: "
              f"{verdict(differences, bound, claim['seeds'])}, {fmean(differences):+.4f}{said}")


def main() -> None:
    """Run claims one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--claims", nargs="+", required=True, metavar="ROAD/NAME")
    args = parser.parse_args()
    for asked in args.claims:
        run_claim(*asked.split("/"), args.work.absolute())


if __name__ == "__main__":
    main()
