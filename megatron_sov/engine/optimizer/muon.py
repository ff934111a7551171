"""Muon: matrices are updated by their momentum made orthogonal, each as a whole however it is
cut over processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.optimizer.state_shards import StateShard, pieces, shard_blocks
from megatron_sov.engine.parallel import values
from megatron_sov.engine.parallel.device import local_device, to_device
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import OptimConfig

# Weight matrices for Muon: which rows of a tensor are a matrix of their own, and how an update is
# made orthogonal.

@dataclass(frozen=True, order=True)
class Matrix:
    """A two-dimensional tensor, or one expert's part of a three-dimensional one."""

    key: str
    """Name of the global tensor."""
    index: tuple[int, ...]
    """Place on the leading axes (expert), empty for a matrix."""
    rows: int
    """Outputs of the layer."""
    columns: int
    """Inputs of the layer."""

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz iteration, but for a factor."""
        return self.rows * self.columns * min(self.rows, self.columns)


def parts(matrix: Matrix, config: Any) -> list[torch.Tensor]:
    """Return the rows [count] of each part that is orthogonalised on its own.

    A fused query-key-value weight holds for each of its groups the queries' rows, then the key's, then the
    value's; a gated feed-forward's first weight the gate's rows, then those of the other half.  Each is a
    matrix of its own (as in megatron.core.optimizer.muon, `split_qkv`).

    Args:
        matrix: a whole tensor or a whole expert.
        config: the library's TransformerConfig.
    """
    rows = torch.arange(matrix.rows)
    if matrix.key.endswith("linear_qkv.weight"):
        per_key = config.num_attention_heads // config.num_query_groups * config.kv_channels
        grouped = rows.view(config.num_query_groups, per_key + 2 * config.kv_channels)
        return [part.flatten()
                for part in grouped.split([per_key, config.kv_channels, config.kv_channels], dim=1)]
    if matrix.key.endswith("linear_fc1.weight") and config.gated_linear_unit:
        return list(rows.chunk(2))
    return [rows]


def orthogonalise(update: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """Return about U V^T of an update [rows, columns] = U S V^T,
    by Newton-Schulz iterations in its own dtype.

    The same operations in the same order as torch.optim.Muon (which always does them in bfloat16), after
    Keller Jordan, kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=1e-7)  # its largest singular value is 1 at most
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def update_scale(kind: str, rows: int, columns: int) -> float:
    """Return the factor on an orthogonal update of a matrix with `rows` outputs and `columns` inputs.

    Args:
        kind: `match_rms_adamw`: entries have a root mean square of 0.2, about AdamW's (Liu et al., arXiv
            2502.16982); `original`: Keller Jordan's; `spectral`: outputs change as much as inputs do (Yang et
            al., arXiv 2310.17813).
    """
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns) if kind == "original" else rows / columns)


# Bringing the pieces of matrices together on one process each, and the results back to wherever the
# pieces lie.
#
# Matrices are cut by tensor parallelism, and by ZeRO-1 wherever a process's stretch of all parameters
# ends. They are dealt out to the processes of a group in rounds, those of like cost in the same
# round: every process receives whole matrices of about the same work, and holds only one round's
# beside its own pieces. (Moonlight's distributed Muon, arXiv 2502.16982, section 2.3, gathers as
# well, but computes a matrix on every process that holds a piece.)

ROUND_ELEMENTS = 1 << 24
"""Elements of matrices that a process receives in one round, unless a single matrix is larger."""


@dataclass(frozen=True)
class MatrixPlace:
    """Where a piece lies in its matrix."""

    matrix: Matrix
    row: int
    column: int
    shape: tuple[int, int]
    owned: bool
    """Whether this piece, of all equal ones in the group, is the one that is sent;
    every one receives its result."""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the piece's view of a whole matrix [rows, columns]."""
        return whole[self.row:self.row + self.shape[0], self.column:self.column + self.shape[1]]


@dataclass(frozen=True)
class _ExchangeRound:
    """What one process sends and receives in a round, by process of the group."""

    sent: list[list[int]]
    """Numbers of this process's pieces, by who computes their matrices."""
    held: list[list[MatrixPlace]]
    """Pieces of the matrices that this process computes, by who holds them."""


class MatrixExchange:
    """The plan of who computes which matrix; made and run by all processes of the group together."""

    def __init__(self, places: list[MatrixPlace], group: dist.ProcessGroup) -> None:
        """Exchange who holds what.

        Args:
            places: of this process's pieces.
            group: the processes that hold all pieces of their matrices between them.
        """
        self._places, self._group = places, group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        everyones: list[list[MatrixPlace]] = gather_objects(places, group)
        # by cost, then by name: equal on every process without a word, and matrices of one round take as long
        matrices = sorted({p.matrix for held in everyones for p in held}, key=lambda m: (-m.cost, m))
        largest = max((m.rows * m.columns for m in matrices), default=1)
        in_round = size * max(1, ROUND_ELEMENTS // largest)
        number = {matrix: n for n, matrix in enumerate(matrices)}
        self._rounds = [_ExchangeRound([[] for _ in range(size)], [[] for _ in range(size)])
                        for _ in range(0, len(matrices), in_round)]
        for n, place in enumerate(places):
            at = number[place.matrix]
            self._rounds[at // in_round].sent[at % in_round % size].append(n)
        for peer, held in enumerate(everyones):
            for place in held:
                at = number[place.matrix]
                if at % in_round % size == rank:
                    self._rounds[at // in_round].held[peer].append(place)

    def run(self, read: Callable[[int], torch.Tensor],
            compute: Callable[[Matrix, torch.Tensor], torch.Tensor],
            write: Callable[[int, torch.Tensor], None], dtype: torch.dtype) -> None:
        """Apply `compute` to every matrix.

        Args:
            read: number of a piece -> its elements, in `dtype` and of the place's shape.
            compute: matrix, its elements [rows, columns] -> as many new ones in `dtype`.
            write: takes the number of a piece and its new elements, of the place's shape.
            dtype: what is sent.
        """
        for one in self._rounds:
            sent = [_join((read(n) for n in numbers if self._places[n].owned), dtype)
                    for numbers in one.sent]
            received = self._send(sent, [sum(p.size for p in held if p.owned) for held in one.held])
            wholes: dict[Matrix, torch.Tensor] = {}
            for held, flat in zip(one.held, received, strict=True):
                # of equal pieces one is sent; all get the result, so replicas stay bit for bit the same
                owned = [p for p in held if p.owned]
                for place, part in zip(owned, flat.split([p.size for p in owned]), strict=True):
                    m = place.matrix
                    if m not in wholes:
                        wholes[m] = torch.empty(m.rows, m.columns, dtype=dtype, device=local_device())
                    place.of(wholes[m]).copy_(part.view(place.shape))
            results = {matrix: compute(matrix, whole) for matrix, whole in wholes.items()}
            returned = [_join((p.of(results[p.matrix]) for p in held), dtype) for held in one.held]
            for numbers, flat in zip(one.sent,
                                     self._send(returned, [self._size(numbers) for numbers in one.sent]),
                                     strict=True):
                places = [self._places[n] for n in numbers]
                for n, place, part in zip(numbers, places, flat.split([p.size for p in places]), strict=True):
                    write(n, part.view(place.shape))

    def _size(self, numbers: Iterable[int]) -> int:
        return sum(self._places[n].size for n in numbers)

    def _send(self, to_each: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Send a flat tensor to each process of the group; returns what each sent here, `counts` elements."""
        if len(to_each) == 1:
            return to_each
        dtype, item = to_each[0].dtype, to_each[0].element_size()
        received = torch.empty(sum(counts), dtype=dtype, device=local_device())
        # as bytes, since not every backend knows every dtype
        dist.all_to_all_single(received.view(torch.uint8), torch.cat(to_each).view(torch.uint8),
                               [item * n for n in counts], [item * len(t) for t in to_each],
                               group=self._group)
        return list(received.split(counts))


def _join(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return all elements in a row, which may be none."""
    return torch.cat([torch.empty(0, dtype=dtype, device=local_device()), *(t.flatten() for t in tensors)])


MOMENTUM = "momentum"


@dataclass(frozen=True)
class _MatrixPiece:
    """A rectangle of a matrix inside a shard."""

    shard: StateShard
    start: int
    """First element, counted in the shard."""
    shape: tuple[int, int]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this piece of a tensor that is laid out like the shard."""
        count = self.shape[0] * self.shape[1]
        return tensor.view(-1)[self.start:self.start + count].view(self.shape)


class Muon:
    """Updates this process's shards of matrices, together with the other processes that hold parts of them.

    The step of torch.optim.Muon: momentum, Newton-Schulz, decoupled weight decay.  Momentum lies
    where the shards lie.
    """

    state_names = (MOMENTUM,)

    def __init__(self, config: OptimConfig, model: LanguageModel, shards: list[StateShard],
                 param_groups: list[dict[str, Any]], group: dist.ProcessGroup) -> None:
        """Plan who computes what; called by all processes of `group` together.

        Args:
            config: Muon's settings.
            model: whose blocks say where the shards lie.
            shards: of matrices.
            param_groups: the same, as torch's optimizers hold them: `params`, `lr`, `weight_decay`.
            group: the processes that hold all parts of these matrices between them.
        """
        self.param_groups = param_groups
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self._config, self._model, self._dtype = config, model.config, model.config.params_dtype
        self._pieces: list[_MatrixPiece] = []
        self._places: list[MatrixPlace] = []
        for block, shard in shard_blocks(model, shards):
            flat = shard.main.detach().view(-1)
            matrix = Matrix(block.key, block.offset[:-2], *block.global_shape[-2:])
            for piece in pieces(block, shard, flat):
                shape = (piece.data.shape[0], piece.data.shape[1])
                self._pieces.append(_MatrixPiece(shard,
                                                 int(piece.data.storage_offset() - flat.storage_offset()),
                                                 shape))
                row, column = piece.offset[-2:]
                self._places.append(MatrixPlace(matrix, row, column, shape,
                                                owned=not any(piece.replica[:-1])))
        self._exchange = MatrixExchange(self._places, group)
        self._parts: dict[Matrix, list[torch.Tensor]] = {}
        self._scales: dict[Matrix, torch.Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards by their `grad`."""
        self._lr = {id(main): group["lr"] for group in self.param_groups for main in group["params"]}
        for group in self.param_groups:
            for main in group["params"]:
                state = self.state[main]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(main)
                # as in torch.optim.Muon: m = mu m + (1 - mu) g, and the decay before the update, at the rate
                # of the step
                state[MOMENTUM].lerp_(main.grad, 1 - self._config.muon_momentum)
                main.mul_(1 - group["lr"] * group["weight_decay"])
        self._exchange.run(self._direction, self._orthogonal, self._move, self._dtype)

    def _direction(self, number: int) -> torch.Tensor:
        """Return where a piece's weights should go, before the matrix is made orthogonal."""
        piece = self._pieces[number]
        main = piece.shard.main
        momentum = piece.of(self.state[main][MOMENTUM])
        if not self._config.muon_nesterov:
            return momentum.to(self._dtype)
        assert main.grad is not None, "gradients are taken before the step"
        return piece.of(main.grad).lerp(momentum, self._config.muon_momentum).to(self._dtype)

    def _orthogonal(self, matrix: Matrix, update: torch.Tensor) -> torch.Tensor:
        """Return the orthogonal update of each part of a matrix."""
        result = torch.empty_like(update)
        for rows in self._rows(matrix):
            result[rows] = orthogonalise(update[rows], self._config.muon_ns_steps,
                                         self._config.muon_ns_coefficients)
        return result

    def _move(self, number: int, update: torch.Tensor) -> None:
        piece, place = self._pieces[number], self._places[number]
        main = piece.shard.main
        scale = self._scale(place.matrix)[place.row:place.row + place.shape[0], None].to(main.dtype)
        piece.of(main.detach()).add_(update.to(main.dtype) * scale, alpha=-self._lr[id(main)])

    def _rows(self, matrix: Matrix) -> list[torch.Tensor]:
        if matrix not in self._parts:
            self._parts[matrix] = [to_device(rows, local_device()) for rows in parts(matrix, self._model)]
        return self._parts[matrix]

    def _scale(self, matrix: Matrix) -> torch.Tensor:
        """Return the factor of every row, [rows] float64."""
        if matrix not in self._scales:
            scale = torch.empty(matrix.rows, dtype=torch.float64, device=local_device())
            for rows in self._rows(matrix):
                scale[rows] = update_scale(self._config.muon_scale, len(rows), matrix.columns)
            self._scales[matrix] = scale
        return self._scales[matrix]


def holders(is_expert: bool, zero1: bool) -> dist.ProcessGroup:
    """Return the processes that hold all parts of this process's matrices between them.

    Called by all processes of the world together: for experts that are cut themselves (`parallel.etp`) under
    ZeRO-1 the library has no such group, and one is made.
    """
    if not is_expert:
        return (parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True) if zero1
                else parallel_state.get_tensor_model_parallel_group())
    if not zero1:
        return parallel_state.get_expert_tensor_parallel_group()
    if parallel_state.get_expert_tensor_parallel_world_size() == 1:
        return parallel_state.get_expert_data_parallel_group()
    mine = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    # through its module: `optimizer.meta` replaces the name in this file, and not this call
    everyones = values.gather_objects(mine)
    ranks = [[rank for rank, place in enumerate(everyones) if place == wanted]
             for wanted in sorted(set(everyones))]
    found, _ = dist.new_subgroups_by_enumeration(ranks)
    return found
