"""A table of runs with what is predicted for each: throughput, model FLOPs, memory, or why not.

Sizes of published models are found by name, for rows that leave cells empty (models.yaml).
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import itertools
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.plan.footprint.memory import peak_bytes
from megatron_sov.plan.speed.parameters import Parameters, default
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import ModelShape, Workload
from megatron_sov.plan.tables import cells
from megatron_sov.plan.tables.cells import PREDICTED, MissingInput, count, number, read_table, words
from megatron_sov.work.clusters.chips import Chip, Links, default_links
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR


@dataclass(frozen=True)
class Published:
    names: tuple[str, ...]
    shape: ModelShape
    seq_len: int
    """Tokens of a row in its pretraining."""
    source: str
    paper: dict[str, Any] = field(default_factory=dict)
    """Cells of the run that made its name known, for rows that name no layout."""
    sinks: bool = False
    """Whether its attention has sinks, which the newest kernels learnt late."""
    approximate: bool = False
    """Whether its layers have parts that the arithmetic does not know."""


@cache
def published() -> tuple[Published, ...]:
    text = importlib.resources.files("megatron_sov.plan.tables").joinpath("models.yaml").read_text("utf-8")
    rows: list[dict[str, Any]] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(Published(tuple(row.pop("names")), ModelShape(**row.pop("shape")), **row) for row in rows)


def folded(name: str) -> str:
    """Return a name without what people write in many ways: case, and all but letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find(name: str) -> Published | None:
    """Return the model whose name is the longest that stands in a row's; None: nobody knows it."""
    sought = folded(name)
    found = [(len(folded(alias)), model) for model in published() for alias in model.names
             if folded(alias) in sought]
    return max(found, key=lambda pair: pair[0])[1] if found else None


# The sizes of a row's model: what the row states, what is published under its name, and what follows.


STATED = {"layers": "num_layers", "hidden": "hidden_size", "heads": "num_heads", "kv_heads": "num_kv_heads",
          "vocab": "vocab_size", "experts": "num_experts", "topk": "num_experts_per_token",
          "moe_ffn": "expert_ffn_dim"}
"""Column -> field of `ModelShape`."""
USUAL_VOCAB = 128_000
CLOSE = 0.02
"""Share by which a guess's parameters may miss those that the row states before another one is tried."""


def shape_of(row: Mapping[str, str]) -> tuple[ModelShape, Published | None]:
    """Return the sizes of a row's model, and what is published under its name.

    Raises:
        MissingInput: neither the row nor its name tells enough.
    """
    known = find(row.get("model", ""))
    shape = _stated(known.shape, row) if known else _guessed(row)
    text = row.get("model", "").lower() + " " + row.get("note", "").lower()
    if "w/o mtp" in text or "without mtp" in text:
        shape = replace(shape, num_mtp_layers=0)
    problem = _problem(shape)
    if problem:
        raise MissingInput(problem)
    return shape, known


def _stated(shape: ModelShape, row: Mapping[str, str]) -> ModelShape:
    """Return a published shape with what the row states in its place."""
    cells: dict[str, Any] = {field: count(row, column)
                             for column, field in STATED.items() if count(row, column)}
    if number(row, "shared_experts"):
        cells["num_shared_experts"] = number(row, "shared_experts")
    if count(row, "ffn"):
        # tables of models without dense layers give their experts' width as ffn
        name = "dense_ffn_dim" if shape.dense_ffn_dim or not shape.num_experts else "expert_ffn_dim"
        cells.setdefault(name, count(row, "ffn"))
    if shape.num_kv_heads == shape.num_heads and "num_heads" in cells:
        cells.setdefault("num_kv_heads", cells["num_heads"])
    return replace(shape, **cells)


def _guessed(row: Mapping[str, str]) -> ModelShape:
    """Return a shape from a row's cells alone; what they leave open is what fits its parameters best."""
    layers, hidden = count(row, "layers"), count(row, "hidden")
    params, active = number(row, "params_b") * 1e9, number(row, "active_params_b") * 1e9
    experts = count(row, "experts")
    if not (layers and hidden):
        if not params or experts or (active and active < 0.9 * params):
            raise MissingInput("layers and hidden are empty, and no model of this name is known")
        return _of_size(params)
    heads = count(row, "heads") or max(1, hidden // 128)
    # hidden / heads first, a gate first: a later guess has to fit better than that
    widths = dict.fromkeys([max(1, hidden // heads), 128, 64, 192, 256])
    gates = (True, False)
    kv_heads = [count(row, "kv_heads")] if count(row, "kv_heads") else [heads, *({8} & set(_divisors(heads)))]
    ffns = [count(row, "ffn")] if count(row, "ffn") else [4 * hidden, round(8 * hidden / 3 / 128) * 128]
    best, best_error = None, math.inf
    for gated, ffn, width, kv, tied in itertools.product(gates, ffns, widths, kv_heads, (False, True)):
        shape = ModelShape(
            layers, hidden, heads, width, kv, count(row, "vocab") or USUAL_VOCAB,
            dense_ffn_dim=ffn, gated=gated, tied=tied, num_experts=experts,
            num_experts_per_token=count(row, "topk") or (2 if experts else 0),
            expert_ffn_dim=(count(row, "moe_ffn") or ffn) if experts else 0,
            num_shared_experts=number(row, "shared_experts"))
        error = abs(math.log(shape.params() / params)) if params else 0.0
        error += abs(math.log(shape.active_params() / active)) if active else 0.0
        if error < best_error - CLOSE:
            best, best_error = shape, error
    assert best is not None
    return best


def _of_size(params: float) -> ModelShape:
    """Return a dense model of so many parameters with usual proportions: a layer for each 128 of its width up
    to 80, SwiGLU of 3.5 widths, up to 8 key/value heads."""
    def shape(hidden: int) -> ModelShape:
        return ModelShape(min(80, max(8, hidden // 128)), hidden, hidden // 128, 128,
                          math.gcd(8, hidden // 128), USUAL_VOCAB, dense_ffn_dim=hidden * 7 // 2)
    return min((shape(hidden) for hidden in range(512, 32_769, 128)),
               key=lambda s: abs(math.log(s.params() / params)))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _problem(s: ModelShape) -> str:
    """Return what is impossible about a shape; empty: nothing."""
    if s.num_experts and not s.num_experts_per_token:
        return "topk is empty, and no model of this name is known"
    if s.num_experts and not s.expert_ffn_dim:
        return "moe_ffn is empty, and no model of this name is known"
    if s.num_experts_per_token > max(1, s.num_experts):
        return f"topk = {s.num_experts_per_token} is more than experts = {s.num_experts}"
    if s.num_kv_heads > s.num_heads or s.num_heads % s.num_kv_heads:
        return f"kv_heads = {s.num_kv_heads} does not divide heads = {s.num_heads}"
    if s.num_attention_layers < 0 or s.num_moe_layers < 0:
        return f"layers = {s.num_layers} is fewer than this model has of one kind"
    return ""


# A row of a table as a workload: what its cells state, and what follows where they are empty.


MICRO_BATCH_TOKENS = 8192
"""Tokens of a micro-batch where nobody says: as many rows as make about so many, in pipelines half of it."""
FILLED_PIPELINE = 8
"""Micro-batches for each stage where nobody gives the batch: the bubble then is small."""
NODE_GPUS = 8
MEGATRON = re.compile(r"megatron|\bnemo\b|mcore|megascale|performance-summary|transformer.engine")
"""How rows say that Megatron ran."""
FUSED = re.compile(r"compile|\bte\b|liger|fused")
"""How rows of other programs say that kernels are fused."""
TUNED_RECIPE = re.compile(r"perf recipe|cuda-graph mode omitted|weak scaling point")
"""How rows say that a maker's newest tuned recipe ran: whole steps as graphs in a rack's domain, parts of
them elsewhere and for hybrids, and experts' messages beside computation."""
RUN_LAYERS = 2.6
RELEASE = re.compile(r"(?:nemo|container|nemo-docs|release)[ :-]*(2\d)\.(0[1-9]|1[0-2])\b")
"""How rows name the release of NeMo's containers: year and month."""
NEWEST_RELEASE = 26 + 8 / 12
PACKED_DOCUMENT_TOKENS = 512
"""Tokens of a document in packed rows of supervised fine-tuning."""


@dataclass(frozen=True)
class _Layout:
    num_gpus: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int

    @property
    def dp(self) -> int:
        return max(1, self.num_gpus // (self.tp * self.pp * self.cp))


def workload_of(row: Mapping[str, str], parameters: Parameters | None = None) -> Workload:
    """Return the workload of a row.

    Raises:
        MissingInput: an input is missing that nothing else tells, or the row contradicts itself.
        UserError: the chip has no products in the row's precision.
    """
    p = parameters or default()
    # The shape first: rules on the layout need heads, layers and experts.
    shape, known = shape_of(row)
    row = _as_in_its_paper(row, known)
    notes = words(row, "other", "note", "model")
    if cells.MULTIMODAL.search(notes):
        raise MissingInput("a multimodal run, whose encoders and frozen parts the row does not describe")
    chip = cells.chip_of(row.get("gpu", ""))
    links = _links(chip, notes)
    precision = cells.precision_of(row.get("precision", ""), notes, bool(chip.fp8_flops_per_s))
    chip.flops_per_s({"bf16": "bf16", "nvfp4": "fp4"}.get(precision, "fp8"))
    layout = _layout(row, shape, notes)
    seq_len = count(row, "seq_len") or _said_length(notes) or (known.seq_len if known else 4096)
    micro, batch = _batches(row, layout, seq_len, notes)
    if all(count(row, name) for name in ("tp", "pp", "cp", "num_gpus")) and batch < micro * layout.dp:
        raise MissingInput(f"global_batch = {batch} is fewer than micro_batch {micro} x {layout.dp} "
                           "data-parallel replicas (num_gpus / tp / pp / cp)")
    sharding = cells.sharding_of(row.get("dp_sharding", ""), layout.dp > 1)
    recompute, modules = cells.recompute_of(row.get("recompute", ""))
    if recompute == "selective" and modules == ("core_attn",) and sharding == "fsdp":
        modules = ("layer",)  # sharded programs choose layers, not modules
    lora = "lora" in notes
    tuning = lora or bool(re.search(r"\bsft\b|finetun", notes))
    w = Workload(
        shape, chip, links, layout.num_gpus, seq_len, micro, batch,
        document_tokens=PACKED_DOCUMENT_TOKENS if tuning else 0, tp=layout.tp, sp=layout.tp > 1,
        pp=layout.pp, vpp=count(row, "vpp") or _usual_vpp(shape, layout, sharding, notes), cp=layout.cp,
        ep=layout.ep, etp=layout.etp, sharding=sharding,
        sharding_group=_sharding_group(row, layout, links, notes), precision=precision, recompute=recompute,
        recompute_modules=modules, grad_bytes=2, optimizer="muon" if "muon" in notes else "adam",
        offload=1.0 if "optimizer offload" in notes else 0.0, objective="lora" if lora else "train")
    w = _with_kernels(w, row, known, notes, p)
    if (row.get("recompute", "").strip() or _is_megatron(row)
            or peak_bytes(w) < chip.memory_bytes):
        return w
    return replace(w, recompute="full")


def _as_in_its_paper(row: Mapping[str, str], known: Published | None) -> Mapping[str, str]:
    """Return a row that names no layout with that of the run that made its model known."""
    if known is None or any(row.get(column) for column in ("tp", "pp", "ep", "num_gpus")):
        return row
    return {**row, **{column: str(value) for column, value in known.paper.items() if not row.get(column)},
            "other": f"{row.get('other', '')};{known.paper.get('other', '')}"}


def _with_kernels(w: Workload, row: Mapping[str, str], known: Published | None, notes: str,
                  p: Parameters) -> Workload:
    """Return a workload with what a row's words say of programs, kernels and routers."""
    megatron, wide = _is_megatron(row), w.links.domain > NODE_GPUS
    tuned, dropless = not cells.UNTUNED.search(notes), not re.search(r"token.?drop", notes)
    recipe = tuned and bool(TUNED_RECIPE.search(notes))
    newest = recipe and not w.shape.num_mamba_layers
    graphs = cells.cuda_graphs_of(notes)
    if recipe and "graph" not in words(row, "other"):
        graphs = "full" if newest and wide else "partial"
    router = words(row, "router")
    real = "real" in router or not (tuned or "forced" in router)
    return replace(
        w, tuned=tuned, dropless=dropless, cuda_graphs=graphs,
        fused_experts=(newest and wide) or "grouped_mlp" in notes,
        fused_kernels=megatron or bool(FUSED.search(notes)),
        attention_kernel=_attention_kernel(megatron, known, notes), software_age_years=_age_years(row),
        dispatcher=cells.dispatcher_of(notes, w.ep * w.etp > w.links.domain, wide, dropless),
        overlap_tp=bool(re.search(r"async.?tp|tp-comm-overlap", notes) or (megatron and tuned)),
        overlap_ep=newest or bool(re.search(r"a2a_overlap|ep overlap on", notes)),
        imbalance=p.real_imbalance if real and w.shape.num_experts else 1.0)


def _is_megatron(row: Mapping[str, str]) -> bool:
    said = words(row, "source", "source_ref", "other", "note", "dp_sharding")
    return bool(MEGATRON.search(said)) and "automodel" not in words(row, "source")


def _usual_vpp(shape: ModelShape, layout: _Layout, sharding: str, notes: str) -> int:
    """Return runs of layers of a stage where nobody says: Megatron's recipes interleave runs of about three
    layers, other programs do not."""
    if "interleaved" in notes:
        return 2
    if layout.pp == 1 or sharding == "fsdp" or cells.UNTUNED.search(notes):
        return 1
    layers = -(-shape.num_layers // layout.pp)
    return min((d for d in range(1, layers + 1) if layers % d == 0),
               key=lambda d: abs(math.log(layers / d / RUN_LAYERS)))


def _attention_kernel(megatron: bool, known: Published | None, notes: str) -> Literal["newest", "portable"]:
    """Return what computes attention: Transformer Engine's choice in Megatron's programs."""
    if known is not None and known.sinks:
        return "portable"
    newest = megatron or re.search(r"fa3|flash.?attention.?3|cudnn|\bte\b", notes)
    return "newest" if newest else "portable"


def _age_years(row: Mapping[str, str]) -> float:
    """Return how much older a row's release is than the newest that was fitted; 0: unsaid."""
    found = RELEASE.search(words(row, "source_ref", "source", "note"))
    return max(0.0, NEWEST_RELEASE - int(found[1]) - int(found[2]) / 12) if found else 0.0


def _links(chip: Chip, notes: str) -> Links:
    links = default_links(chip)
    network = cells.network_bytes_per_s(notes)
    return replace(links, between_bytes_per_s=network) if network else links


def _layout(row: Mapping[str, str], shape: ModelShape, notes: str) -> _Layout:
    """Return the sizes of groups.

    Raises:
        MissingInput: they do not fit into the number of GPUs.
    """
    tp, pp, cp = (count(row, name) for name in ("tp", "pp", "cp"))
    both = re.search(r"model_parallel_size\(tp\*pp\)=(\d{1,9})(?!\d)", notes)
    if both and not (tp or pp):
        tp = math.gcd(int(both[1]), NODE_GPUS)
        pp = int(both[1]) // tp
    tp, pp, cp, etp = tp or 1, pp or 1, cp or 1, count(row, "etp") or 1
    replica = tp * pp * cp
    num_gpus = count(row, "num_gpus")
    dp = cells.stated(notes, "dp")
    ep = count(row, "ep") or cells.stated(notes, "ep_size")
    if not num_gpus:
        num_gpus = replica * dp if dp else math.lcm(replica * NODE_GPUS, (ep or 1) * etp * pp)
    if not ep:
        ep = math.gcd(NODE_GPUS, math.gcd(num_gpus // pp, shape.num_experts)) if shape.num_experts else 1
    rules = [
        (replica <= num_gpus, f"tp {tp} x pp {pp} x cp {cp} = {replica} is more than num_gpus = {num_gpus}"),
        (tp <= min(shape.num_heads, shape.dense_ffn_dim or shape.num_heads),
         f"tp = {tp} is more than heads = {shape.num_heads} or ffn = {shape.dense_ffn_dim}"),
        (pp * (count(row, "vpp") or 1) <= shape.num_layers + shape.num_mtp_layers + 2,
         f"pp {pp} x vpp {count(row, 'vpp') or 1} is more than layers = {shape.num_layers}"),
        (not shape.num_experts or etp <= shape.expert_ffn_dim,
         f"etp = {etp} is more than moe_ffn = {shape.expert_ffn_dim}"),
        (num_gpus % replica == 0,
         f"tp {tp} x pp {pp} x cp {cp} = {replica} does not divide num_gpus = {num_gpus}"),
        (not shape.num_experts or etp * pp <= num_gpus,
         f"etp {etp} x pp {pp} = {etp * pp} is more than num_gpus = {num_gpus}")]
    for holds, problem in rules:
        if not holds:
            raise MissingInput(problem)
    if shape.num_experts and shape.num_experts % ep:
        raise MissingInput(f"ep = {ep} does not divide experts = {shape.num_experts}")
    ep = min(ep, max(1, num_gpus // (etp * pp)))  # some tables give more than there is room for
    return _Layout(num_gpus, tp, pp, cp, ep if shape.num_experts else 1, etp)


def _batches(row: Mapping[str, str], layout: _Layout, seq_len: int, notes: str) -> tuple[int, int]:
    micro, batch = count(row, "micro_batch"), count(row, "global_batch")
    accumulated = cells.stated(notes, "ga") or cells.stated(notes, "grad_accum")
    local = cells.stated(notes, "local_batch")
    if not batch and local:
        batch = local * layout.dp
    if not micro:
        if batch and accumulated:
            micro = max(1, batch // (layout.dp * accumulated))
        else:
            tokens = MICRO_BATCH_TOKENS * layout.cp // (2 if layout.pp > 1 else 1)
            micro = max(1, tokens // seq_len)
            if batch:
                share = max(1, batch // layout.dp)
                wanted = min(micro, max(1, share // layout.pp))
                micro = max(d for d in range(1, wanted + 1) if share % d == 0)
    if not batch:
        sharded = "fsdp" in words(row, "dp_sharding")
        filled = accumulated or (1 if sharded else FILLED_PIPELINE * layout.pp)
        batch = micro * layout.dp * filled
    return micro, batch


def _said_length(notes: str) -> int:
    """Return the tokens of a row that a note gives in passing; 0: none."""
    found = re.search(r"seq_?len[^;]*?(?:implies|=)\s*(\d{3,7})", notes)
    return int(found[1]) if found else 0


def _sharding_group(row: Mapping[str, str], layout: _Layout, links: Links, notes: str) -> int:
    """Return how many processes share weights where copies of them exist (HSDP); 0: all."""
    group = cells.stated(notes, "fsdp_group") or cells.stated(notes, "fsdp")
    if not group and "hsdp" in words(row, "dp_sharding"):
        group = links.domain if links.domain <= NODE_GPUS else 64
    return group if 1 < group < layout.dp * layout.cp else 0


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
    refuse_input("--output", out, rows)
    check_output("--output", out)
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
