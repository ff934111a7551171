"""Shards of one split: limits, pairs and extra lines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.indexed import open_split
from data_prep.sharding import ShardedWriter


def write(folder: Path, lengths: list[int], shard_tokens: int, group: int, batch: int) -> ShardedWriter:
    with ShardedWriter(folder, "s/train", "uint16", False, True, group, shard_tokens) as writer:
        for i in range(0, len(lengths), batch * group):
            part = np.array(lengths[i : i + batch * group], np.int32)
            ids = np.concatenate([np.full(n, i + k) for k, n in enumerate(part)])
            writer.write(part, part.astype(np.int64) * 3, {"bin": ids},
                         [b"%d\n" % (i + k) for k in range(len(part))])
    return writer


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(1, 60), st.sampled_from([1, 2]),
       st.integers(1, 7))
def test_shards_keep_order_limit_and_groups(lengths: list[int], shard_tokens: int, group: int,
                                            batch: int) -> None:
    lengths = lengths[: len(lengths) // group * group]
    with tempfile.TemporaryDirectory() as folder:
        writer = write(Path(folder), lengths, shard_tokens, group, batch)
        found, lines = [], []
        for number, shard in enumerate(writer.shards):
            assert shard.prefix == f"s/train-{number:05d}"
            documents = [d.tolist() for d in open_split(Path(folder) / shard.prefix).documents()]
            assert len(documents) == shard.num_documents > 0 and len(documents) % group == 0
            assert sum(map(len, documents)) == shard.num_tokens == shard.num_bytes // 3
            assert shard.num_tokens <= shard_tokens or len(documents) == group
            found += documents
            lines += Path(f"{folder}/{shard.prefix}.extra.jsonl").read_text().split()
        assert (found == [[i] * n for i, n in enumerate(lengths)]
                and lines == [str(i) for i in range(len(lengths))])
        # none was closed with room for the next
        for shard, following in zip(writer.shards, writer.shards[1:], strict=False):
            first = open_split(Path(folder) / following.prefix).lengths_tokens[:group].sum()
            assert shard.num_tokens + first > shard_tokens


def test_batches_do_not_move_the_limits(tmp_path: Path) -> None:
    lengths = [(i * 7) % 11 + 1 for i in range(200)]
    one, other = (write(tmp_path / str(batch), lengths, 50, 2, batch) for batch in (1, 60))
    assert one.shards == other.shards


def test_an_empty_split_has_one_empty_shard(tmp_path: Path) -> None:
    record = write(tmp_path, [], 10, 1, 1).record()
    assert record == {"shards": [{"prefix": "s/train-00000", "num_documents": 0, "num_tokens": 0,
                                  "num_bytes": 0}], "num_documents": 0, "num_tokens": 0, "num_bytes": 0}
