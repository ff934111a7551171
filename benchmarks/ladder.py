"""Five tiny models predict a sixth, of two families: the law that `megatron-sov ladder` fits, its prediction
with an interval, and what came of it.

Usage: python benchmarks/ladder.py --work FOLDER [--families tiny-solar-open tiny-qwen3]
       python benchmarks/ladder.py --work FOLDER --print

The text is English documentation and Python code that any machine has (`sov-data demo-corpus`), in 512
tokens.  tiny-solar-open is of routed experts, tiny-qwen3 is dense.  The prediction is written before the
sixth run begins.  What is complete is not done again; one process of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from seed_runs import rows_of, run, words

FAMILIES = ("tiny-solar-open", "tiny-qwen3")
SIZES, PREDICTED, TOKENS_PER_PARAM = "16K,24K,32K,64K,128K", "256K", "6"
SETTINGS = ("model.vocab_size=512", "train.global_batch_size=8", "train.micro_batch_size=8",
            "train.num_threads=1", rows_of(128))


def make_data(work: Path) -> None:
    """Gather and pack the text, unless that is done."""
    if (work / "shards/manifest.json").exists():
        return
    log, corpus = work / "log", work / "corpus"
    run(log, "data_prep.cli", "demo-corpus", "--output", corpus, "--overwrite")
    files = [corpus / f"{name}.jsonl" for name in ("english", "code")]
    run(log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "512", "--input", *files,
        "--output", work / "tokenizer", "--overwrite")
    run(log, "data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--heldout", "0.02", "--workers",
        "1", "--input", *files, "--output", work / "shards", "--overwrite")


def climb(work: Path, family: str) -> None:
    """Train what is not complete of a ladder, and compare."""
    run(work / f"{family}.log", "megatron_sov", "ladder", family, "--sizes", SIZES, "--predict", PREDICTED,
        "--verify", "--tokens-per-param", TOKENS_PER_PARAM, "--data", work / "shards", "--run", work / family,
        *words(SETTINGS))


def told(found: dict[str, Any]) -> list[str]:
    """Return the lines of one ladder's file."""
    lines = [f"{found['recipe']}, rates {found['rates']}",
             "  parameters     tokens  held-out loss (nats per token)"]
    lines += [f"  {p['num_params']:>10,} {p['num_tokens']:>10,}  {p['loss']:.4f}" for p in found["points"]]
    law = ", ".join(f"{name} {v['loss']:.3g} ({v['low']:.3g} to {v['high']:.3g})"
                    for name, v in found["law"]["parameters"].items())
    lines.append(f"  {found['law']['form']}: {law}")
    for p in found["predictions"]:
        low, high = p["predicted"]["low"], p["predicted"]["high"]
        interval = "no interval" if low is None else f"95 %: {low:.4f} to {high:.4f}"
        lines.append(f"  {p['num_params']:>10,} {p['num_tokens']:>10,}  predicted "
                     f"{p['predicted']['loss']:.4f} ({interval})")
        if p["measured"] is not None:
            lines.append(f"{'':24}measured  {p['measured']:.4f}: error {p['error']:+.2%}" + (
                "" if low is None else
                f" ({low / p['measured'] - 1:+.2%} to {high / p['measured'] - 1:+.2%}), "
                f"{'inside' if p['inside'] else 'outside'} the interval"))
    return lines


def main() -> None:
    """Run what is missing, and print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    if not args.only_print:
        make_data(args.work)
        for family in args.families:
            climb(args.work, family)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one process of "
          "one thread")
    for family in args.families:
        file = args.work / family / "ladder.json"
        if file.exists():
            print("\n".join(["", *told(json.loads(file.read_text()))]))


if __name__ == "__main__":
    main()
