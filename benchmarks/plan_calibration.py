"""Fit the speed model to published runs, and predict runs of sources that were left out of the fit.

    python benchmarks/plan_calibration.py                  fit all runs, leave each source out in turn, print
    python benchmarks/plan_calibration.py --write          also write the parameters into the package
    python benchmarks/plan_calibration.py --no-refit       only print errors of the package's parameters

Each line of benchmarks/data/published_runs.jsonl is a published run: source, measured speed, and workload
without fields at their default. docs/plan.md explains the output.
"""

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

from plan_fit import PRIORS, Sample, error, fit, get_parameter

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.plan.speed.parameters import Parameters, load_default_parameters
from megatron_sov.plan.speed.workload import ModelShape, Workload
from megatron_sov.work.clusters.chips import CHIPS, default_links

ROOT = Path(__file__).parent
RUNS = ROOT / "data" / "published_runs.jsonl"
PACKAGED = ROOT.parent / "megatron_sov" / "plan" / "speed" / "parameters.json"
SOURCE_POWER = 0.25
"""A source with n rows has a total weight of n ** (1 - SOURCE_POWER), because its rows repeat one another."""
KNOWN_CAUSES = {
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
    98: "B300 with micro-batches of one row; with two rows nearly twice as fast", 116: "as line 98",
}
"""`Row.number` -> why its prediction is bad, as far as the source of the run states it."""
GOALS = {"median": 0.10, "90th percentile": 0.25}
"""Statistic -> the largest relative error that is aimed at."""


@dataclass(frozen=True)
class Row:
    """A published run."""

    number: int
    """Line of the table in which the run was first recorded."""
    source: str
    model: str
    sample: Sample
    """Workload and measured throughput."""


def read_rows() -> list[Row]:
    """Return the published runs; rows of a source with many runs weigh less."""
    lines = [json.loads(text) for text in RUNS.read_text(encoding="utf-8").splitlines()]
    counts = collections.Counter(run["source"] for run in lines)
    rows = []
    for run in lines:
        weight = counts[run["source"]] ** -SOURCE_POWER
        sample = Sample(build_workload(run["workload"]), run["tokens_per_s_per_gpu"], weight)
        rows.append(Row(run["line"], run["source"], run["model"], sample))
    return rows


def build_workload(values: dict[str, Any]) -> Workload:
    """Build a workload from its fields in the file."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    chip = CHIPS[values.pop("chip")]
    links = default_links(chip)
    if network := values.pop("network_bytes_per_s", 0.0):
        links = replace(links, between_bytes_per_s=network)
    return Workload(ModelShape(**values.pop("shape")), chip, links, **values)


def get_model_kind(row: Row) -> str:
    shape = row.sample.workload.shape
    if shape.num_mamba_layers:
        return "hybrid"
    return "MoE" if shape.num_experts else "dense"


def get_precision(row: Row) -> str:
    """Return the number format of a row's matrix products."""
    return {"bf16": "bf16", "nvfp4": "FP4"}.get(row.sample.workload.precision, "FP8")


def format_errors(name: str, errors: Iterable[float]) -> str:
    """Return a line with median, 90th percentile and maximum of the errors' absolute values."""
    sizes = sorted(abs(e) for e in errors)
    if not sizes:
        return f"  {name:36s}    0 rows"
    percentile_90 = sizes[max(0, math.ceil(0.9 * len(sizes)) - 1)]
    return (f"  {name:36s} {len(sizes):4d} rows   median {statistics.median(sizes):6.1%}   "
            f"90th percentile {percentile_90:6.1%}   worst {sizes[-1]:7.1%}")


def group_errors(rows: list[Row], errors: dict[int, float]) -> list[str]:
    """Return a table's lines: errors grouped by chip, kind of model, precision, tuning and source."""
    lines = []
    groupings: dict[str, Callable[[Row], str]] = {
        "chip": lambda row: row.sample.workload.chip.key,
        "kind of model": get_model_kind, "precision": get_precision,
        "tuning, as the source states it":
            lambda row: "tuned" if row.sample.workload.tuned else "untuned",
        "source": lambda row: row.source}
    for title, key in groupings.items():
        lines.append(f"By {title}")
        names = collections.Counter(key(row) for row in rows)
        lines += [format_errors(name, [errors[row.number] for row in rows if key(row) == name])
                  for name, _ in names.most_common()]
    return lines


def list_worst_rows(rows: list[Row], errors: dict[int, float], count: int = 12) -> list[str]:
    """Return lines with the `count` worst predictions and their known causes."""
    lines = []
    for row in sorted(rows, key=lambda row: -abs(math.log1p(errors[row.number])))[:count]:
        w = row.sample.workload
        lines.append(f"  {errors[row.number]:+7.1%}  line {row.number:3d}  {row.model[:30]:30s} "
                     f"{w.chip.key:7s} {w.precision:6s} {w.num_gpus:5d} GPUs  tp {w.tp} pp {w.pp} ep {w.ep}  "
                     f"{row.source[:28]}{'' if w.tuned else '  (untuned)'}")
        lines.append(f"           {KNOWN_CAUSES.get(row.number, 'no cause found')}")
    return lines


def compute_errors(rows: Iterable[Row], p: Parameters) -> dict[int, float]:
    """Return `Row.number` -> predicted over measured throughput, minus 1 (`error` gives the logarithm)."""
    return {row.number: math.expm1(error(row.sample, p)) for row in rows}


def cross_validate(rows: list[Row], fitted: Parameters, rounds: int) -> dict[int, float]:
    """Return the errors of each source's rows with parameters fitted without that source."""
    errors: dict[int, float] = {}
    for source in dict.fromkeys(row.source for row in rows):
        others = [row.sample for row in rows if row.source != source]
        p = fit(others, PRIORS, fitted, rounds)
        errors |= compute_errors([row for row in rows if row.source == source], p)
        print(f"  without {source}", file=sys.stderr, flush=True)
    return errors


def main() -> None:
    """Fit the parameters, cross-validate them, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the parameters into the package")
    parser.add_argument("--no-refit", action="store_true", help="only errors of the package's parameters")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the fit to all rows")
    parser.add_argument("--rounds-left-out", type=int, default=5, help="rounds of each fit without a source")
    args = parser.parse_args()
    rows = read_rows()
    print(f"{len(rows)} published runs of {len({row.source for row in rows})} sources")
    p = load_default_parameters()
    if not args.no_refit:
        start = time.perf_counter()
        p = fit([row.sample for row in rows], PRIORS, p, args.rounds)
        print(f"Fitted in {time.perf_counter() - start:.0f} s")
    inside = compute_errors(rows, p)
    print("\nAll rows fitted")
    print(format_errors("all", inside.values()))
    errors = inside
    if not args.no_refit:
        errors = cross_validate(rows, p, args.rounds_left_out)
        print("\nEach source left out of the fit in turn")
        print(format_errors("all", errors.values()))
        tuned = [row for row in rows if row.sample.workload.tuned]
        print(format_errors("without rows that say they are untuned", [errors[row.number] for row in tuned]))
        print(f"  goals: {', '.join(f'{name} {goal:.0%}' for name, goal in GOALS.items())}")
    print("\n".join(group_errors(rows, errors)))
    print("\nThe rows that are predicted worst")
    print("\n".join(list_worst_rows(rows, errors)))
    print(f"\nParameters: {len(PRIORS)} fitted")
    for path, prior in PRIORS.items():
        print(f"  {path:34s} expected {prior.value:10.4g}   fitted {get_parameter(vars(p), path):10.4g}")
    if args.write and not args.no_refit:
        write_parameters(p, len(rows), inside, errors)


def write_parameters(p: Parameters, count: int, inside: Mapping[int, float],
                     errors: Mapping[int, float]) -> None:
    """Write parameters into the package, with their provenance.

    Args:
        p: parameters fitted to all rows.
        count: number of rows.
        inside: error per row with `p`.
        errors: error per row with parameters fitted without its source.
    """
    medians = {}
    for name, errors_by_row in (("fitted", inside), ("source_left_out", errors)):
        medians[name] = round(statistics.median(abs(e) for e in errors_by_row.values()), 4)
    provenance = {"script": "benchmarks/plan_calibration.py", "data": "benchmarks/data/published_runs.jsonl",
                  "rows": count, "median_error": medians}
    write_output(PACKAGED, format_json({"parameters": _round(vars(p)), "provenance": provenance}) + "\n")


def _round(value: object) -> object:
    if isinstance(value, dict):
        return {name: _round(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
