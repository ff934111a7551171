"""Pieces of matrices come together, are computed once, and every holder gets its piece of the result."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

SHAPES = {"large": (12, 10), "tall": (9, 4), "small": (2, 5), "one": (3, 3)}


def exchanged(round_elements: int) -> dict[str, Any]:
    """Cut matrices over three processes, one of them without any piece of its own; return what came of it."""
    import torch
    import torch.distributed as dist

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.optimizer import matrix_exchange
    from megatron_sov.mcore.optimizer.newton_schulz import Matrix
    from megatron_sov.mcore.parallel import world

    rank = world.join(ParallelConfig()).rank
    wholes = {Matrix(name, (), *shape): torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
              + i / 8 for i, (name, shape) in enumerate(SHAPES.items())}
    places, values = [], []
    for matrix in wholes:
        cut = matrix.rows // 2
        half = {0: (0, cut), 1: (cut, matrix.rows - cut)}.get(rank)
        if half is not None and matrix.key != "one":
            places.append(matrix_exchange.Place(matrix, half[0], 0, (half[1], matrix.columns), owned=True))
        elif half is not None:  # the same piece twice: only one is sent, both get the result
            places.append(matrix_exchange.Place(matrix, 0, 0, (3, 3), owned=rank == 0))
    values = [place.of(wholes[place.matrix]) for place in places]
    computed: list[str] = []
    written: dict[int, Any] = {}

    def compute(matrix: Matrix, whole: Any) -> Any:
        computed.append(matrix.key)
        assert whole.equal(wholes[matrix])
        return whole.flip(0) * 2

    with mock.patch.object(matrix_exchange, "ROUND_ELEMENTS", round_elements):
        exchange = matrix_exchange.MatrixExchange(places, dist.group.WORLD)
    exchange.run(values.__getitem__, compute, written.__setitem__, torch.float64)
    right = [written[n].equal(place.of(wholes[place.matrix].flip(0) * 2)) for n, place in enumerate(places)]
    world.leave()
    return {"rounds": len(exchange._rounds), "computed": computed, "right": right}


@pytest.mark.distributed
def test_every_matrix_is_computed_once_and_every_piece_gets_its_part(ranks: Any, job: Any) -> None:
    together, one_each = ranks(job(__file__, "exchanged", 3, {"round_elements": 120 * 4}),
                               job(__file__, "exchanged", 3, {"round_elements": 1}))
    for found, rounds in ((together, 1), (one_each, 2)):
        assert [r["rounds"] for r in found] == [rounds] * 3
        assert sorted(name for r in found for name in r["computed"]) == sorted(SHAPES)
        assert [r["right"] for r in found] == [[True] * 4, [True] * 4, []]
        assert found[2]["computed"] == ["small"] or found[2]["computed"] == ["one"], (
            "who holds nothing computes as well")
