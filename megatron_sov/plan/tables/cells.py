"""Reading a table of published runs: its columns, and what its cells may hold."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.plan.speed.workload import Precision
from megatron_sov.work.clusters.chips import CHIPS, Chip, chip

TEXTS = ("source", "source_ref", "model", "gpu", "dp_sharding", "precision", "recompute", "other", "router",
         "note")
"""Columns that hold words."""
COUNTS = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "experts", "topk", "moe_ffn",
          "num_gpus", "seq_len", "micro_batch", "global_batch", "tp", "pp", "vpp", "cp", "ep", "etp")
"""Columns that hold whole numbers above 0."""
NUMBERS = ("params_b", "active_params_b", "shared_experts", "tokens_per_s_per_gpu", "tflops_per_gpu_model",
           "mfu", "step_time_s", "peak_mem_gb")
"""Columns that hold numbers."""
PREDICTED = ("pred_tokens_per_s_per_gpu", "pred_tflops_per_gpu", "pred_peak_mem_gb", "pred_reason")
"""Columns that a prediction appends, and writes anew where a table has them."""
KNOWN = (*TEXTS, *COUNTS, *NUMBERS, *PREDICTED)
MAX_BYTES = 64 << 20
MAX_COUNT = 10**9
LEAST_NUMBER = 1e-9
"""Above 0; a smaller one is a slip, and what is divided by it no number."""
MOST = {"layers": 10_000, "heads": 100_000, "kv_heads": 100_000, "experts": 10_000, "tp": 100_000,
        "pp": 10_000, "vpp": 10_000, "cp": 100_000, "ep": 10_000, "etp": 100_000, "num_gpus": 10_000_000,
        "hidden": 10_000_000}
"""Columns with a lower limit than `MAX_COUNT`: what is counted one by one."""
MAX_CELL = 4096
"""Characters of a cell: words are searched for what they tell, and that takes the square of their length."""
EMPTY = {"", "-", "n/a", "na", "none", "null", "?"}
"""What stands for a cell that nobody filled in, in columns of numbers."""


class MissingInput(Exception):
    """A row lacks what nothing else tells; says what."""


@dataclass(frozen=True)
class CellTable:
    columns: list[str]
    """Their names, in the file's order."""
    rows: list[dict[str, str]]
    """Column -> cell."""


def read_table(file: Path) -> CellTable:
    """Read a table in CSV: columns of `KNOWN`, in any order, any of them missing.

    Raises:
        UserError: it cannot be read, has a column that nobody knows, two of a name, a row with more cells
            than columns, or a number that is none.
    """
    name = f"--table {file}"
    if not file.is_file():
        raise UserError(f"{name}: does not exist; pass a CSV file with columns such as model, gpu, seq_len")
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{name}: has {file.stat().st_size:,} bytes and may have {MAX_BYTES:,}; split it")
    try:
        text = file.read_text(encoding="utf-8-sig")
        records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); see to its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is no text in UTF-8 (byte {error.start}); pass a CSV file") from None
    except csv.Error as error:
        raise UserError(f"{name}: is no CSV ({error}); mend it") from None
    if not records or not any(cell.strip() for cell in records[0]):
        raise UserError(f"{name}: is empty; its first line has to name the columns")
    columns = [cell.strip() for cell in records[0]]
    _check_columns(name, columns)
    rows = []
    for number, cells in enumerate(records[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(columns):
            raise UserError(f"{name}: row {number} has {len(cells)} cells and the table {len(columns)} "
                            "columns; put quotes around cells with commas")
        row = dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))
        _check_lengths(name, number, row)
        _check_numbers(name, number, row)
        rows.append(row)
    if not rows:
        raise UserError(f"{name}: names columns and has no row; add one for each run to predict")
    return CellTable(columns, rows)


def number(row: Mapping[str, str], column: str) -> float:
    """Return a cell's number; 0 where it is empty."""
    text = row.get(column, "").strip()
    return 0.0 if text.lower() in EMPTY else float(text.replace(",", ""))


def count(row: Mapping[str, str], column: str) -> int:
    """Return a cell's whole number; 0 where it is empty."""
    return round(number(row, column))


def words(row: Mapping[str, str], *columns: str) -> str:
    return " ; ".join(row.get(column, "").strip().lower() for column in columns)


def _check_columns(name: str, columns: list[str]) -> None:
    unknown = [column for column in columns if column not in KNOWN]
    if unknown:
        what = "column" if len(unknown) == 1 else "columns"
        listed = ", ".join(repr(column) for column in unknown)
        raise UserError(f"{name}: unknown {what} {listed}{nearest(unknown[0], KNOWN)} (known: "
                        f"{', '.join(KNOWN[:-len(PREDICTED)])})")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise UserError(f"{name}: has column {twice[0]!r} twice; leave one out")


def _check_lengths(name: str, line: int, row: Mapping[str, str]) -> None:
    for column, text in row.items():
        if len(text) > MAX_CELL:
            raise UserError(f"{name}: row {line}, column {column}: has {len(text):,} characters and may have "
                            f"{MAX_CELL:,}; shorten it, or close the quotes of the cell before")


def _check_numbers(name: str, line: int, row: Mapping[str, str]) -> None:
    for column in (*COUNTS, *NUMBERS):
        text = row.get(column, "").strip()
        if text.lower() in EMPTY:
            continue
        try:
            value = float(text.replace(",", ""))
        except ValueError:
            value = math.nan
        whole, most = column in COUNTS, MOST.get(column, MAX_COUNT)
        if not (value == 0 or LEAST_NUMBER <= value <= most) or (whole and value % 1):
            rule = f"a whole number up to {most:,}" if whole else f"a number from 0 to {most:,}"
            raise UserError(f"{name}: row {line}, column {column}: {text!r:.60} is not {rule}; "
                            "mend it, or leave the cell empty")


# What the words of a table mean: chips, precisions, sharding, recomputation, kernels.


MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj", "layer", "op",
           "mamba")
"""What a table may name as recomputed."""
UNTUNED = re.compile(r"not (a )?tuned|functional support run|smoke run|untuned")
"""How tables say that a run was not to be fast."""
MULTIMODAL = re.compile(r"multimodal|vision|image encoder")


def chip_of(text: str) -> Chip:
    """Return the chip that a cell names: its name or an alias, with words around it or a comment behind.

    Raises:
        MissingInput: the cell is empty, or no chip of this table.
    """
    if not text.strip():
        raise MissingInput("gpu is empty")
    problem = ""
    for candidate in (text, text.split("(")[0]):
        try:
            return chip(candidate)
        except UserError as error:
            problem = problem or str(error)
    plain = re.sub(r"[^a-z0-9]+", " ", text.split("(")[0].lower())
    inside = [key for key in CHIPS
              if re.search(rf"(?<![a-z0-9])(\d+x)?{key.replace('-', ' ')}(?![0-9])", plain)]
    if inside:
        return CHIPS[max(inside, key=len)]
    raise MissingInput(problem)


def precision_of(text: str, notes: str, has_fp8: bool) -> Precision:
    """Return the precision that a cell names.

    Raises:
        MissingInput: nobody knows it.
    """
    name = text.lower().strip()
    if not name and has_fp8 and re.search(r"fp8|float8", notes):
        name = "fp8"
    if re.search(r"nvfp4|mxfp4|fp4", name):
        return "nvfp4"
    if re.search(r"mx", name):
        return "mxfp8"
    if re.search(r"block|subchannel|-sc\b", name):
        return "fp8_blockwise"
    if re.search(r"fp8|float8|e4m3", name):
        return "fp8"
    if not name or re.search(r"bf16|fp16|bfloat|half|16", name):
        return "bf16"
    raise MissingInput(f"precision {text!r} is not known; write bf16, fp8, mxfp8 or nvfp4")


def sharding_of(text: str, data_parallel: bool) -> Literal["none", "zero1", "fsdp"]:
    """Return what data-parallel processes share; empty: the optimizer's state, as nearly everybody does."""
    name = text.lower()
    if re.search(r"zero-?2|zero-?1|distributed.optimizer", name):
        return "zero1"
    if re.search(r"fsdp|hsdp|zero-?3", name):
        return "fsdp"
    if re.search(r"ddp|none|^no$", name):
        return "none"
    return "zero1" if data_parallel else "none"


def recompute_of(text: str) -> tuple[Literal["none", "selective", "full"], tuple[str, ...]]:
    """Return what the backward pass computes again, and of what modules where it is selective.

    Raises:
        MissingInput: a module that nobody knows.
    """
    name = text.lower().strip()
    if name in ("", "none", "no", "false", "-"):
        return "none", ()
    if name.startswith("full"):
        return "full", ()
    if not name.startswith("selective"):
        raise MissingInput(f"recompute {text!r} is not known; write none, full or selective:MODULE+MODULE")
    listed = [module for module in re.split(r"[:+,; ]+", name.removeprefix("selective")) if module]
    unknown = [module for module in listed if module not in MODULES]
    if unknown:
        raise MissingInput(f"recompute {text!r}: module {unknown[0]!r} is not known (modules: "
                           f"{', '.join(MODULES)})")
    return "selective", tuple(listed) or ("core_attn",)


def dispatcher_of(notes: str, beyond_domain: bool, wide_domain: bool, dropless: bool
                  ) -> Literal["alltoall", "allgather", "deepep", "hybridep"]:
    """Return how tokens reach their experts; unsaid: all-to-all inside a node and where tokens are dropped,
    else HybridEP in a rack's domain and DeepEP where the exchange leaves the domain."""
    for name in ("hybridep", "deepep", "allgather", "alltoall"):
        if name in notes:
            return name
    if not dropless:
        return "alltoall"
    if wide_domain:
        return "hybridep"
    return "deepep" if beyond_domain else "alltoall"


def cuda_graphs_of(notes: str) -> Literal["none", "partial", "full"]:
    """Return how much of a step is launched as one; unsaid: nothing."""
    found = re.search(r"cuda_?graphs?\s*=\s*([^;]*)", notes)
    if found is None:
        return "none"
    if found[1].startswith(("none", "no", "off", "false")):
        return "none"
    return "full" if "full" in found[1] else "partial"


def stated(notes: str, name: str) -> int:
    """Return a whole number that words give as NAME=NUMBER; 0: none."""
    found = re.search(rf"(?:^|[\s;,(]){name}\s*=\s*(\d{{1,9}})(?!\d)", notes)
    return int(found[1]) if found else 0


def network_bytes_per_s(notes: str) -> float:
    """Return the network of one GPU in bytes/s, where words give that of a node in Gbps; 0: unsaid."""
    found = (re.search(r"network\s*=\s*(\d{1,9})\s*gbps", notes)
             or re.search(r"(\d{1,9})\s*gbps node-node", notes))
    return float(found[1]) * 1e9 / 8 / 8 if found else 0.0
