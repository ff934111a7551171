"""Clusters from pairs, with shards that are empty or begin at one place."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.curate.dedup.minhash import DROPPED, Clusters
from data_prep.curate.dedup.work_files import Register, bucket_slice
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs


@pytest.mark.parametrize("keep", ["longest", "first"])
def test_clusters_are_those_of_a_plain_search(tmp_path: Path, keep: str) -> None:
    draw = random.Random(4)
    counts = [5, 0, 7, 0, 0, 9]
    shards = [docs(*["x"] * max(count, 1), shard=rank) for rank, count in enumerate(counts)]
    register = Register(tmp_path / "documents")
    lengths: dict[int, int] = {}
    for rank, count in enumerate(counts):
        register.write(rank, [(row, draw.randrange(1, 4), f"web:{rank}:{row}") for row in range(count)])
        lengths |= {rank << 32 | int(r["row"]): int(r["characters"]) for r in register.read(rank)}
    edges = [draw.sample(sorted(lengths), 2) for _ in range(9)]
    clusters = Clusters(MemoryView.of(shards, tmp_path), register, tmp_path / "scratch")
    clusters.unite(np.array(edges, np.uint64))
    clusters.write_dropped(tmp_path / "dropped", keep)

    groups = {number: {number} for number in lengths}
    for one, other in edges:
        joined = groups[one] | groups[other]
        groups |= dict.fromkeys(joined, joined)
    best = {number: min(group, key=lambda n: (-lengths[n] if keep == "longest" else 0, n))
            for number, group in groups.items()}
    found = [bucket_slice(tmp_path / "dropped", DROPPED, rank).read() for rank in range(len(counts))]
    assert {int(r["doc"]): int(r["keeper"]) for part in found for r in part} == {
        number: keeper for number, keeper in best.items() if keeper != number}
    by_size = dict(clusters.sizes())
    sizes = [len(group) for group in {frozenset(group) for group in groups.values()}]
    assert by_size["2"] == sizes.count(2)
    assert sum(by_size.values()) == sum(size > 1 for size in sizes)
