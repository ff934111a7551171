"""Bringing the pieces of matrices together on one process each, and the results back to
wherever the pieces lie.

Matrices are cut by tensor parallelism, and by ZeRO-1 wherever a process's stretch of all parameters ends.
They are dealt out to the processes of a group in rounds, those of like cost in the same round: every process
receives whole matrices of about the same work, and holds only one round's beside its own pieces.
(Moonlight's distributed Muon, arXiv 2502.16982, section 2.3, gathers as well, but computes a matrix on every
process that holds a piece.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sov.engine.mcore.optimizer.newton_schulz import Matrix
from megatron_sov.engine.mcore.parallel.device import local_device
from megatron_sov.engine.mcore.parallel.object_collectives import gather_objects

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
        """Number of elements."""
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
            sent = [_joined((read(n) for n in numbers if self._places[n].owned), dtype)
                    for numbers in one.sent]
            received = self._send(sent, [sum(p.size for p in held if p.owned) for held in one.held])
            wholes: dict[Matrix, torch.Tensor] = {}
            for held, flat in zip(one.held, received, strict=True):
                owned = [p for p in held if p.owned]
                for place, part in zip(owned, flat.split([p.size for p in owned]), strict=True):
                    m = place.matrix
                    if m not in wholes:
                        wholes[m] = torch.empty(m.rows, m.columns, dtype=dtype, device=local_device())
                    place.of(wholes[m]).copy_(part.view(place.shape))
            results = {matrix: compute(matrix, whole) for matrix, whole in wholes.items()}
            returned = [_joined((p.of(results[p.matrix]) for p in held), dtype) for held in one.held]
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


def _joined(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return all elements in a row, which may be none."""
    return torch.cat([torch.empty(0, dtype=dtype, device=local_device()), *(t.flatten() for t in tensors)])
