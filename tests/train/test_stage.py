"""What rank 0 alone does reaches every rank, its failures as well."""

from __future__ import annotations

from typing import Any

import pytest


def on_main(fail: bool) -> list[Any]:
    """Runs inside ranks: rank 0 answers or refuses; returns what each rank saw."""
    from megatron_sov.config import ParallelConfig
    from megatron_sov.errors import UserError
    from megatron_sov.mcore import world
    from megatron_sov.train.stage import _on_main

    place = world.join(ParallelConfig())
    asked: list[int] = []

    def action() -> str:
        asked.append(place.rank)
        if fail:
            raise UserError("the disk is full")
        return "answer"

    try:
        seen = _on_main(place, action)
    except UserError as e:
        seen = f"refused: {e}"
    world.leave()
    return [seen, asked]


@pytest.mark.distributed
def test_every_rank_hears_of_an_answer_and_of_a_failure(ranks: Any, job: Any) -> None:
    answered, refused = ranks(job(__file__, "on_main", 2, {"fail": False}), job(__file__, "on_main", 2, {"fail": True}))
    assert answered == [["answer", [0]], ["answer", []]]
    assert refused == [["refused: the disk is full", [0]], ["refused: the disk is full", []]]
