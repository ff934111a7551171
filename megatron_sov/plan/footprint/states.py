"""Count the bytes for weights, gradients and optimizer states on a training process, element by element.

`tests/plan/footprint/test_states.py` and `benchmarks/plan_bytes.py` compare them with the library's own
buffers (`engine.optimizer`) on meta tensors, in a fake process group.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.config.model import QUANTILE_BINS
from megatron_sov.model.families.count import TABLES
from megatron_sov.model.families.encoders import encoder_buffer_bytes, is_frozen, is_position_table
from megatron_sov.model.process_memory import StatePlace, States
from megatron_sov.plan.footprint.stage_parameters import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, LocalParameter, is_adapter, list_chunk_layers,
    list_stage_parameters, round_up)

HOST = 4 * FLOAT32_BYTES
"""Host bytes per parameter under `gpu.optimizer_offload` (`engine/optimizer/adamw.py`): master weight, two
moments and gradient."""
DEFAULT_BUCKET, DEFAULT_BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements per bucket under `parallel.overlap_grad_reduce`: the first, or the second times the
data-parallel size if larger (`DistributedDataParallel`, 0.19.2)."""
START_MULTIPLE = 64
"""Parameter alignment under ZeRO-1, in elements."""
END_MULTIPLE = 128
"""Alignment at a bucket's end, in elements."""
FAST_END_MULTIPLE = 1 << 16
"""Alignment at a bucket's end under `gpu.pad_buckets`, in elements."""
MAX_CACHED = 1 << 16
_states_cache: dict[tuple[object, ...], States] = {}


def estimate_states(config: RunConfig, num_ranks: int, stage: int) -> States:
    """Return the bytes on the fullest process on pipeline stage `stage` (0-based).

    A search needs equal states many times, so results are cached: sequence length, micro-batch size and
    recomputation do not matter, and stages with equal layer counts per kind are equal.
    """
    gpu, p, m = config.gpu, config.parallel, config.model
    key = (_strip_length(m), config.lora, config.media, config.optim, config.train.precision,
           gpu.pad_buckets, gpu.grad_dtype, gpu.moment_dtype, gpu.optimizer_offload, num_ranks, p.tp, p.pp,
           p.ep, p.etp, p.zero1, stage == 0, stage == p.pp - 1, _build_layers_key(config, stage),
           get_bucket_numel(config, num_ranks) if stage == 0 else None, p.cp if m.yarn is not None else 0)
    if key not in _states_cache:
        if len(_states_cache) >= MAX_CACHED:
            _states_cache.clear()
        buffers = StageBuffers(config, num_ranks, stage)
        _states_cache[key] = buffers.count_states(buffers.find_fullest_place())
    return _states_cache[key]


@lru_cache(maxsize=64)
def _strip_length(m: ModelConfig) -> ModelConfig:
    """Drop `max_position_tokens`, which extension stages change."""
    return replace(m, max_position_tokens=0)


def _build_layers_key(config: RunConfig, stage: int) -> tuple[tuple[int, ...], ...]:
    """Return (dense layers, layers) per chunk, or the layers themselves if `optim.groups` or adapters may
    name single layers."""
    m = config.model
    chunks = list_chunk_layers(config.parallel, stage, m.num_layers)
    if config.optim.groups or config.lora.on:
        return tuple(tuple(layers) for layers in chunks)
    first_moe = m.num_layers - m.num_moe_layers()
    return tuple((sum(layer < first_moe for layer in layers), len(layers)) for layers in chunks)


# The library's buffers and shards: the arithmetic in `_ParamAndGradBuffer` (`param_and_grad_buffer.py`,
# 0.19.2) on runs of parameters with equal sizes (hundreds per stage, for tens of thousands of parameters).
# Parameters are in reverse registration order. Under ZeRO-1, a parameter starts at a multiple of 64 elements,
# and a bucket ends at a multiple of 128 and of the data-parallel size, so that shards are equal.


class ParameterRun(NamedTuple):
    """Consecutive parameters with equal sizes."""

    numel: int
    number: int
    rule: int
    """Update rule index."""
    is_alone: bool
    """Whether each parameter has its own bucket: tables on two pipeline stages."""


class StatePiece(NamedTuple):
    """Equal parts of parameters, which a process updates."""

    numel: int
    number: int
    rule: int


class PlacedParameter(NamedTuple):
    """A run, or its part in one bucket, at its place in the buffer."""

    start: int
    stride: int
    """Elements from a parameter's start to the next parameter's start."""
    run: ParameterRun

    @property
    def end(self) -> int:
        return self.start + (self.run.number - 1) * self.stride + self.run.numel


@dataclass(frozen=True)
class ParameterBuffer:
    """A buffer for parameters and gradients."""

    numel: int
    buckets: tuple[tuple[int, int, tuple[PlacedParameter, ...]], ...]
    """First element, end, and parameters."""

    def iter_updated(self, rank: int, num_ranks: int) -> Iterator[StatePiece]:
        """Yield the pieces that rank `rank` out of `num_ranks` updates under ZeRO-1."""
        for first, end, parameters in self.buckets:
            # exact, because buckets are padded to a multiple of `num_ranks`
            share = (end - first) // num_ranks
            start = first + rank * share
            for run in parameters:
                # Runs are sorted: later runs start after the shard, too.
                if run.start >= start + share:
                    break
                if run.end > start:
                    yield from _iter_overlap(run, start, start + share)


def lay_out_buffer(runs: Iterable[ParameterRun], *, sharded: bool, num_ranks: int, bucket_numel: int | None,
                   end_multiple: int) -> ParameterBuffer:
    """Lay out a buffer.

    Args:
        runs: parameters in buffer order.
        sharded: whether ZeRO-1 shards the buffer, with gaps.
        num_ranks: processes that share it.
        bucket_numel: elements at which a bucket is full; None: a single bucket.
        end_multiple: alignment at a bucket's end, next to the number of processes.
    """
    if not sharded:
        parameters, offset = [], 0
        for run in runs:
            parameters.append(PlacedParameter(offset, run.numel, run))
            offset += run.numel * run.number
        return ParameterBuffer(offset, ((0, offset, tuple(parameters)),) if parameters else ())
    return _ShardedLayout(math.lcm(num_ranks, end_multiple), bucket_numel).lay_out(runs)


class _ShardedLayout:
    """Lays out a buffer under ZeRO-1."""

    def __init__(self, end_multiple: int, bucket_numel: int | None) -> None:
        self._multiple, self._bucket_numel = end_multiple, bucket_numel
        self._buckets: list[tuple[int, int, tuple[PlacedParameter, ...]]] = []
        self._parameters: list[PlacedParameter] = []
        self._first = self._offset = 0

    def lay_out(self, runs: Iterable[ParameterRun]) -> ParameterBuffer:
        for run in runs:
            self._offset = round_up(self._offset, START_MULTIPLE)
            # Tables on two stages are reduced separately: close the open bucket first.
            if run.is_alone and self._parameters:
                self._close_bucket()
            self._place_run(run)
        if self._parameters:
            self._close_bucket()
        return ParameterBuffer(self._offset, tuple(self._buckets))

    def _place_run(self, run: ParameterRun) -> None:
        stride, rest = round_up(run.numel, START_MULTIPLE), run.number
        while rest:
            self._offset = round_up(self._offset, START_MULTIPLE)
            number, closes = rest, run.is_alone
            if run.is_alone:
                number = 1
            elif self._bucket_numel is not None:
                missing = self._bucket_numel - (self._offset - self._first) - run.numel
                # The bucket closes with the first parameter that reaches the limit.
                until_full = max(1, -(-missing // stride) + 1)
                number, closes = min(rest, until_full), until_full <= rest
            part = run if number == run.number else run._replace(number=number)
            self._parameters.append(PlacedParameter(self._offset, stride, part))
            self._offset = self._parameters[-1].end
            rest -= number
            if closes:
                self._close_bucket()

    def _close_bucket(self) -> None:
        self._offset = round_up(self._offset, self._multiple)
        self._buckets.append((self._first, self._offset, tuple(self._parameters)))
        self._first, self._parameters = self._offset, []


def _iter_overlap(block: PlacedParameter, start: int, end: int) -> Iterator[StatePiece]:
    """Yield the overlap between a run and elements `start` to `end`; complete parameters together."""
    numel, count, rule, _ = block.run

    def count_elements(index: int) -> int:
        begin = block.start + index * block.stride
        return max(0, min(end, begin + numel) - max(start, begin))

    first = max(0, (start - block.start) // block.stride)
    last = min(count - 1, (end - 1 - block.start) // block.stride)
    # only the first and last parameter can be partial
    parts = [(first, 1)]
    if last - first > 1:
        parts.append((first + 1, last - first - 1))
    if last > first:
        parts.append((last, 1))
    for index, number in parts:
        if elements := count_elements(index):
            yield StatePiece(elements, number, rule)


@dataclass(frozen=True)
class _UpdateRule:
    """A parameter's update (`engine.optimizer.parameter_groups.GroupRule`)."""

    frozen: bool
    by_muon: bool
    is_vector: bool


class _OptimizerBytes(NamedTuple):
    """Memory for an optimizer (dense parameters or routed experts) on a process."""

    optimizer: int
    on_host: int
    updated: int
    """Elements with master weights on the device."""


class StageBuffers:
    """A pipeline stage's buffers, which determine its processes' states."""

    def __init__(self, config: RunConfig, num_ranks: int, stage: int) -> None:
        p = config.parallel
        self._config, self._num_ranks = config, num_ranks
        self._chunks = list_stage_parameters(config, stage)
        self._num_shards = {False: num_ranks // (p.tp * p.pp), True: num_ranks // (p.etp * p.ep * p.pp)}
        self._is_first = stage == 0
        self._rules: list[_UpdateRule] = []
        self._rule_cache: dict[int, list[int]] = {}
        self._buffers: dict[bool, list[ParameterBuffer]] = {False: [], True: []}
        self._frozen = self._trained = 0
        for chunk, layers in enumerate(self._chunks):
            parts = [pair for layer, parameters in layers
                     for pair in zip(parameters, self._find_rules(layer, parameters), strict=True)]
            for routed in (False, True):
                self._lay_out(parts, routed, is_first_chunk=stage == 0 and chunk == 0)

    def _find_rules(self, layer: int | None, parameters: tuple[LocalParameter, ...]) -> list[int]:
        """Return the rule index per parameter; layers share indices unless `optim.groups` names a layer."""
        if id(parameters) in self._rule_cache and not self._config.optim.groups:
            return self._rule_cache[id(parameters)]
        indices = []
        for parameter in parameters:
            rule = find_update_rule(self._config, layer, parameter)
            if rule not in self._rules:
                self._rules.append(rule)
            indices.append(self._rules.index(rule))
        self._rule_cache[id(parameters)] = indices
        return indices

    def _lay_out(self, parts: list[tuple[LocalParameter, int]], routed: bool, *, is_first_chunk: bool
                 ) -> None:
        config = self._config
        runs = []
        # Reversed: the backward pass finishes the last layers first and fills buckets in its order.
        for part, rule in reversed(parts):
            if part.routed != routed:
                continue
            if self._rules[rule].frozen:
                self._frozen += part.numel * part.count
            else:
                self._trained += part.numel * part.count
                runs.append(ParameterRun(part.numel, part.count, rule, part.is_copied))
        if not runs:
            return
        # Only the first chunk on the first stage has several buckets.
        bucket_numel = get_bucket_numel(config, self._num_ranks) if is_first_chunk else None
        self._buffers[routed].append(lay_out_buffer(
            runs, sharded=config.parallel.zero1, num_ranks=self._num_shards[routed],
            bucket_numel=bucket_numel,
            end_multiple=FAST_END_MULTIPLE if config.gpu.pad_buckets == "on" else END_MULTIPLE))

    def find_fullest_place(self) -> StatePlace:
        """Return the process with most states: the first, or a process that updates tables, because Muon has
        one moment and AdamW two."""
        rules = self._rules
        # With a single algorithm all shards are equal.
        if not self._config.parallel.zero1 or len({rule.by_muon for rule in rules if not rule.frozen}) < 2:
            return StatePlace()
        num_shards, ranks = self._num_shards[False], {0}
        buckets = (bucket for buffer in self._buffers[False] for bucket in buffer.buckets)
        for first, end, parameters in buckets:
            share = (end - first) // num_shards
            for parameter in parameters:
                rule = rules[parameter.run.rule]
                if not (rule.by_muon or rule.is_vector):
                    rank = (parameter.start - first) // share
                    # the first process with a part of the table, and the next, whose shard may be all table
                    ranks |= {rank, min(rank + 1, (parameter.end - 1 - first) // share)}
        return StatePlace(max(sorted(ranks), key=lambda rank: self._count_bytes(False, rank).optimizer))

    def count_states(self, place: StatePlace) -> States:
        """Return the bytes on the process at `place`."""
        config = self._config
        item, bf16 = ITEM_BYTES[config.train.precision], config.train.precision == "bf16"
        numel = sum(buffer.numel for buffers in self._buffers.values() for buffer in buffers)
        dense, experts = self._count_bytes(False, place.dense), self._count_bytes(True, place.experts)
        # The default is float32: bf16 sums would lose thousands of small terms.
        gradient_bytes = max(item, FLOAT32_BYTES)
        if bf16 and config.gpu.grad_dtype == "bf16":
            gradient_bytes = BF16_BYTES
        return States(
            weights=(numel + self._frozen) * item, gradients=numel * gradient_bytes,
            optimizer=dense.optimizer + experts.optimizer, on_host=dense.on_host + experts.on_host,
            counters=self._count_counter_bytes(), updated=dense.updated + experts.updated,
            elements=self._trained + self._frozen)

    def _count_bytes(self, routed: bool, rank: int) -> _OptimizerBytes:
        """Return the optimizer memory for dense parameters or, if `routed`, for routed experts."""
        config = self._config
        item, bf16 = ITEM_BYTES[config.train.precision], config.train.precision == "bf16"
        moment, master = item, 0
        if bf16:
            moment = BF16_BYTES if config.gpu.moment_dtype == "bf16" else FLOAT32_BYTES
            master = FLOAT32_BYTES
        pieces = self._list_updated(routed, rank)
        # offloaded parameters have no master weights or moments on the device
        offloaded = _count_offloaded(pieces, self._rules, config.gpu.optimizer_offload)
        on_device = sum(piece.numel * piece.number for piece in pieces) - offloaded
        by_muon = sum(piece.numel * piece.number for piece in pieces if self._rules[piece.rule].by_muon)
        return _OptimizerBytes(
            (on_device - by_muon) * (master + 2 * moment) + by_muon * (master + max(item, FLOAT32_BYTES)),
            offloaded * HOST, on_device)

    def _list_updated(self, routed: bool, rank: int) -> list[StatePiece]:
        """Return the pieces that a process updates: dense parameters or, if `routed`, routed experts."""
        buffers = self._buffers[routed]
        if self._config.parallel.zero1:
            return [piece for buffer in buffers
                    for piece in buffer.iter_updated(rank, self._num_shards[routed])]
        return [StatePiece(parameter.run.numel, parameter.run.number, parameter.run.rule)
                for buffer in buffers for _, _, parameters in buffer.buckets for parameter in parameters]

    def _count_counter_bytes(self) -> int:
        """Return the model's buffer bytes: per router float32 token counts and biases, per chunk float32
        cosines and sines for the original positions under YaRN (`YarnRotaryEmbedding`, 0.19.2), and encoder
        buffers."""
        m = self._config.model
        first_moe, routers = m.num_layers - m.num_moe_layers(), 0
        for layer, parts in (layers for chunk in self._chunks for layers in chunk):
            key = parts[0].key
            is_trunk_layer = len(parts) > 1 and key.startswith("decoder.layers.{l}")
            if is_trunk_layer and layer is not None and layer >= first_moe:
                routers += 1
            if key.startswith("mtp.layers.") and m.mtp_experts:
                routers += 1
        cp = self._config.parallel.cp
        # Latent attention without YaRN also has angles, for the fewest possible positions.
        positions = 2 * cp if m.latent_attention is not None else 0
        if m.yarn is not None:
            positions = m.yarn.original_max_position_tokens
        angles = len(self._chunks) * 2 * m.rotated_channels() * positions // cp
        # `required_biases` has int32 counts
        per_expert = 1 + m.router_bias + (QUANTILE_BINS if m.router_bias_update == "quantile" else 0)
        return ((routers * m.num_experts * per_expert + angles) * FLOAT32_BYTES
                + (encoder_buffer_bytes(m) if self._is_first else 0))


def get_bucket_numel(config: RunConfig, num_ranks: int) -> int | None:
    """Return the elements at which the first chunk's bucket is full; None: a single bucket."""
    p = config.parallel
    if not p.overlap_grad_reduce:
        return None
    num_replicas = num_ranks // p.ranks_per_replica
    return p.bucket_params or max(DEFAULT_BUCKET, DEFAULT_BUCKET_PER_RANK * num_replicas)


def find_update_rule(config: RunConfig, layer: int | None, part: LocalParameter) -> _UpdateRule:
    is_matrix = len(part.shape) == 2 and part.key not in TABLES and not is_position_table(part.key)
    algorithm, frozen = config.optim.name, False
    if config.optim.groups:
        key = part.key.replace("{l}", str(layer))
        for group in config.optim.groups:
            if fnmatch.fnmatchcase(key, group.pattern):
                algorithm, frozen = group.optimizer or config.optim.name, group.frozen
    frozen = frozen or is_frozen(part.key, config.media)
    return _UpdateRule(frozen or (config.lora.on and not is_adapter(part.key)),
                       is_matrix and algorithm == "muon", len(part.shape) == 1)


def _count_offloaded(pieces: list[StatePiece], rules: list[_UpdateRule], share: float) -> int:
    """Return the elements with optimizer states in host memory: the first pieces that reach `share`, matrices
    before vectors, which have no weight decay (`engine.optimizer.adamw.split_groups`)."""
    if not share:
        return 0
    limit, offloaded = share * sum(piece.numel * piece.number for piece in pieces), 0
    for piece in sorted(pieces, key=lambda piece: rules[piece.rule].is_vector):
        if limit > offloaded:
            offloaded += piece.numel * min(piece.number, -int((offloaded - limit) // piece.numel))
    return offloaded
