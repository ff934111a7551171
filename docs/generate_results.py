"""Writes docs/results.md from benchmarks/results/verdicts.yaml: `python docs/generate_results.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.artifacts import write_atomically

PAGE = Path(__file__).parent / "results.md"
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
VERDICTS = ("holds", "in part", "too few seeds", "fails", "old", "never run on a GPU")
HEAD = """# Results

<!-- Written by docs/generate_results.py from benchmarks/results/verdicts.yaml; change it there. -->

What the benchmarks showed, good and bad, with a row for each file in `benchmarks/results/`. **All but what
names an H200 ran on CPUs.** Models are tiny unless a row says otherwise. Figures of learning show you that a
method works, not what a large model gains.

| verdict | meaning | rows |
|---|---|---|
"""
MEANINGS = {
    "holds": "what was asked for was found",
    "in part": "some of it was found, or it was found with an exception that the row names",
    "too few seeds": "one seed or one run: a hint",
    "fails": "the opposite was found, or nothing",
    "old": "a newer run, which the row names, shows otherwise",
    "never run on a GPU": "a rehearsal with doubles: the claim is about GPUs and is open",
}


def verdicts() -> dict[str, dict[str, dict[str, Any]]]:
    """Return area -> name of a file without its ending -> what it shows."""
    return dict(yaml.safe_load((RESULTS / "verdicts.yaml").read_text(encoding="utf-8")))


def row(name: str, shown: dict[str, Any]) -> str:
    """Return one line of an area's table."""
    script = f"benchmarks/{shown.get('script', name)}.py"
    link = f"[script](../{script})" if "script_commit" not in shown else (
        f"`git show {shown['script_commit']}:{script}`")
    return (f"| {shown['claim']} | {shown['verdict']} | {shown['date']} | [{shown['page']}]({shown['page']}) "
            f"| [printed](../benchmarks/results/{name}.txt), {link} |\n")


def page() -> str:
    """Return the whole page."""
    areas = verdicts()
    given = [shown["verdict"] for rows in areas.values() for shown in rows.values()]
    text = HEAD + "".join(f"| {v} | {MEANINGS[v]} | {given.count(v)} |\n" for v in VERDICTS)
    for area, rows in areas.items():
        text += f"\n## {area}\n\n| what it shows | verdict | date | page | files |\n|---|---|---|---|---|\n"
        text += "".join(row(name, shown) for name, shown in rows.items())
    return text


if __name__ == "__main__":
    write_atomically(PAGE, page())
