"""Bytes of weights, gradients and optimizer that one process holds while it trains: those of the modules,
buffers and optimizers that training makes (`engine.optimizer`), element by element.

`tests/plan/footprint/test_states.py` and `benchmarks/plan_bytes.py` hold them against the library's own, on
meta tensors in a fake group of all processes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.families.count import TABLES
from megatron_sov.model.families.encoders import encoder_buffer_bytes, is_frozen, is_position_table
from megatron_sov.model.process_memory import StatePlace, States
from megatron_sov.plan.footprint.stage_parameters import (
    BF16_BYTES, FLOAT32_BYTES, ITEM_BYTES, LocalParameter, is_adapter, list_chunk_layers,
    list_stage_parameters, round_up)

HOST = 4 * FLOAT32_BYTES
"""Bytes of the host for a parameter whose AdamW is there (`engine/optimizer/adamw.py`): master weight,
two moments and gradient."""
DEFAULT_BUCKET, DEFAULT_BUCKET_OF_RANK = 40_000_000, 1_000_000
"""Elements of a bucket under `parallel.overlap_grad_reduce`: the larger one of the first and as many times
the second as there are data-parallel processes (`DistributedDataParallel`, 0.19.2)."""
START_MULTIPLE = 64
"""Elements; a parameter's beginning, under ZeRO-1."""
END_MULTIPLE = 128
"""Elements; a bucket's end."""
FAST_END_MULTIPLE = 1 << 16
"""The same under `gpu.pad_buckets`."""


# The buffers in which the library lays parameters and gradients end to end, and what of them each
# data-parallel process updates: the arithmetic of `_ParamAndGradBuffer` in `param_and_grad_buffer.py`
# (0.19.2) over runs of parameters of one size, of which a stage has hundreds where it has ten thousands of
# parameters.  Parameters lie in the reverse order of their registration.  Under ZeRO-1 each begins at a
# multiple of 64 elements, and each bucket, which all processes of the data-parallel group share in equal
# stretches, ends at a multiple of their number and of 128.


class ParameterRun(NamedTuple):
    """Parameters of one size, in the order in which they are laid out."""

    numel: int
    number: int
    mark: int
    """What the caller knows them by."""
    is_alone: bool
    """Whether each has a bucket of its own (tables that two pipeline stages hold)."""


class StatePiece(NamedTuple):
    """Parameters, or parts of parameters, of one size that a process updates."""

    numel: int
    number: int
    mark: int


class PlacedParameter(NamedTuple):
    start: int
    stride: int
    """Elements from one to the next."""
    size: ParameterRun
    """What they are, as far as they lie in one bucket."""

    @property
    def end(self) -> int:
        return self.start + (self.size.number - 1) * self.stride + self.size.numel


@dataclass(frozen=True)
class ParameterBuffer:
    numel: int
    buckets: tuple[tuple[int, int, tuple[PlacedParameter, ...]], ...]
    """First element, the one behind the last, and what lies there."""

    def updated(self, rank: int, num_ranks: int) -> Iterator[StatePiece]:
        """Yield what one of the processes updates that share the buffer under ZeRO-1."""
        for first, end, placed in self.buckets:
            # Divides without a rest: a bucket's end is padded to a multiple of the number of processes.
            share = (end - first) // num_ranks
            start = first + rank * share
            for run in placed:
                # Runs are in order of their place: all later ones lie behind this process's stretch, too.
                if run.start >= start + share:
                    break
                if run.end > start:
                    yield from _iter_overlap(run, start, start + share)


def lay_out_buffer(sizes: Iterable[ParameterRun], *, sharded: bool, num_ranks: int, bucket_numel: int | None,
             end_multiple: int) -> ParameterBuffer:
    """Return the buffer of parameters.

    Args:
        sizes: in the order in which they are laid out.
        sharded: whether ZeRO-1 shares it, and there are gaps.
        num_ranks: processes that share it.
        bucket_numel: elements from which on a bucket is full; None: all are in one.
        end_multiple: what a bucket's end is a multiple of, beside the number of processes.
    """
    if not sharded:
        placed, offset = [], 0
        for size in sizes:
            placed.append(PlacedParameter(offset, size.numel, size))
            offset += size.numel * size.number
        return ParameterBuffer(offset, ((0, offset, tuple(placed)),) if placed else ())
    # lcm: the end has to divide by both, as the library pads it.
    return _ShardedLayout(math.lcm(num_ranks, end_multiple), bucket_numel).of(sizes)


class _ShardedLayout:
    """A buffer under ZeRO-1, while it is laid out."""

    def __init__(self, end_multiple: int, bucket_numel: int | None) -> None:
        self._multiple, self._full = end_multiple, bucket_numel
        self._buckets: list[tuple[int, int, tuple[PlacedParameter, ...]]] = []
        self._placed: list[PlacedParameter] = []
        self._first = self._offset = 0

    def of(self, sizes: Iterable[ParameterRun]) -> ParameterBuffer:
        for size in sizes:
            self._offset = round_up(self._offset, START_MULTIPLE)
            # Tables that two stages hold are reduced apart from all else, so the open bucket ends before
            # them.
            if size.is_alone and self._placed:
                self._close()
            self._place(size)
        if self._placed:
            self._close()
        return ParameterBuffer(self._offset, tuple(self._buckets))

    def _place(self, size: ParameterRun) -> None:
        stride, left = round_up(size.numel, START_MULTIPLE), size.number
        while left:
            self._offset = round_up(self._offset, START_MULTIPLE)
            taken, closes = left, size.is_alone
            if size.is_alone:
                taken = 1
            elif self._full is not None:
                missing = self._full - (self._offset - self._first) - size.numel
                # Parameters that still go in: the bucket closes with the first one that reaches the limit.
                until_full = max(1, -(-missing // stride) + 1)
                taken, closes = min(left, until_full), until_full <= left
            placed = size if taken == size.number else size._replace(number=taken)
            self._placed.append(PlacedParameter(self._offset, stride, placed))
            self._offset = self._placed[-1].end
            left -= taken
            if closes:
                self._close()

    def _close(self) -> None:
        self._offset = round_up(self._offset, self._multiple)
        self._buckets.append((self._first, self._offset, tuple(self._placed)))
        self._first, self._placed = self._offset, []


def _iter_overlap(run: PlacedParameter, start: int, end: int) -> Iterator[StatePiece]:
    """Yield the parts of a run between two elements of the buffer: whole parameters together."""
    numel, count, mark, _ = run.size

    def part(place: int) -> int:
        begins = run.start + place * run.stride
        return max(0, min(end, begins + numel) - max(start, begins))

    first = max(0, (start - run.start) // run.stride)
    last = min(count - 1, (end - 1 - run.start) // run.stride)
    # whole ones can only be missing at the ends
    between = [(first + 1, last - first - 1)] if last - first > 1 else []
    for place, number in [(first, 1), *between, *([(last, 1)] if last > first else [])]:
        if elements := part(place):
            yield StatePiece(elements, number, mark)


@dataclass(frozen=True)
class _UpdateRule:
    """How a parameter is updated (`engine.optimizer.parameter_groups.GroupRule`)."""

    frozen: bool
    by_muon: bool
    is_vector: bool


class _OptimizerBytes(NamedTuple):
    """What one of the library's two optimizers holds of a process's parameters."""

    optimizer: int
    on_host: int
    updated: int
    """Elements whose masters are on the device."""


class StageBuffers:
    """The buffers of a pipeline stage, from which follows what each of its processes holds."""

    def __init__(self, config: RunConfig, num_ranks: int, stage: int) -> None:
        """Lay them out; the layout has to fit the model and the number of processes."""
        p = config.parallel
        self._config, self._num_ranks, self._chunks = config, num_ranks, list_stage_parameters(config, stage)
        self._sizes = {False: num_ranks // (p.tp * p.pp), True: num_ranks // (p.etp * p.ep * p.pp)}
        self._is_first = stage == 0
        self._rules: list[_UpdateRule] = []
        self._known: dict[int, list[int]] = {}
        self._buffers: dict[bool, list[ParameterBuffer]] = {False: [], True: []}
        self._frozen = self._trained = 0
        for number, runs in enumerate(self._chunks):
            marked = [pair for layer, parts in runs
                      for pair in zip(parts, self._marks(layer, parts), strict=True)]
            for routed in (False, True):
                self._lay_out(marked, routed, stage, number)

    def _marks(self, layer: int | None, parts: tuple[LocalParameter, ...]) -> list[int]:
        """Return the numbers of the rules of some parameters; layers are alike where no rule names one."""
        if id(parts) in self._known and not self._config.optim.groups:
            return self._known[id(parts)]
        found = []
        for part in parts:
            rule = find_update_rule(self._config, layer, part)
            if rule not in self._rules:
                self._rules.append(rule)
            found.append(self._rules.index(rule))
        self._known[id(parts)] = found
        return found

    def _lay_out(self, marked: list[tuple[LocalParameter, int]],
                 routed: bool, stage: int, number: int) -> None:
        p = self._config.parallel
        # Reversed: the backward pass finishes the last layers first, and buckets fill in that order.
        mine = [(part, mark) for part, mark in reversed(marked) if part.routed == routed]
        self._frozen += sum(part.numel * part.count for part, mark in mine if self._rules[mark].frozen)
        sizes = [ParameterRun(part.numel, part.count, mark, part.is_copied) for part, mark in mine
                 if not self._rules[mark].frozen]
        if not sizes:
            return
        self._trained += sum(size.numel * size.number for size in sizes)
        # Only the first chunk of the first stage overlaps bucket by bucket; the others have one bucket.
        full = get_bucket_numel(self._config, self._num_ranks) if stage == 0 and number == 0 else None
        self._buffers[routed].append(lay_out_buffer(
            sizes, sharded=p.zero1, num_ranks=self._sizes[routed], bucket_numel=full,
            end_multiple=FAST_END_MULTIPLE if self._config.gpu.pad_buckets == "on" else END_MULTIPLE))

    def find_fullest_place(self) -> StatePlace:
        """Return the process that holds most: the first, or, where Muon keeps one moment and AdamW two, one
        of those that update tables."""
        rules = self._rules
        # With one algorithm all shares are equal, so the first process is as full as any.
        if not self._config.parallel.zero1 or len({rule.by_muon for rule in rules if not rule.frozen}) < 2:
            return StatePlace()
        ranks, found = self._sizes[False], {0}
        for first, end, placed in (bucket for buffer in self._buffers[False] for bucket in buffer.buckets):
            share = (end - first) // ranks
            for run in placed:
                rule = rules[run.size.mark]
                if not (rule.by_muon or rule.is_vector):
                    begins = (run.start - first) // share
                    # The first process that meets a table, and the next, which may hold a whole share of
                    # it.
                    found |= {begins, min(begins + 1, (run.end - 1 - first) // share)}
        return StatePlace(max(sorted(found), key=lambda rank: self._optimizer(False, rank).optimizer))

    def count_states(self, place: StatePlace) -> States:
        config = self._config
        item, bf16 = ITEM_BYTES[config.train.precision], config.train.precision == "bf16"
        numel = sum(buffer.numel for buffers in self._buffers.values() for buffer in buffers)
        dense, experts = self._optimizer(False, place.dense), self._optimizer(True, place.experts)
        return States(
            weights=(numel + self._frozen) * item,
            # Gradients are summed up in float32 unless bf16 is asked for: thousands of small terms would
            # vanish in bf16.
            gradients=numel * (BF16_BYTES if bf16 and config.gpu.grad_dtype == "bf16"
                               else max(item, FLOAT32_BYTES)),
            optimizer=dense.optimizer + experts.optimizer, on_host=dense.on_host + experts.on_host,
            counters=self._counters(), updated=dense.updated + experts.updated,
            elements=self._trained + self._frozen)

    def _optimizer(self, routed: bool, rank: int) -> _OptimizerBytes:
        """Return what one of the library's two optimizers, of dense parameters and of experts, holds."""
        config = self._config
        item, bf16 = ITEM_BYTES[config.train.precision], config.train.precision == "bf16"
        moment = item
        if bf16:
            moment = BF16_BYTES if config.gpu.moment_dtype == "bf16" else FLOAT32_BYTES
        master = FLOAT32_BYTES if bf16 else 0
        pieces = self._updated(routed, rank)
        # What AdamW on the host updates has no master weights or moments here.
        moved = _count_offloaded(pieces, self._rules, config.gpu.optimizer_offload)
        here = sum([piece.numel * piece.number for piece in pieces]) - moved
        by_muon = sum([piece.numel * piece.number for piece in pieces if self._rules[piece.mark].by_muon])
        return _OptimizerBytes(
            (here - by_muon) * (master + 2 * moment) + by_muon * (master + max(item, FLOAT32_BYTES)),
            moved * HOST, here)

    def _updated(self, routed: bool, rank: int) -> list[StatePiece]:
        """Return what a process updates of dense parameters or experts."""
        size = self._sizes[routed]
        if self._config.parallel.zero1:
            return [piece for buffer in self._buffers[routed] for piece in buffer.updated(rank, size)]
        return [StatePiece(run.size.numel, run.size.number, run.size.mark)
                for buffer in self._buffers[routed] for _, _, placed in buffer.buckets for run in placed]

    def _counters(self) -> int:
        """Return the bytes of buffers, float32 each: of a router every expert's tokens and bias, of a chunk
        cosine and sine of the original context's positions under YaRN (`YarnRotaryEmbedding`, 0.19.2); and
        those of encoders."""
        m = self._config.model
        layers = (layer for runs in self._chunks for layer, parts in runs if len(parts) > 1
                  and parts[0].key.startswith("decoder.layers.{l}"))
        first_moe = m.num_layers - m.num_moe_layers()
        routers = sum(layer is not None and layer >= first_moe for layer in layers) + sum(
            parts[0].key.startswith("mtp.layers.") for runs in self._chunks
            for _, parts in runs) * m.mtp_experts
        cp = self._config.parallel.cp
        # latent attention without YaRN has its angles, too, of as few positions as can be
        positions = 2 * cp if m.latent_attention is not None else 0
        if m.yarn is not None:
            positions = m.yarn.original_max_position_tokens
        angles = len(self._chunks) * 2 * m.rotated_channels() * positions // cp
        return ((routers * m.num_experts * (1 + m.router_bias) + angles) * FLOAT32_BYTES
                + (encoder_buffer_bytes(m) if self._is_first else 0))


_known: dict[tuple[object, ...], States] = {}
MAX_KNOWN = 1 << 16
"""Stages whose states are remembered."""


def estimate_states(config: RunConfig, num_ranks: int, stage: int) -> States:
    """Return what the fullest process of a pipeline stage holds.

    Length, micro-batch and recomputation have no part in it, stages with as many layers of each kind hold the
    same, and context parallelism changes little: a search asks for many a layout once.
    """
    gpu, p, m = config.gpu, config.parallel, config.model
    key = (_strip_length(m), config.lora, config.media, config.optim, config.train.precision,
           gpu.pad_buckets, gpu.grad_dtype, gpu.moment_dtype, gpu.optimizer_offload, num_ranks, p.tp, p.pp,
           p.ep, p.etp, p.zero1, stage == 0, stage == p.pp - 1, _build_layers_key(config, stage),
           get_bucket_numel(config, num_ranks) if stage == 0 else None, p.cp if m.yarn is not None else 0)
    if key not in _known:
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        buffers = StageBuffers(config, num_ranks, stage)
        _known[key] = buffers.count_states(buffers.find_fullest_place())
    return _known[key]


@lru_cache(maxsize=64)
def _strip_length(m: ModelConfig) -> ModelConfig:
    """Return a model without what stages of an extension differ in, and no parameter depends on."""
    return replace(m, max_position_tokens=0)


def _build_layers_key(config: RunConfig, stage: int) -> tuple[tuple[int, ...], ...]:
    """Return what tells the layers of a stage's chunks from those of another one: how many are dense and how
    many have experts, or, where rules or adapters name single layers, which they are."""
    m = config.model
    chunks = list_chunk_layers(config.parallel, stage, m.num_layers)
    if config.optim.groups or config.lora.on:
        return tuple(tuple(layers) for layers in chunks)
    first_moe = m.num_layers - m.num_moe_layers()
    return tuple((sum(layer < first_moe for layer in layers), len(layers)) for layers in chunks)


def get_bucket_numel(config: RunConfig, num_ranks: int) -> int | None:
    """Return the elements from which on a bucket of the first chunk is full; None: all are in one."""
    p = config.parallel
    if not p.overlap_grad_reduce:
        return None
    return p.bucket_params or max(DEFAULT_BUCKET, DEFAULT_BUCKET_OF_RANK * (num_ranks // p.ranks_per_replica))


def find_update_rule(config: RunConfig, layer: int | None, part: LocalParameter) -> _UpdateRule:
    matrix = len(part.shape) == 2 and part.key not in TABLES and not is_position_table(part.key)
    algorithm, frozen = config.optim.name, False
    if config.optim.groups:
        key = part.key.replace("{l}", str(layer))
        for group in config.optim.groups:
            if fnmatch.fnmatchcase(key, group.pattern):
                algorithm, frozen = group.optimizer or config.optim.name, group.frozen
    frozen = frozen or is_frozen(part.key, config.media)
    return _UpdateRule(frozen or (config.lora.on and not is_adapter(part.key)),
                 matrix and algorithm == "muon", len(part.shape) == 1)


def _count_offloaded(pieces: list[StatePiece], rules: list[_UpdateRule], share: float) -> int:
    """Return how many elements lie in host memory: the first pieces that are `share` of all together, or
    more; matrices come before vectors, which have no weight decay (`engine.optimizer.host_adamw.split`)."""
    if not share:
        return 0
    wanted, moved = share * sum(piece.numel * piece.number for piece in pieces), 0
    for piece in sorted(pieces, key=lambda piece: rules[piece.mark].is_vector):
        if wanted > moved:
            moved += piece.numel * min(piece.number, -int((moved - wanted) // piece.numel))
    return moved
