"""Muon: updates each weight matrix by its orthogonalized momentum, gathered from the pieces (rectangles of
the matrix) into which tensor parallelism and ZeRO-1 split it."""

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
from megatron_sov.engine.optimizer.state_shards import StateShard, iter_pieces, iter_shard_blocks
from megatron_sov.engine.parallel import values
from megatron_sov.engine.parallel.device import get_local_device, to_device
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import OptimConfig

ROUND_ELEMENTS = 1 << 24
"""Elements that a process receives per round, unless one matrix is larger."""
MOMENTUM = "momentum"


class Muon:
    """Muon for the local pieces of matrices, together with the processes that hold the other pieces.

    Same step as torch.optim.Muon: momentum, Newton-Schulz, decoupled weight decay. The momentum is stored
    with the shards."""

    state_names = (MOMENTUM,)

    def __init__(self, config: OptimConfig, model: LanguageModel, shards: list[StateShard],
                 param_groups: list[dict[str, Any]], group: dist.ProcessGroup) -> None:
        """Plan the exchange. Collective over `group`.

        Args:
            config: Muon's settings.
            model: model whose blocks locate the shards.
            shards: shards of matrices.
            param_groups: the same shards as torch parameter groups with `params`, `lr`, `weight_decay`.
            group: processes that together hold all pieces of these matrices.
        """
        self.param_groups = param_groups
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self._config, self._model, self._dtype = config, model.config, model.config.params_dtype
        self._pieces: list[_MatrixPiece] = []
        self._positions: list[PiecePosition] = []
        for block, shard in iter_shard_blocks(model, shards):
            flat = shard.main.detach().view(-1)
            matrix = Matrix(block.key, block.offset[:-2], *block.global_shape[-2:])
            for piece in iter_pieces(block, shard, flat):
                shape = (piece.data.shape[0], piece.data.shape[1])
                self._pieces.append(_MatrixPiece(shard,
                                                 int(piece.data.storage_offset() - flat.storage_offset()),
                                                 shape))
                row, column = piece.offset[-2:]
                self._positions.append(PiecePosition(matrix, row, column, shape,
                                                     owned=not any(piece.replica[:-1])))
        self._exchange = MatrixExchange(self._positions, group)
        self._parts: dict[Matrix, list[torch.Tensor]] = {}
        self._scales: dict[Matrix, torch.Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update all shards from their `grad`."""
        self._lr = {id(main): group["lr"] for group in self.param_groups for main in group["params"]}
        for group in self.param_groups:
            for main in group["params"]:
                state = self.state[main]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(main)
                # as in torch.optim.Muon: m = mu m + (1 - mu) g, and weight decay before the update
                state[MOMENTUM].lerp_(main.grad, 1 - self._config.muon_momentum)
                main.mul_(1 - group["lr"] * group["weight_decay"])
        self._exchange.run(self._compute_direction, self._orthogonalize_matrix, self._apply_update,
                           self._dtype)

    def _compute_direction(self, number: int) -> torch.Tensor:
        """Return a piece's update before orthogonalization: m, or with Nesterov (1 - mu) g + mu m."""
        piece = self._pieces[number]
        main = piece.shard.main
        momentum = piece.slice_shard(self.state[main][MOMENTUM])
        if not self._config.muon_nesterov:
            return momentum.to(self._dtype)
        assert main.grad is not None, "gradients are taken before the step"
        return piece.slice_shard(main.grad).lerp(momentum, self._config.muon_momentum).to(self._dtype)

    def _orthogonalize_matrix(self, matrix: Matrix, update: torch.Tensor) -> torch.Tensor:
        """Return the orthogonalized update of a matrix, part by part."""
        result = torch.empty_like(update)
        for rows in self._get_part_rows(matrix):
            result[rows] = orthogonalize(update[rows], self._config.muon_ns_steps,
                                         self._config.muon_ns_coefficients)
        return result

    def _apply_update(self, number: int, update: torch.Tensor) -> None:
        """Subtract lr * row scale * `update` from local piece `number`."""
        piece, position = self._pieces[number], self._positions[number]
        main = piece.shard.main
        scale = self._get_row_scales(position.matrix)[position.row:position.row + position.shape[0],
                                                      None].to(main.dtype)
        piece.slice_shard(main.detach()).add_(update.to(main.dtype) * scale, alpha=-self._lr[id(main)])

    def _get_part_rows(self, matrix: Matrix) -> list[torch.Tensor]:
        if matrix not in self._parts:
            self._parts[matrix] = [to_device(rows, get_local_device())
                                   for rows in split_matrix(matrix, self._model)]
        return self._parts[matrix]

    def _get_row_scales(self, matrix: Matrix) -> torch.Tensor:
        """Return the factor of every row, [rows] float64."""
        if matrix not in self._scales:
            scale = torch.empty(matrix.rows, dtype=torch.float64, device=get_local_device())
            for rows in self._get_part_rows(matrix):
                scale[rows] = compute_update_scale(self._config.muon_scale, len(rows), matrix.columns)
            self._scales[matrix] = scale
        return self._scales[matrix]


@dataclass(frozen=True, order=True)
class Matrix:
    """A two-dimensional weight, or one expert's slice of a three-dimensional one."""

    key: str
    """Global tensor's name."""
    index: tuple[int, ...]
    """Index on the leading axes (expert); empty for a two-dimensional weight."""
    rows: int
    """Output rows."""
    columns: int
    """Input columns."""

    @property
    def cost(self) -> int:
        """Multiplications per Newton-Schulz iteration, up to a constant factor."""
        return self.rows * self.columns * min(self.rows, self.columns)


def split_matrix(matrix: Matrix, config: Any) -> list[torch.Tensor]:
    """Return the row indices [count] per part that is orthogonalized separately.

    A fused QKV weight holds the rows of queries, key and value for each query group; the first weight of a
    gated feed-forward block holds the rows of gate and up. Each of these is a separate matrix (as with
    `split_qkv` of megatron.core.optimizer.muon).

    Args:
        matrix: a whole weight or one expert's slice.
        config: Megatron-Core's `TransformerConfig`.
    """
    rows = torch.arange(matrix.rows)
    if matrix.key.endswith("linear_qkv.weight"):
        key_rows = config.kv_channels
        query_rows = config.num_attention_heads // config.num_query_groups * key_rows
        grouped = rows.view(config.num_query_groups, query_rows + 2 * key_rows)
        return [part.flatten() for part in grouped.split([query_rows, key_rows, key_rows], dim=1)]
    if matrix.key.endswith("linear_fc1.weight") and config.gated_linear_unit:
        return list(rows.chunk(2))
    return [rows]


def orthogonalize(update: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """Approximate U V^T for an update [rows, columns] = U S V^T by Newton-Schulz iterations in its dtype.

    Same operations in the same order as torch.optim.Muon, which always uses bfloat16; after Keller Jordan,
    kellerjordan.github.io/posts/muon."""
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=1e-7)  # bounds the largest singular value by 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def compute_update_scale(kind: str, rows: int, columns: int) -> float:
    """Return the factor on the orthogonal update of a matrix with `rows` outputs and `columns` inputs.

    Args:
        kind: `match_rms_adamw`: update entries have a root mean square of 0.2, about AdamW's (Liu et al.,
            arXiv 2502.16982). `original`: Keller Jordan's. `spectral`: outputs change as much as inputs (Yang
            et al., arXiv 2310.17813).
    """
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns) if kind == "original" else rows / columns)


@dataclass(frozen=True)
class PiecePosition:
    """Rectangle of a matrix, [row:row + shape[0], column:column + shape[1]], on any process."""

    matrix: Matrix
    row: int
    column: int
    shape: tuple[int, int]
    owned: bool
    """Whether this replica of the piece is sent; all replicas receive the result."""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def slice_matrix(self, elements: torch.Tensor) -> torch.Tensor:
        """Return the piece's view of the elements [rows, columns] of its matrix."""
        return elements[self.row:self.row + self.shape[0], self.column:self.column + self.shape[1]]


@dataclass(frozen=True)
class _ExchangeRound:
    """Pieces that a process sends and receives in a round, by rank in the group."""

    sent: list[list[int]]
    """Indices of local pieces, by the rank that computes their matrix."""
    computed: list[list[PiecePosition]]
    """Positions of the pieces whose matrices this process computes, by the rank that holds the piece."""


class MatrixExchange:
    """Gathers whole matrices from their pieces. Creation and `run` are collective over the group.

    Tensor parallelism splits matrices, and ZeRO-1 cuts matrices where a process's range ends. Matrices are
    distributed over the processes of a group in rounds of similar cost: every process receives whole matrices
    with about equal work, and holds one round's matrices in addition to the local pieces. (Moonlight's
    distributed Muon, arXiv 2502.16982, section 2.3, gathers too, but computes a matrix on every process with
    a piece.)"""

    def __init__(self, positions: list[PiecePosition], group: dist.ProcessGroup) -> None:
        """Exchange the pieces' positions and plan the rounds.

        Args:
            positions: positions of the local pieces.
            group: processes that together hold all pieces of their matrices.
        """
        self._positions, self._group = positions, group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        positions_by_rank: list[list[PiecePosition]] = gather_objects(positions, group)
        # by cost, then name: the order is equal on all processes, and a round's matrices cost about the same
        matrices = sorted({p.matrix for rank_positions in positions_by_rank for p in rank_positions},
                          key=lambda m: (-m.cost, m))
        largest = max((m.rows * m.columns for m in matrices), default=1)
        round_size = size * max(1, ROUND_ELEMENTS // largest)
        matrix_numbers = {matrix: index for index, matrix in enumerate(matrices)}
        self._rounds = [_ExchangeRound([[] for _ in range(size)], [[] for _ in range(size)])
                        for _ in range(0, len(matrices), round_size)]
        # Each round has `round_size` consecutive matrices, dealt to the ranks of the group in turn.
        for index, piece in enumerate(positions):
            number = matrix_numbers[piece.matrix]
            self._rounds[number // round_size].sent[number % round_size % size].append(index)
        for peer, rank_positions in enumerate(positions_by_rank):
            for piece in rank_positions:
                number = matrix_numbers[piece.matrix]
                if number % round_size % size == rank:
                    self._rounds[number // round_size].computed[peer].append(piece)

    def run(self, read: Callable[[int], torch.Tensor],
            compute: Callable[[Matrix, torch.Tensor], torch.Tensor],
            write: Callable[[int, torch.Tensor], None], dtype: torch.dtype) -> None:
        """Apply `compute` to every matrix.

        Args:
            read: piece index -> its elements in `dtype`, in the piece's shape.
            compute: matrix and its elements [rows, columns] -> new elements, same shape, in `dtype`.
            write: called with a piece index and its new elements.
            dtype: dtype of the messages.
        """
        for exchange_round in self._rounds:
            matrices = self._gather_matrices(exchange_round, read, dtype)
            results = {matrix: compute(matrix, elements) for matrix, elements in matrices.items()}
            self._return_results(exchange_round, results, write, dtype)

    def _gather_matrices(self, exchange_round: _ExchangeRound, read: Callable[[int], torch.Tensor],
                         dtype: torch.dtype) -> dict[Matrix, torch.Tensor]:
        """Return the elements [rows, columns] of the matrices that this process computes in a round."""
        sent = [_concatenate((read(index) for index in indices if self._positions[index].owned), dtype)
                for indices in exchange_round.sent]
        # Only one replica of a piece is sent.
        owned_by_peer = [[position for position in positions if position.owned]
                         for positions in exchange_round.computed]
        sizes_by_peer = [[position.size for position in owned] for owned in owned_by_peer]
        received = self._exchange_tensors(sent, list(map(sum, sizes_by_peer)))
        matrices: dict[Matrix, torch.Tensor] = {}
        for owned, sizes, flat in zip(owned_by_peer, sizes_by_peer, received, strict=True):
            for position, elements in zip(owned, flat.split(sizes), strict=True):
                matrix = position.matrix
                if matrix not in matrices:
                    matrices[matrix] = torch.empty(matrix.rows, matrix.columns, dtype=dtype,
                                                   device=get_local_device())
                position.slice_matrix(matrices[matrix]).copy_(elements.view(position.shape))
        return matrices

    def _return_results(self, exchange_round: _ExchangeRound, results: dict[Matrix, torch.Tensor],
                        write: Callable[[int, torch.Tensor], None], dtype: torch.dtype) -> None:
        """Send each piece of the results to all processes that hold a replica, and write the local pieces."""
        sent = [_concatenate((p.slice_matrix(results[p.matrix]) for p in positions), dtype)
                for positions in exchange_round.computed]
        sizes_by_peer = [[self._positions[index].size for index in indices]
                         for indices in exchange_round.sent]
        received = self._exchange_tensors(sent, list(map(sum, sizes_by_peer)))
        for indices, sizes, flat in zip(exchange_round.sent, sizes_by_peer, received, strict=True):
            for index, elements in zip(indices, flat.split(sizes), strict=True):
                write(index, elements.view(self._positions[index].shape))

    def _exchange_tensors(self, to_each: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Send a flat tensor to each process; return the tensors received, `counts` elements from each."""
        if len(to_each) == 1:
            return to_each
        dtype, item = to_each[0].dtype, to_each[0].element_size()
        received = torch.empty(sum(counts), dtype=dtype, device=get_local_device())
        # as bytes: some backends do not support every dtype
        dist.all_to_all_single(received.view(torch.uint8), torch.cat(to_each).view(torch.uint8),
                               [item * n for n in counts], [item * len(t) for t in to_each],
                               group=self._group)
        return list(received.split(counts))


def _concatenate(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Concatenate all elements; the result may be empty."""
    return torch.cat([torch.empty(0, dtype=dtype, device=get_local_device()),
                      *(t.flatten() for t in tensors)])


@dataclass(frozen=True)
class _MatrixPiece:
    """A rectangle of a matrix inside a `StateShard`."""

    shard: StateShard
    start: int
    """First element's index in the shard."""
    shape: tuple[int, int]

    def slice_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the piece's view of a tensor with the shard's layout."""
        count = self.shape[0] * self.shape[1]
        return tensor.view(-1)[self.start:self.start + count].view(self.shape)


def get_matrix_group(is_expert: bool, zero1: bool) -> dist.ProcessGroup:
    """Return the processes that together hold all pieces of the local matrices. Collective over the world.

    For tensor-parallel experts (`parallel.etp`) under ZeRO-1 Megatron-Core has no such group; it is created
    here."""
    if not is_expert and zero1:
        return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if not is_expert:
        return parallel_state.get_tensor_model_parallel_group()
    if not zero1:
        return parallel_state.get_expert_tensor_parallel_group()
    if parallel_state.get_expert_tensor_parallel_world_size() == 1:
        return parallel_state.get_expert_data_parallel_group()
    coordinates = (parallel_state.get_pipeline_model_parallel_rank(),
                   parallel_state.get_expert_model_parallel_rank())
    # not `gather_objects` as imported above: `tests.meta_memory` replaces that name, and this call must stay
    coordinates_by_rank = values.gather_objects(coordinates)
    ranks = [[rank for rank, other_coordinates in enumerate(coordinates_by_rank)
              if other_coordinates == group_coordinates]
             for group_coordinates in sorted(set(coordinates_by_rank))]
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    return group
