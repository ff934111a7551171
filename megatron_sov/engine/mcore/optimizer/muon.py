"""Muon: matrices are updated by their momentum made orthogonal, each as a whole however it is
cut over processes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sov.engine.mcore.model.language_model import LanguageModel
from megatron_sov.engine.mcore.optimizer.matrix_exchange import MatrixExchange, MatrixPlace
from megatron_sov.engine.mcore.optimizer.newton_schulz import Matrix, orthogonalise, parts, update_scale
from megatron_sov.engine.mcore.optimizer.state_shards import StateShard, pieces, shard_blocks
from megatron_sov.engine.mcore.parallel.device import local_device
from megatron_sov.engine.mcore.parallel.object_collectives import gather_objects
from megatron_sov.model.config import OptimConfig

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
        """Move a piece's weights."""
        piece, place = self._pieces[number], self._places[number]
        main = piece.shard.main
        scale = self._scale(place.matrix)[place.row:place.row + place.shape[0], None].to(main.dtype)
        piece.of(main.detach()).add_(update.to(main.dtype) * scale, alpha=-self._lr[id(main)])

    def _rows(self, matrix: Matrix) -> list[torch.Tensor]:
        if matrix not in self._parts:
            self._parts[matrix] = [rows.to(local_device()) for rows in parts(matrix, self._model)]
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
    everyones = gather_objects(mine)
    ranks = [[rank for rank, place in enumerate(everyones) if place == wanted]
             for wanted in sorted(set(everyones))]
    found, _ = dist.new_subgroups_by_enumeration(ranks)
    return found
