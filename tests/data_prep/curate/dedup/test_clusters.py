"""Selection of near duplicates from pairs, compared with a plain greedy search."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.curate.dedup import clusters as clusters_module
from data_prep.curate.dedup.clusters import DROPPED, Clusters, DocumentOrder, sorted_edges
from data_prep.curate.dedup.work_files import Register, bucket_slice, write_array
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs

COUNTS = (5, 0, 7, 0, 0, 9)
"""Documents of each shard; some shards are empty or begin at one place."""


def _lengths(register: Register, draw: random.Random, longest: int) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for rank, count in enumerate(COUNTS):
        register.write(rank, [(row, draw.randrange(1, longest), f"web:{rank}:{row}") for row in range(count)])
        lengths |= {rank << 32 | int(r["row"]): int(r["characters"]) for r in register.read(rank)}
    return lengths


def _by_plain_search(order: list[int], pairs: list[list[int]]) -> dict[int, int]:
    """Return document that goes -> the first kept document that it has a pair with."""
    similar: dict[int, set[int]] = {number: set() for number in order}
    for one, other in pairs:
        similar[one].add(other)
        similar[other].add(one)
    kept: list[int] = []
    dropped = {}
    for number in order:
        keeper = next((other for other in kept if other in similar[number]), None)
        if keeper is None:
            kept.append(number)
        else:
            dropped[number] = keeper
    return dropped


@pytest.mark.parametrize("in_memory", [1 << 20, 10, 3, 1])
@pytest.mark.parametrize("num_pairs", [0, 1, 9, 40, 120])
def test_selection_is_that_of_a_greedy_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              num_pairs: int, in_memory: int) -> None:
    monkeypatch.setattr(clusters_module, "EDGES_IN_MEMORY", in_memory)
    monkeypatch.setattr(clusters_module, "_EDGE_BLOCK", 4)
    draw = random.Random(num_pairs)
    shards = [docs(*["x"] * max(count, 1), source="book" if rank == 2 else "web", shard=rank)
              for rank, count in enumerate(COUNTS)]
    # Shards of lower priority have the larger ranks: those of `web` here.
    view = MemoryView.of(shards, tmp_path, **({"book": 1} if num_pairs == 40 else {}))
    register = Register(tmp_path / "documents")
    lengths = _lengths(register, draw, 2 if num_pairs == 120 else 4)
    pairs = [draw.sample(sorted(lengths), 2) for _ in range(num_pairs)]
    order = DocumentOrder(view)
    numbers = np.array(pairs, np.uint64).reshape(-1, 2)
    characters = np.array([[lengths[one], lengths[other]] for one, other in pairs], np.uint64).reshape(-1, 2)
    edges = order.edges(numbers, characters)
    files = [tmp_path / f"{part}.npy" for part in range(3)]
    for part, file in enumerate(files):
        write_array(file, sorted_edges(edges[part::3]))
    clusters = Clusters(view, register, tmp_path / "scratch")
    clusters.select(files)
    clusters.write_dropped(tmp_path / "dropped")

    def place(number: int) -> tuple[int, int, int]:
        is_book = num_pairs == 40 and number >> 32 == 0  # the first rank is that of the higher priority
        return (0 if is_book else 1, -lengths[number], number)

    expected = _by_plain_search(sorted(lengths, key=place), pairs)
    found = [bucket_slice(tmp_path / "dropped", DROPPED, rank).read() for rank in range(len(COUNTS))]
    assert {int(r["doc"]): int(r["keeper"]) for part in found for r in part} == expected
