"""Write docs/results.md from benchmarks/results/verdicts.yaml."""

from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.artifacts import write_atomically

PAGE = Path(__file__).parent / "results.md"
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
HEAD = """# Results

<!-- Written by docs/generate_results.py from benchmarks/results/verdicts.yaml; change it there. -->

Benchmarks ran on CPUs with tiny models unless a row names an H200 or a model. Learning results show that a
method works, not how much a large model gains.

## Ten figures that matter

| claim | ours | peer | verdict | script |
|---|---|---|---|---|
"""
VERDICTS = {
    "holds": "the goal is met",
    "in part": "the goal is met in part, or with the exception in the row",
    "too few seeds": "one seed or one run: a hint",
    "fails": "the goal is missed or the opposite is true",
    "old": "a newer result replaces this one",
    "never run on a GPU": "rehearsed on a CPU with stand-ins; the claim about GPUs is open",
}
AREAS = """
## All results by area

The link "output" opens the printed file. For a script with a commit in front, type
`git show COMMIT:benchmarks/SCRIPT`.

| verdict | meaning | rows |
|---|---|---|
"""


def load_verdicts() -> dict[str, dict[str, dict[str, Any]]]:
    """Return area -> result file stem -> entry in verdicts.yaml."""
    return dict(yaml.safe_load((RESULTS / "verdicts.yaml").read_text(encoding="utf-8")))


def link_script(name: str, entry: dict[str, Any]) -> str:
    """Return a link to the benchmark script, or a removed script's commit and name."""
    script = f"{entry.get('script', name)}.py"
    commit = entry.get("script_commit")
    return f"`{commit}:{script}`" if commit else f"[{script}](../benchmarks/{script})"


def format_figure(name: str, entry: dict[str, Any]) -> str:
    """Format a row for an entry with `figure`."""
    figure = entry["figure"]
    verdict = f"[{entry['verdict']}](../benchmarks/results/{name}.txt)"
    return (f"| {figure['claim']} | {figure['ours']} | {figure['peer']} | {verdict} "
            f"| {link_script(name, entry)} |\n")


def format_result(name: str, entry: dict[str, Any]) -> str:
    """Format a row in an area's table."""
    return (f"| {entry['claim']} | {entry['verdict']} | {entry['date']} | [{entry['page']}]({entry['page']}) "
            f"| [output](../benchmarks/results/{name}.txt), {link_script(name, entry)} |\n")


def build_page() -> str:
    areas = load_verdicts()
    entries = {name: entry for area in areas.values() for name, entry in area.items()}
    verdicts = [entry["verdict"] for entry in entries.values()]
    text = HEAD + "".join(format_figure(name, entry) for name, entry in entries.items() if "figure" in entry)
    text += AREAS + "".join(f"| {verdict} | {meaning} | {verdicts.count(verdict)} |\n"
                            for verdict, meaning in VERDICTS.items())
    for area, area_entries in areas.items():
        text += f"\n### {area}\n\n| result | verdict | date | page | files |\n|---|---|---|---|---|\n"
        text += "".join(format_result(name, entry) for name, entry in area_entries.items())
    return text


if __name__ == "__main__":
    write_atomically(PAGE, build_page())
