"""A table of runs with what is predicted for each: throughput, model FLOPs, memory, or why not."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.plan.speed.parameters import Parameters, default
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import Workload
from megatron_sov.plan.tables.cells import PREDICTED, MissingInput, count, number, read_table, words
from megatron_sov.plan.tables.memory import peak_bytes
from megatron_sov.plan.tables.workloads import workload_of
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR


@dataclass(frozen=True)
class RowPrediction:
    tokens_per_s_per_gpu: float = 0.0
    """Throughput; 0: none."""
    tflops_per_gpu: float = 0.0
    peak_mem_gb: float = 0.0
    """Memory of the fullest GPU in units of 10^9 bytes; 0: not weighed."""
    reason: str = ""
    error: float = 0.0
    """Predicted over stated throughput, less 1; 0 where the row states none."""


@dataclass(frozen=True)
class PredictionSummary:
    """How the predictions of a table compare with what it states."""

    num_rows: int
    num_predicted: int
    errors: tuple[float, ...]
    """Predicted over stated throughput, less 1, of rows that state one."""

    def as_text(self) -> str:
        first = f"{self.num_predicted:,} of {self.num_rows:,} rows predicted"
        if not self.errors:
            return f"{first}; none of them states a throughput"
        sizes = sorted(abs(error) for error in self.errors)
        ninth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        return (f"{first}\n{len(sizes):,} of them state a throughput: off by {statistics.median(sizes):.1%} "
                f"(median), {ninth:.1%} (90th percentile), {sizes[-1]:.1%} (worst)")


def predict(row: Mapping[str, str], parameters: Parameters | None = None) -> RowPrediction:
    """Return what is predicted for a row, or why nothing is."""
    p = parameters or default()
    try:
        w = workload_of(row, p)
        time = step_time(w, p)
    except (MissingInput, UserError) as why:
        return RowPrediction(reason=str(why))
    stated = tokens_per_s_per_gpu(row, w)
    found = time.tokens_per_s_per_gpu
    return RowPrediction(found, time.tflops_per_gpu, peak_bytes(w) / 1e9,
                         error=found / stated - 1 if stated else 0.0)


def predict_file(rows: Path, out: Path, parameters: Parameters | None = None) -> PredictionSummary:
    """Predict every row of a table, and write the table with columns of predictions behind its own.

    Raises:
        UserError: the table cannot be read, or `out` cannot be written, or is the table itself.
    """
    refuse_input("--out", out, rows)
    check_output("--out", out)
    table = read_table(rows)
    predictions = [predict(row, parameters) for row in table.rows]
    columns = [column for column in table.columns if column not in PREDICTED]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *PREDICTED])
    for row, found in zip(table.rows, predictions, strict=True):
        numbers = [_cell(found.tokens_per_s_per_gpu), _cell(found.tflops_per_gpu), _cell(found.peak_mem_gb)]
        writer.writerow([*(row[column] for column in columns), *numbers, found.reason])
    write_output(out, text.getvalue())
    return PredictionSummary(len(predictions), sum(not found.reason for found in predictions),
                             tuple(found.error for found in predictions if found.error))


def _cell(value: float) -> str:
    if not value:
        return ""
    return f"{value:.0f}" if value >= 10_000 else f"{value:.5g}"


# The throughput that a row of a table states, directly or by what it follows from.


PERCENT_FROM = 1.5
"""Utilisations above this are percents, below it fractions."""
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
"""How notes write numbers."""


def tokens_per_s_per_gpu(row: Mapping[str, str], w: Workload) -> float:
    """Return a row's tokens/s of a GPU: stated, or from the step's time, the whole cluster's tokens, TFLOP/s
    or utilisation; 0 where it states none of them."""
    if number(row, "tokens_per_s_per_gpu") and "inconsistent" not in words(row, "note"):
        return number(row, "tokens_per_s_per_gpu")
    notes = words(row, "other", "note")
    seconds = number(row, "step_time_s")
    if seconds and count(row, "global_batch") and count(row, "num_gpus"):
        return w.global_batch_size * w.seq_len / w.num_gpus / seconds
    whole = re.search(rf"aggregate_tokens_per_s={NUMBER}k", notes)
    if whole and w.num_gpus:
        return float(whole[1]) * 1e3 / w.num_gpus
    budget = re.search(rf"{NUMBER}m \w+ gpu-hours for {NUMBER}t tokens", notes)
    if budget and float(budget[1]):
        return float(budget[2]) * 1e12 / (float(budget[1]) * 1e6 * SECONDS_OF_AN_HOUR)
    share = {"train": 1.0, "lora": 2 / 3, "forward": 1 / 3}[w.objective]
    flops = share * w.shape.train_flops_per_token(w.seq_len)
    if number(row, "tflops_per_gpu_model"):
        return number(row, "tflops_per_gpu_model") * 1e12 / flops
    if number(row, "mfu"):
        used = number(row, "mfu") / (100 if number(row, "mfu") > PERCENT_FROM else 1)
        peak = re.search(r"peak_tflops=(\d{1,9})(?!\d)", notes)
        return used * (float(peak[1]) * 1e12 if peak else w.chip.bf16_flops_per_s) / flops
    return 0.0
