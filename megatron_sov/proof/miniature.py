"""Build a run's miniature: equal layout, layer kinds and step settings, with minimal widths, in float64.

A layout can split, send, sum or scale tensors wrongly. Such errors do not depend on a layer's width, as long
as each process has a shard.
"""

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
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import SettingsError, format_change
from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.config.model import LAYER_TYPES

HEAD_DIM = 8
"""Some families rotate half the channels, in pairs (`rope_share`)."""
VOCABULARY = 89
"""A prime: tensor parallelism must pad the vocabulary."""
ROW_TOKENS = 32
FEW_RUNS = 4
MOST_ROWS = 128
"""Rows per micro-batch on one process: with 64 heads and 128 experts, 15 MB per row."""
_TABLES = load_package_table(Path(__file__).with_suffix(".yaml"))
OVERRIDES: dict[str, Any] = _TABLES["overrides"]
"""Settings without support for float64 on CPUs, or without effect on results. `uncovered` lists changes."""
UNCOVERED: dict[str, str] = _TABLES["uncovered"]
"""Changed setting -> part that the proof does not cover."""
BUILT_IN_OBJECTIVES = ("lm", "sft", "preference", "distill", "policy")
"""Objectives with columns from `random_documents`."""
TEACHER_TOKENS = 16
NO_MEDIA: dict[str, Any] = {
    **{f"model.{part}": None for part in ("vision", "audio", "image_tokens", "audio_tokens")},
    "media.vision_from": "", "media.audio_from": "", "objective.image_weight": 1, "objective.audio_weight": 1}
"""Media placeholders and id blocks do not fit into the small vocabulary."""


@dataclass(frozen=True)
class Miniature:
    """A run for a single CPU process."""

    config: RunConfig
    num_ranks: int
    uncovered: tuple[str, ...]
    """Parts missing from the miniature, from `UNCOVERED`."""

    @property
    def folder(self) -> Path:
        """Folder with documents and temporary files."""
        [documents] = self.config.data.paths
        return Path(documents).parent

    def build_reference_config(self) -> RunConfig:
        """Return the config without a layout: one rank, and the fewest micro-batches."""
        lone, rows = ParallelConfig(), self.config.train.global_batch_size
        settings = {f"parallel.{name}": getattr(lone, name)
                 for name in ("tp", "sp", "pp", "vpp", "ep", "etp", "cp", "pipeline_layout", "zero1",
                              "overlap_grad_reduce", "overlap_param_gather", "bucket_params",
                              "expert_dispatcher")}
        settings["train.micro_batch_size"] = next(
            n for n in range(min(rows, MOST_ROWS), 0, -1) if rows % n == 0)
        settings["gpu.pad_buckets"] = "off"  # needs ZeRO-1
        return apply_settings(self.config, _format_settings(settings))


def build_miniature(config: RunConfig, num_ranks: int, data: Path) -> Miniature:
    """Build a run's miniature.

    Args:
        config: the run.
        num_ranks: number of processes.
        data: folder for `random_documents.write_documents`.

    Raises:
        UserError: invalid settings of the run or of the miniature.
    """
    config.check(num_ranks)
    m, p = config.model, config.parallel
    runs = _choose_run_lengths(config)
    settings = OVERRIDES | NO_MEDIA | {
        "model.vocab_size": VOCABULARY, "model.num_layers": sum(runs), "parallel.pipeline_layout": [
            *runs] if p.pipeline_layout else [],
        "model.expert_ffn_dim": 2 * _common_multiple(p.etp, p.tp) if m.num_experts else 0,
        "data.paths": {str(data): 1.0}, "data.phases": [{"name": "proof", "seq_len": _get_row_tokens(p)}],
        "train.global_batch_size": _choose_batch_size(config, num_ranks),
        "train.micro_batch_size": _choose_micro_batch(config),
        "train.recompute": config.train.recompute if config.train.recompute != "selective" else False,
        **_choose_widths(m, p)}
    if p.expert_dispatcher in ("deepep", "hybridep"):
        settings["parallel.expert_dispatcher"] = "alltoall"
    if p.overlap_grad_reduce:  # a layer, and an expert, must fill two buckets
        settings["parallel.bucket_params"] = 8 * settings["model.hidden_size"]
    if config.objective.name not in BUILT_IN_OBJECTIVES:
        settings |= {"objective.name": "sft", "objective.options": {}}
    if config.distillation.top_k > TEACHER_TOKENS:
        settings["distillation.top_k"] = TEACHER_TOKENS
    if m.dense_ffn_dim:
        settings["model.dense_ffn_dim"] = 4 * p.tp
    windows = _choose_windows(config)
    if m.sliding_window_tokens:
        settings["model.sliding_window_tokens"] = windows[m.sliding_window_tokens]
    kinds = _list_layer_kinds(m)
    settings["model.attention_pattern"] = "".join(letter for letter, _ in kinds)
    if m.layer_windows:
        settings["model.layer_windows"] = [windows[window] for _, window in islice(cycle(kinds), sum(runs))]
    if m.swiglu_limits:  # low enough to clamp small numbers
        settings["model.swiglu_limits"] = [min(limit, 0.01)
                                            for limit in m.fields_for_depth(sum(runs))["swiglu_limits"]]
    groups = [group for group in config.optim.groups if _matches_some_layer(group.pattern, sum(runs))]
    if len(groups) < len(config.optim.groups):
        settings["optim.groups"] = [asdict(group) for group in groups]
    return _check_miniature(config, num_ranks, settings)


def _check_miniature(config: RunConfig, num_ranks: int, settings: dict[str, Any]) -> Miniature:
    try:
        small = apply_settings(config, _format_settings(settings))
        small.check(num_ranks)
        result = Miniature(small, num_ranks, tuple(dict.fromkeys(_list_uncovered(config, small))))
        result.build_reference_config().check()
    except SettingsError as e:  # its text would blame the user's settings
        raise UserError(f"the miniature of this run breaks a rule: {e}; not proved") from e
    return result


def _matches_some_layer(pattern: str, num_layers: int) -> bool:
    """Return whether a pattern for parameter names matches a layer of the miniature, or names no layer."""
    match = re.search(r"(?<!mtp\.)layers\.([^.]+)", pattern)
    return match is None or any(fnmatchcase(str(i), match[1]) for i in range(num_layers))


def _choose_run_lengths(config: RunConfig) -> list[int]:
    """Choose the layers per pipeline chunk: two for up to `FEW_RUNS` chunks, else one. Uneven chunks keep the
    order by size, with one to three layers, to start stages at uneven layers."""
    m, p = config.model, config.parallel
    chunk_lengths = p.pipeline_layout or (m.num_layers // (p.pp * p.vpp),) * (p.pp * p.vpp)
    if len(lengths := sorted({*chunk_lengths})) > 1:
        run_lengths = dict.fromkeys(lengths, 2) | {lengths[-1]: min(lengths[-1], 3), lengths[0]: 1}
        fewer_lengths = dict.fromkeys(lengths, 1) | {lengths[-1]: 2}
        runs = [run_lengths[count] for count in chunk_lengths]
        fewer = [fewer_lengths[count] for count in chunk_lengths]
        starts_evenly = all(sum(fewer[:i]) == sum(fewer) // len(fewer) * i for i in range(len(fewer)))
        if len(chunk_lengths) > FEW_RUNS and not starts_evenly:
            runs = fewer
    else:
        longest = 2 if len(chunk_lengths) <= FEW_RUNS else 1
        runs = [min(count, longest) for count in chunk_lengths]
    # dense layers come first, and each kind of MoE layer must follow
    needed = len(_list_layer_kinds(m)) + (m.num_dense_layers if m.num_experts else 0)
    missing = max(-(-(needed - sum(runs)) // len(runs)), 0)
    added = min(missing, *(count - run for count, run in zip(chunk_lengths, runs, strict=True)))
    return [run + added for run in runs]


def _list_layer_kinds(m: ModelConfig) -> list[tuple[str, int]]:
    """Return the distinct (pattern letter, window in tokens) pairs in layer order. The first layers are not
    enough: LL in LLLG would miss G."""
    letters = {kind: letter for letter, kind in LAYER_TYPES.items()}
    return [*dict.fromkeys(zip((letters[kind] for kind in m.layer_types()), m.windows(), strict=True))]


def _choose_windows(config: RunConfig) -> dict[int, int]:
    """Return run window -> miniature window in tokens (0: none). Under context parallelism, a window shorter
    than a rank's part of a row stays shorter, because then only the part's end is sent."""
    m, cp = config.model, config.parallel.cp
    run_windows = sorted({*m.windows(), m.sliding_window_tokens} - {0})
    piece = min(phase.seq_len for phase in config.data.phases) // (2 * cp)
    small_piece = _get_row_tokens(config.parallel) // (2 * cp)
    ending_within = [window for window in run_windows if cp > 1 and window - 1 <= piece]
    windows = {0: 0}
    for i, window in enumerate(run_windows):
        if cp == 1:
            windows[window] = 8 + 4 * i
        elif window in ending_within:
            windows[window] = max(small_piece + 1 - len(ending_within) + i, 2)
        else:
            windows[window] = small_piece + 2 + i
    return windows


def _choose_widths(m: ModelConfig, p: ParallelConfig) -> dict[str, Any]:
    # keeps the number of query heads per key head
    kv_heads = _choose_num_kv_heads(m.num_kv_heads, p.tp)
    heads = max(m.num_heads * kv_heads // m.num_kv_heads, kv_heads)
    settings: dict[str, Any] = {"model.num_kv_heads": kv_heads, "model.num_heads": heads,
                             "model.head_dim": _choose_head_dim(m), "model.hidden_size": 8 * p.tp}
    if m.latent_attention is not None:
        q_rank = m.latent_attention.q_lora_rank
        settings |= {"model.num_heads": 2 * p.tp, "model.num_kv_heads": 2 * p.tp, "model.head_dim": 12,
                  "model.latent_attention": {
                      "kv_lora_rank": 12, **({} if q_rank is None else {"q_lora_rank": 20}),
                      "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}}
    if m.linear_attention is not None:
        settings["model.linear_attention"] = {
            "num_key_heads": p.tp * p.cp, "num_value_heads": p.tp * p.cp,
            "key_head_dim": 8, "value_head_dim": 8, "conv_taps": m.linear_attention.conv_taps,
            "gate_rank": 8,
            "negative_eigenvalues": m.linear_attention.negative_eigenvalues}
    if m.num_experts:
        settings["model.num_experts"] = _choose_num_experts(m, p)
    if m.yarn is not None:
        settings["model.yarn"] = {**json.loads(json.dumps(m.yarn.__dict__)),
                               "original_max_position_tokens": 4 * p.cp * p.tp}
    return settings


def _choose_head_dim(m: ModelConfig) -> int:
    """Choose `head_dim`, with an even number of rotated channels."""
    return next((size for size in range(HEAD_DIM, m.head_dim, 2) if m.rope_share == 1
                 or not size * m.rope_share % 2), max(HEAD_DIM, m.head_dim))


def _choose_num_experts(m: ModelConfig, p: ParallelConfig) -> int:
    """Choose `num_experts`: at least two per process, with the run's `num_expert_groups`."""
    count = max(2 * p.ep, 2 * m.num_experts_per_token, 2 * m.num_expert_groups)
    step = _common_multiple(p.ep, m.num_expert_groups)
    return min(m.num_experts, -(-count // step) * step)


def _get_row_tokens(p: ParallelConfig) -> int:
    return -(-ROW_TOKENS // p.row_multiple) * p.row_multiple


def _choose_batch_size(config: RunConfig, num_ranks: int) -> int:
    """Choose `global_batch_size`: more micro-batches than the first stage's warm-up, to alternate forward and
    backward passes. The warm-up has pp - 1 micro-batches or, interleaved, 2 (pp - 1) + (vpp - 1) pp of the
    m * vpp chunk passes of m micro-batches."""
    p, replicas = config.parallel, num_ranks // config.parallel.ranks_per_replica
    return replicas * _choose_micro_batch(config) * (2 * p.pp if p.vpp > 1 else p.pp + 1)


def _choose_micro_batch(config: RunConfig) -> int:
    """Choose `micro_batch_size`: one or three, to cut a row when splitting into halves."""
    return 1 if config.train.micro_batch_size == 1 else 3


def _choose_num_kv_heads(count: int, tp: int) -> int:
    """Choose the smallest divisor of `count` that is a multiple of tp; two heads per process if possible."""
    fitting = [n for n in range(1, count + 1) if count % n == 0 and n % tp == 0]
    return next((n for n in fitting if n >= 2 * tp), fitting[-1])


def _common_multiple(a: int, b: int) -> int:
    return int(np.lcm(a, b))


def _format_settings(settings: dict[str, Any]) -> Sequence[str]:
    return [format_change(name, value) for name, value in settings.items()]


def _list_uncovered(config: RunConfig, small: RunConfig) -> Iterator[str]:
    for name, part_name in UNCOVERED.items():
        part, _, key = name.partition(".")
        if getattr(getattr(config, part), key) != getattr(getattr(small, part), key) or (
                name == "gpu.attention"):
            yield part_name
    windows = _choose_windows(config)
    small_windows = {window: window for window in windows.values()}
    missing = _collect_layers(config.model, windows) - _collect_layers(small.model, small_windows)
    if missing:
        yield f"{len(missing)} kinds of layers, of which there are more than layers in miniature"
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
    """Return the distinct (attention kind, window in the miniature, has experts) of a model's layers."""
    return {(kind, windows[window], bool(m.num_experts) and i >= m.num_dense_layers)
            for i, (kind, window) in enumerate(zip(m.layer_types(), m.windows(), strict=True))}
