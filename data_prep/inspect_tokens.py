"""What an artifact of token shards holds, per source."""

from __future__ import annotations

from pathlib import Path

from data_prep.splits import HELDOUT, TRAIN
from data_prep.token_artifact import read_tokens_manifest


def table(data: Path) -> list[str]:
    """Return the lines of the table.

    Raises:
        UserError: `data` is not an artifact of kind "tokens".
    """
    content = read_tokens_manifest(data).content
    lines = [f"{data}: vocabulary {content['vocab_size']:,}, {content['dtype']}, "
             f"tokenizer {content['tokenizer_sha256'][:12]}",
             f"{'source':<20} {'format':<10} {'split':<8} {'shards':>6} {'documents':>12} {'tokens':>16} "
             f"{'bytes':>16} {'bytes/token':>12}"]
    for source in content["sources"]:
        for split in (TRAIN, HELDOUT):
            s = source["splits"][split]
            ratio = f"{s['num_bytes'] / s['num_tokens']:.3f}" if s["num_tokens"] else "-"
            counts = (f"{len(s['shards']):>6} {s['num_documents']:>12,} {s['num_tokens']:>16,} "
                      f"{s['num_bytes']:>16,}")
            lines.append(f"{source['name']:<20} {source['format']:<10} {split:<8} {counts} {ratio:>12}")
    return lines
