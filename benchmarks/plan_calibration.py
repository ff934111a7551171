"""Fit the speed model to published runs, and predict runs of sources that were left out of the fit.

    python benchmarks/plan_calibration.py                  fit all, leave each source out in turn, print
    python benchmarks/plan_calibration.py --write          and put the parameters into the package
    python benchmarks/plan_calibration.py --no-refit       errors of the package's parameters alone

Runs are those of benchmarks/data/published_runs.jsonl, one a line: its source, its measured speed, and its
workload; fields with their default are left out.  docs/plan_speed.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plan_fit import PRIORS, Sample, error, fit

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.plan.speed.parameters import Parameters, load_default_parameters
from megatron_sov.plan.speed.workload import ModelShape, Workload
from megatron_sov.work.clusters.chips import CHIPS, default_links

ROOT = Path(__file__).parent
RUNS = ROOT / "data" / "published_runs.jsonl"
PACKAGED = ROOT.parent / "megatron_sov" / "plan" / "speed" / "parameters.json"
SOURCE_POWER = 0.25
"""A source of n rows counts as n to the power 1 - this: many rows of one source repeat one another."""
EXPLAINED = {
    149: "support run; sparse attention with an indexer, which is not modelled", 148: "as line 149",
    150: "support run that states no layout; attention with sinks had no fused kernel",
    132: "first dropless container (25.11): half as fast as the next one, and as with dropped tokens",
    287: "a rounded figure: no number of GPUs, batch or recomputation is stated",
    286: "as line 287", 285: "as line 287", 326: "recomputation is that of a later file, not of the run",
    335: "recomputation not stated; Hugging Face layers", 333: "as line 335",
    127: "CUDA graphs not stated, planned without", 96: "CUDA graphs not stated, planned without",
    29: "as line 96", 52: "as line 96", 75: "as line 96", 139: "dropped tokens on B200: one row",
    325: "the source's second figure, in parentheses without a legend",
    263: "sharded weights in a pipeline: gathering for each micro-batch is not known",
    273: "row-wise scales, slow in that version (torchtitan issue 1207)", 274: "as line 273",
    371: "months of a cluster with all that broke, not a benchmark",
    153: "state-space layers on H100 in bf16",
    198: "a single micro-batch at the edge of memory: the allocator retries", 336: "experts alone in MXFP8",
    98: "B300 with micro-batches of one row; of two, nearly twice as fast", 116: "as line 98",
}
"""Line -> what is behind a row that is predicted badly, as far as its source tells."""
GOALS = {"median": 0.10, "90th percentile": 0.25}


@dataclass(frozen=True)
class Row:
    """A published run."""

    number: int
    """Line of the table that the run was first noted in."""
    source: str
    """Where it was published."""
    model: str
    sample: Sample
    """Its workload and throughput."""


def read_rows() -> list[Row]:
    """Return the published runs; rows of a source with many runs weigh less."""
    lines = [json.loads(text) for text in RUNS.read_text(encoding="utf-8").splitlines()]
    counts = collections.Counter(found["source"] for found in lines)
    return [Row(found["line"], found["source"], found["model"],
                Sample(_workload(found["workload"]), found["tokens_per_s_per_gpu"],
                       counts[found["source"]] ** -SOURCE_POWER)) for found in lines]


def _workload(values: dict[str, Any]) -> Workload:
    """Build a workload from its fields in the file."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    on = CHIPS[values.pop("chip")]
    network = values.pop("network_bytes_per_s", 0.0)
    links = replace(default_links(on), between_bytes_per_s=network) if network else default_links(on)
    return Workload(ModelShape(**values.pop("shape")), on, links, **values)


def kind(row: Row) -> str:
    """Return the kind of model that a row trains."""
    shape = row.sample.workload.shape
    return "hybrid" if shape.num_mamba_layers else "MoE" if shape.num_experts else "dense"


def precision(row: Row) -> str:
    """Return the width of a row's products."""
    return {"bf16": "bf16", "nvfp4": "FP4"}.get(row.sample.workload.precision, "FP8")


def line(name: str, errors: Iterable[float]) -> str:
    """Return median, 90th percentile and worst of errors (shares, signed)."""
    sizes = sorted(abs(e) for e in errors)
    if not sizes:
        return f"  {name:36s}    0 rows"
    ninth = sizes[max(0, math.ceil(0.9 * len(sizes)) - 1)]
    return (f"  {name:36s} {len(sizes):4d} rows   median {statistics.median(sizes):6.1%}   "
            f"90th percentile {ninth:6.1%}   worst {sizes[-1]:7.1%}")


def groups(rows: list[Row], errors: dict[int, float]) -> list[str]:
    """Return lines of errors per chip, kind, precision and source."""
    found = []
    by: dict[str, Callable[[Row], str]] = {
        "chip": lambda row: row.sample.workload.chip.key,
        "kind of model": kind, "precision": precision,
        "tuned or not, by the row's own words":
            lambda row: "tuned" if row.sample.workload.tuned else "untuned",
        "source": lambda row: row.source}
    for title, key in by.items():
        found.append(f"By {title}")
        names = collections.Counter(key(row) for row in rows)
        found += [line(name, [errors[row.number] for row in rows if key(row) == name])
                  for name, _ in names.most_common()]
    return found


def worst(rows: list[Row], errors: dict[int, float], count: int = 12) -> list[str]:
    """Return lines for the rows that are predicted worst."""
    found = []
    for row in sorted(rows, key=lambda row: -abs(math.log1p(errors[row.number])))[:count]:
        w = row.sample.workload
        found.append(f"  {errors[row.number]:+7.1%}  line {row.number:3d}  {row.model[:30]:30s} "
                     f"{w.chip.key:7s} {w.precision:6s} {w.num_gpus:5d} GPUs  tp {w.tp} pp {w.pp} ep {w.ep}  "
                     f"{row.source[:28]}{'' if w.tuned else '  (untuned)'}")
        found.append(f"           {EXPLAINED.get(row.number, 'no cause found')}")
    return found


def deviations(rows: Iterable[Row], p: Parameters) -> dict[int, float]:
    """Return line -> predicted over measured throughput, less 1."""
    return {row.number: math.expm1(error(row.sample, p)) for row in rows}


def left_out(rows: list[Row], fitted: Parameters, rounds: int) -> dict[int, float]:
    """Return the errors of each source's rows with parameters fitted without that source."""
    found: dict[int, float] = {}
    for source in dict.fromkeys(row.source for row in rows):
        others = [row.sample for row in rows if row.source != source]
        p = fit(others, PRIORS, fitted, rounds)
        found |= deviations([row for row in rows if row.source == source], p)
        print(f"  without {source}", file=sys.stderr, flush=True)
    return found


def value(p: Parameters, path: str) -> float:
    """Return a parameter by its path."""
    table: object = vars(p)
    for name in path.split("."):
        assert isinstance(table, dict)
        table = table[name]
    assert isinstance(table, float)
    return table


def main() -> int:
    """Fit, validate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the parameters into the package")
    parser.add_argument("--no-refit", action="store_true", help="errors of the package's parameters alone")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the fit of all rows")
    parser.add_argument("--rounds-left-out", type=int, default=5, help="rounds of each fit without a source")
    args = parser.parse_args()
    rows = read_rows()
    print(f"{len(rows)} published runs of {len({row.source for row in rows})} sources")
    p = load_default_parameters()
    if not args.no_refit:
        start = time.perf_counter()
        p = fit([row.sample for row in rows], PRIORS, p, args.rounds)
        print(f"Fitted in {time.perf_counter() - start:.0f} s")
    inside = deviations(rows, p)
    print("\nAll rows fitted")
    print(line("all", inside.values()))
    errors = inside
    if not args.no_refit:
        errors = left_out(rows, p, args.rounds_left_out)
        print("\nEach source left out of the fit in turn")
        print(line("all", errors.values()))
        tuned = [row for row in rows if row.sample.workload.tuned]
        print(line("without rows that say they are untuned", [errors[row.number] for row in tuned]))
        print(f"  goals: {', '.join(f'{name} {goal:.0%}' for name, goal in GOALS.items())}")
    print("\n".join(groups(rows, errors)))
    print("\nThe rows that are predicted worst")
    print("\n".join(worst(rows, errors)))
    print(f"\nParameters: {len(PRIORS)} fitted")
    for path, prior in PRIORS.items():
        print(f"  {path:34s} expected {prior.value:10.4g}   fitted {value(p, path):10.4g}")
    if args.write and not args.no_refit:
        write(p, len(rows), inside, errors)
    return 0


def write(p: Parameters, count: int, inside: Mapping[int, float], errors: Mapping[int, float]) -> None:
    """Put parameters into the package, with where they come from."""
    median = {name: round(statistics.median(abs(e) for e in found.values()), 4)
              for name, found in (("fitted", inside), ("source_left_out", errors))}
    provenance = {"script": "benchmarks/plan_calibration.py", "data": "benchmarks/data/published_runs.jsonl",
                  "rows": count, "median_error": median}
    write_output(PACKAGED, format_json({"parameters": _rounded(vars(p)), "provenance": provenance}) + "\n")


def _rounded(found: object) -> object:
    if isinstance(found, dict):
        return {name: _rounded(item) for name, item in found.items()}
    return float(f"{found:.5g}") if isinstance(found, float) else found


if __name__ == "__main__":
    raise SystemExit(main())
