"""A run in miniature: the same layout, layers of the same kinds and the same settings of the step, with
widths of a few numbers, in float64.

What a layout can get wrong are places: what is cut where, who sends what to whom, what is summed over whom
and by how much it is divided.  None of it depends on how wide a layer is, as long as each process has a part
of it, so that widths are the smallest which the layout divides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.config.model import LAYER_TYPES

HEAD_DIM = 8
"""Of rotary positions half is turned in some families, in pairs."""
VOCABULARY = 89
"""A prime: what is padded until tensor parallelism divides it is padded here too."""
ROW_TOKENS = 32
FEW_RUNS = 4
MOST_ROWS = 128
"""Of a micro-batch of one process: with 64 heads and 128 experts each takes some 15 MB."""
OVERRIDES: dict[str, Any] = {
    "train.precision": "fp64", "train.fp8": "none", "train.fp8_weights": False, "train.fp8_format": "auto",
    "train.fp8_bf16_layers_at_start": 0, "train.fp8_bf16_layers_at_end": 0,
    "train.fp8_pad_routed_tokens": False, "train.tokens": 0,
    "train.epochs": 0, "train.steps": 8, "train.ramp_from_batch_size": 0, "train.hidden_dropout": 0,
    "train.head_chunk_tokens": 24, "data.heldout_tokens": 64, "data.max_epochs": 1e9, "data.skip_steps": [],
    # a key's bias has no gradient, and Adam makes steps of the rounding errors that are left of it
    "optim.eps": 1e-4, "optim.warmup_steps": 0, "optim.rewarm": [], "model.init_std": 0.3,
    "gpu.cuda_graphs": [], "gpu.optimizer_offload": 0,
    "gpu.grad_dtype": "fp32", "gpu.moment_dtype": "fp32", "gpu.attention": "auto", "gpu.exchange_sms": 0,
    "gpu.nccl_user_buffers": "off", "gpu.recompute_modules": [], "gpu.offload_modules": [],
    "parallel.expert_overlap": "none", "parallel.delay_weight_grads": False, "lora.rank": 0,
    "policy.router_replay": False,
    # a thread of each process beside its own would wake all the time, end a proof on a slow machine, or make
    # batches that nobody takes
    "guards.hang_timeout_s": 0, "data.prefetch_steps": 0}
"""What a step in float64 on a host cannot have, or would only make longer; `left_out` tells what of it a run
has."""
FP8 = ("fp8", "fp8_weights", "fp8_format", "fp8_bf16_layers_at_start", "fp8_bf16_layers_at_end",
       "fp8_pad_routed_tokens")
LEFT_OUT = {**{f"train.{name}": "fp8 products" for name in FP8},
        "train.precision": "the run's own precision, and weights in it beside those of the optimizer",
        "train.hidden_dropout": "dropout of hidden states", "train.ramp_from_batch_size": "batches that grow",
        "gpu.grad_dtype": "sums of gradients in bf16", "gpu.moment_dtype": "moments in bf16",
        "gpu.offload_modules": "activations in host memory",
        "gpu.nccl_user_buffers": "buffers that NCCL registers",
        "optim.groups": "rules of optim.groups for layers that are not played",
        "parallel.expert_overlap": "overlap of the experts' messages",
        "parallel.delay_weight_grads": "overlap of the experts' messages",
        "gpu.cuda_graphs": "CUDA graphs", "gpu.optimizer_offload": "offloaded optimizer states",
        "parallel.expert_dispatcher": "the kernels of DeepEP and HybridEP",
        "gpu.attention": "kernels of attention, and what Transformer Engine sends for them",
        "gpu.recompute_modules": "selective recomputation", "lora.rank": "adapters",
        "objective.name": "the run's own loss: that of sft is played",
        "policy.router_replay": "replayed routes", "distillation.top_k": "more than 16 tokens of a teacher",
        "model.vision": "the encoder of pictures", "model.audio": "the encoder of sound",
        "model.image_tokens": "weights of the losses of media's tokens",
        "model.audio_tokens": "weights of the losses of media's tokens"}
"""Setting that is changed -> what that leaves out of the proof."""
BUILT_IN_OBJECTIVES = ("lm", "sft", "preference", "distill", "policy")
"""Objectives that are built in: what they read beside tokens is given (`given`)."""
TEACHER_TOKENS = 16
NO_MEDIA: dict[str, Any] = {
    **{f"model.{part}": None for part in ("vision", "audio", "image_tokens", "audio_tokens")},
    "media.vision_from": "", "media.audio_from": "", "objective.image_weight": 1, "objective.audio_weight": 1}
"""Their placeholders and blocks of ids have no place in a vocabulary of a few words."""


@dataclass(frozen=True)
class Miniature:
    """A run whose step can be played on a host."""

    config: RunConfig
    num_ranks: int
    left_out: tuple[str, ...]
    """What the run itself has, and this one not."""

    @property
    def folder(self) -> Path:
        """Where its documents lie, and what is written for a while."""
        [documents] = self.config.data.paths
        return Path(documents).parent

    def on_one_process(self) -> RunConfig:
        """Return the same run on one process, in as few micro-batches as fit: into how many a step is cut is
        a part of the layout, and what is called for many rows at once costs the least."""
        lone, rows = ParallelConfig(), self.config.train.global_batch_size
        given = {f"parallel.{name}": getattr(lone, name)
                 for name in ("tp", "sp", "pp", "vpp", "ep", "etp", "cp", "pipeline_layout", "zero1",
                              "overlap_grad_reduce", "overlap_param_gather", "bucket_params",
                              "expert_dispatcher")}
        given["train.micro_batch_size"] = next(n for n in range(min(rows, MOST_ROWS), 0, -1) if rows % n == 0)
        given["gpu.pad_buckets"] = "off"  # of ZeRO-1, which one process has not
        return apply_settings(self.config, _format_settings(given))


def build_miniature(config: RunConfig, num_ranks: int, data: Path) -> Miniature:
    """Return a run in miniature.

    Args:
        config: the run.
        num_ranks: its processes.
        data: folder that `given.write_documents` has made, or will make.

    Raises:
        UserError: the run's own settings break a rule, or those of the miniature do.
    """
    config.check(num_ranks)
    m, p = config.model, config.parallel
    runs = _choose_run_lengths(config)
    given = OVERRIDES | NO_MEDIA | {
        "model.vocab_size": VOCABULARY, "model.num_layers": sum(runs), "parallel.pipeline_layout": [
            *runs] if p.pipeline_layout else [],
        "model.expert_ffn_dim": 2 * _common_multiple(p.etp, p.tp) if m.num_experts else 0,
        "data.paths": {str(data): 1.0}, "data.phases": [{"name": "proof", "seq_len": _get_row_tokens(p)}],
        "train.global_batch_size": _choose_batch_size(config, num_ranks),
        "train.micro_batch_size": _choose_micro_batch(config),
        "train.recompute": config.train.recompute if config.train.recompute != "selective" else False,
        **_choose_widths(m, p)}
    if p.expert_dispatcher in ("deepep", "hybridep"):
        given["parallel.expert_dispatcher"] = "alltoall"
    if p.overlap_grad_reduce:  # a layer of the first stage fills two buckets, and one of its experts too
        given["parallel.bucket_params"] = 8 * given["model.hidden_size"]
    if config.objective.name not in BUILT_IN_OBJECTIVES:
        given |= {"objective.name": "sft", "objective.options": {}}
    if config.distillation.top_k > TEACHER_TOKENS:
        given["distillation.top_k"] = TEACHER_TOKENS
    if m.dense_ffn_dim:
        given["model.dense_ffn_dim"] = 4 * p.tp
    windows = _choose_windows(config)
    if m.sliding_window_tokens:
        given["model.sliding_window_tokens"] = windows[m.sliding_window_tokens]
    kinds = _list_layer_kinds(m)
    given["model.attention_pattern"] = "".join(letter for letter, _ in kinds)
    if m.layer_windows:
        given["model.layer_windows"] = [windows[window] for _, window in islice(cycle(kinds), sum(runs))]
    if m.swiglu_limits:  # so tight that numbers of this size meet it
        given["model.swiglu_limits"] = [min(limit, 0.01)
                                            for limit in m.fields_for_depth(sum(runs))["swiglu_limits"]]
    kept = [group for group in config.optim.groups if _matches_some_layer(group.pattern, sum(runs))]
    if len(kept) < len(config.optim.groups):
        given["optim.groups"] = [asdict(group) for group in kept]
    return _check_miniature(config, num_ranks, given)


def _check_miniature(config: RunConfig, num_ranks: int, given: dict[str, Any]) -> Miniature:
    try:
        small = apply_settings(config, _format_settings(given))
        small.check(num_ranks)
        found = Miniature(small, num_ranks, tuple(dict.fromkeys(_list_left_out(config, small))))
        found.on_one_process().check()
    except SettingsError as e:  # which would blame the user's settings
        raise UserError(f"the miniature of this run breaks a rule: {e}; not proved") from e
    return found


def _matches_some_layer(pattern: str, num_layers: int) -> bool:
    """Tell whether a pattern of names of parameters may match one of the trunk's layers, or names none."""
    named = re.search(r"(?<!mtp\.)layers\.([^.]+)", pattern)
    return named is None or any(fnmatchcase(str(i), named[1]) for i in range(num_layers))


def _choose_run_lengths(config: RunConfig) -> list[int]:
    """Return the layers of each run of each stage: two, where there are more, of few runs, and one of many:
    kinds of layers alternate over them too.  Runs of other lengths keep their order, from one layer to three:
    at which layer a stage begins follows from them, and must not be where even ones begin."""
    m, p = config.model, config.parallel
    given = p.pipeline_layout or (m.num_layers // (p.pp * p.vpp),) * (p.pp * p.vpp)
    if len(lengths := sorted({*given})) > 1:
        runs = [1 if count == lengths[0] else 2 if count < lengths[-1] else min(count, 3) for count in given]
        fewer = [1 if count < lengths[-1] else 2 for count in given]
        if len(given) > FEW_RUNS and not _starts_evenly(fewer):
            runs = fewer
    else:
        runs = [min(count, 2 if len(given) <= FEW_RUNS else 1) for count in given]
    # layers without experts come first, and each kind with experts must follow
    needed = len(_list_layer_kinds(m)) + (m.num_dense_layers if m.num_experts else 0)
    missing = max(-(-(needed - sum(runs)) // len(runs)), 0)
    more = min(missing, *(count - run for count, run in zip(given, runs, strict=True)))
    return [run + more for run in runs]


def _starts_evenly(runs: Sequence[int]) -> bool:
    return all(sum(runs[:i]) == sum(runs) // len(runs) * i for i in range(len(runs)))


def _list_layer_kinds(m: ModelConfig) -> list[tuple[str, int]]:
    """Return letters of the pattern with windows in tokens, each once, in the order of the trunk's layers: a
    few layers that follow one another, such as LL of LLLG, would leave a kind out."""
    letters = {kind: letter for letter, kind in LAYER_TYPES.items()}
    return [*dict.fromkeys(zip((letters[kind] for kind in m.layer_types()), m.windows(), strict=True))]


def _choose_windows(config: RunConfig) -> dict[int, int]:
    """Return the run's sliding windows beside those of the miniature, in tokens; 0: none.  Those that end
    within a process' piece of a cut row, so that of other pieces only the ends are sent, do so here too."""
    m, cp = config.model, config.parallel.cp
    own = sorted({*m.windows(), m.sliding_window_tokens} - {0})
    piece, small_piece = (tokens // (2 * cp) for tokens in (
        min(phase.seq_len for phase in config.data.phases), _get_row_tokens(config.parallel)))
    ending_within = [window for window in own if cp > 1 and window - 1 <= piece]
    windows = {0: 0}
    for i, window in enumerate(own):
        windows[window] = (max(small_piece + 1 - len(ending_within) + i, 2) if window in ending_within else
                           8 + 4 * i if cp == 1 else small_piece + 2 + i)
    return windows


def _choose_widths(m: ModelConfig, p: ParallelConfig) -> dict[str, Any]:
    # keys and values stay as many for each head as they are
    kv_heads = _choose_num_kv_heads(m.num_kv_heads, p.tp)
    heads = max(m.num_heads * kv_heads // m.num_kv_heads, kv_heads)
    given: dict[str, Any] = {"model.num_kv_heads": kv_heads, "model.num_heads": heads,
                             "model.head_dim": _choose_head_dim(m), "model.hidden_size": 8 * p.tp}
    if m.latent_attention is not None:
        q_rank = m.latent_attention.q_lora_rank
        given |= {"model.num_heads": 2 * p.tp, "model.num_kv_heads": 2 * p.tp, "model.head_dim": 12,
                  "model.latent_attention": {
                      "kv_lora_rank": 12, **({} if q_rank is None else {"q_lora_rank": 20}),
                      "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}}
    if m.linear_attention is not None:
        given["model.linear_attention"] = {
            "num_key_heads": p.tp * p.cp, "num_value_heads": p.tp * p.cp,
            "key_head_dim": 8, "value_head_dim": 8, "conv_taps": m.linear_attention.conv_taps,
            "gate_rank": 8,
            "negative_eigenvalues": m.linear_attention.negative_eigenvalues}
    if m.num_experts:
        given["model.num_experts"] = _choose_num_experts(m, p)
    if m.yarn is not None:
        given["model.yarn"] = {**json.loads(json.dumps(m.yarn.__dict__)),
                               "original_max_position_tokens": 4 * p.cp * p.tp}
    return given


def _choose_head_dim(m: ModelConfig) -> int:
    """Return the channels of a head, of which the share with positions is a number of pairs."""
    return next((size for size in range(HEAD_DIM, m.head_dim, 2) if m.rope_share == 1
                 or not size * m.rope_share % 2), max(HEAD_DIM, m.head_dim))


def _choose_num_experts(m: ModelConfig, p: ParallelConfig) -> int:
    """Return the experts: two on each process at least, groups of them as they are."""
    count = max(2 * p.ep, 2 * m.num_experts_per_token, 2 * m.num_expert_groups)
    step = _common_multiple(p.ep, m.num_expert_groups)
    return min(m.num_experts, -(-count // step) * step)


def _get_row_tokens(p: ParallelConfig) -> int:
    return -(-ROW_TOKENS // p.row_multiple) * p.row_multiple


def _choose_batch_size(config: RunConfig, num_ranks: int) -> int:
    """Return the rows of a step: more micro-batches than the first stage warms up with, or it would never
    do a forward and a backward pass in turns.  Those are pp - 1 of them, and in an interleaved pipeline,
    whose m micro-batches make m * vpp passes of runs, 2 (pp - 1) + (vpp - 1) pp passes."""
    p, replicas = config.parallel, num_ranks // config.parallel.ranks_per_replica
    return replicas * _choose_micro_batch(config) * (2 * p.pp if p.vpp > 1 else p.pp + 1)


def _choose_micro_batch(config: RunConfig) -> int:
    """Return the rows of a micro-batch: three where there are several, so that what cuts them into two parts,
    or powers of two, cuts documents and not between rows."""
    return 1 if config.train.micro_batch_size == 1 else 3


def _choose_num_kv_heads(count: int, tp: int) -> int:
    """Return the smallest divisor of a number of heads that tensor parallelism divides, two on each process
    where there are so many."""
    fitting = [n for n in range(1, count + 1) if count % n == 0 and n % tp == 0]
    return next((n for n in fitting if n >= 2 * tp), fitting[-1])


def _common_multiple(a: int, b: int) -> int:
    return int(np.lcm(a, b))


def _format_settings(given: dict[str, Any]) -> Sequence[str]:
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in given.items()]


def _list_left_out(config: RunConfig, small: RunConfig) -> Iterator[str]:
    for name, what in LEFT_OUT.items():
        part, _, key = name.partition(".")
        if getattr(getattr(config, part), key) != getattr(getattr(small, part), key) or (
                name == "gpu.attention"):
            yield what
    windows = _choose_windows(config)
    full, played = (_collect_layers(m, known) for m, known in (
        (config.model, windows), (small.model, {window: window for window in windows.values()})))
    if full - played:
        yield f"{len(full - played)} kinds of layers, of which there are more than layers in miniature"
    lengths, cp = {phase.seq_len for phase in config.data.phases}, config.parallel.cp
    phases = config.data.phases
    if len({phase.global_batch_size or config.train.global_batch_size for phase in phases}) > 1:
        yield "phases with other numbers of rows in a step"
    if any(phase.lr or phase.rewarm_steps for phase in phases):
        yield "learning rates of phases"
    if len({phase.seq_len for phase in phases}) > 1:
        yield "phases with rows of other lengths"
    if len({*config.parallel.pipeline_layout}) > (played_lengths := len({*small.parallel.pipeline_layout})):
        yield f"some of many numbers of layers that a stage has, of which {played_lengths} are played"
    if cp > 1 and len(set(windows.values())) < len(windows):
        yield "some of many windows, which are of one size in miniature"
    if cp > 1 and any(len({window - 1 <= length // (2 * cp) for length in lengths}) > 1
                      for window in windows):
        yield "windows within a piece of a row, where they are so in the longer phases alone"


def _collect_layers(m: ModelConfig, windows: dict[int, int]) -> set[tuple[str, int, bool]]:
    """Return each layer's kind of attention, its window in miniature, and whether it has experts."""
    return {(kind, windows[window], bool(m.num_experts) and i >= m.num_dense_layers)
            for i, (kind, window) in enumerate(zip(m.layer_types(), m.windows(), strict=True))}
