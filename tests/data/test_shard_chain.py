"""Several shards as one split: the same documents as in one shard, found without reading lengths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.pack import PackSettings, Source, pack
from megatron_sov.data.token_shards import open_sources
from megatron_sov.documents import Reading
from megatron_sov.errors import UserError


@pytest.fixture(scope="module")
def packed(token_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same chats in one shard and in many."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [{"messages": [{"role": "user", "content": f"{i}?"},
                           {"role": "assistant", "content": f"{i} " * (i % 9 + 1)}]}
             for i in range(100)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = token_shards.parent / "tokenizer"
    for name, shard_tokens in (("one", 10**9), ("many", 300)):
        pack(tokenizer, [Source("chat", folder / "chat.jsonl")], folder / name,
             PackSettings(0.1, Reading("chat"), shard_tokens=shard_tokens))
    return folder / "one", folder / "many"


def test_a_chain_is_the_one_shard(packed: tuple[Path, Path]) -> None:
    [one], [many] = (open_sources({str(p): 1.0}, 2000) for p in packed)
    assert len(one.prefixes["train"]) == 1 and len(many.prefixes["train"]) > 5
    assert one.num_tokens == many.num_tokens and one.share == many.share
    for split in ("train", "heldout"):
        a, b = one.shard(split), many.shard(split)
        assert list(a.lengths) == list(b.lengths) == [b.lengths[i] for i in range(len(b.lengths))]
        for document, length in enumerate(b.lengths):
            for column in ("tokens", "loss_weights", "types"):
                ours, theirs = (getattr(d, column)(document, 1, length - 1) for d in (b, a))
                assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        for beyond in (-1, len(b.lengths)):
            with pytest.raises(IndexError, match=f"document {beyond} of {len(b.lengths)}"):
                b.tokens(beyond, 0, 1)


def test_other_layouts_and_formats_are_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    raw = json.loads((packed[0] / "manifest.json").read_text())
    del raw["content"]["content_version"]
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"sha256": ""}))
    with pytest.raises(UserError,
                       match="was packed in layout 1, this version reads layout 2; pack the data again"):
        open_sources({str(tmp_path): 1.0}, 2000)
    with pytest.raises(UserError, match="holds data of format 'chat', this stage learns from preference"):
        open_sources({str(packed[0]): 1.0}, 2000, formats=("preference",))


LIMITED = """
import resource, sys
from pathlib import Path
from megatron_sov.data.token_shards import ShardChain
from megatron_sov.errors import UserError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
try:
    shards = sorted({p.with_suffix('') for p in Path(sys.argv[1]).glob('train-*.idx')})
    print(f"{len(ShardChain(shards).lengths)} documents")
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(("limits", "said"), [
    ((16, 4096), "93 documents"),
    ((16, 16),
     "16 files are open, and this process may not open more; raise `ulimit -n`, or pack into larger shards"),
])
def test_more_shards_than_open_files_are_allowed(packed: tuple[Path, Path], limits: tuple[int, int],
                                                 said: str) -> None:
    """A mapped file keeps its descriptor; the limit that a shell sets is raised as far as
    the system allows."""
    argv = [sys.executable, "-c", LIMITED, str(packed[1] / "chat"), *map(str, limits)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert said in done.stdout
